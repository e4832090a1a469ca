"""The origin of a result: machine, package versions, commit of the code."""

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "llama-smop",
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "peft",
    "numpy",
    "liger-kernel",
    "webdataset",
    "wandb",
)


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def machine() -> dict:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """{package: version} of the installed ones."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | {"torch": torch.__version__}


def commit(paths: Sequence[str] = ("llama_smop",)) -> dict:
    """{"commit", "modified"} of this code's checkout; "modified" says whether `paths` differ from the commit.

    Both are None if the code is not a checkout, even if it is installed inside another checkout.
    """
    if _git("ls-files", "--error-unmatch", str(Path(__file__).resolve())) is None:
        return {"commit": None, "modified": None}
    status = _git("status", "--porcelain", "--", *paths)
    return {"commit": _git("rev-parse", "HEAD"), "modified": None if status is None else bool(status)}


def _git(*arguments: str) -> str | None:
    """git's output in the checkout's root; None if git fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
