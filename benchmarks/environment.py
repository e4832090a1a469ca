"""Where a measurement was made: device, versions, commit, load. No host names and no paths."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "transformers", "numpy", "scattermoe", "grouped_gemm", "liger-kernel", "sonicmoe")
SOURCES = ("llama_smop", "triton_kernels", "csrc", "benchmarks", ":!benchmarks/results")


def describe(device: torch.device) -> dict:
    """Everything a reader needs to judge the numbers."""
    return {
        "device": device_name(device),
        **(_gpu(device) if device.type == "cuda" else {"threads": torch.get_num_threads()}),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "versions": versions(),
        **_commit(),
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"torch": torch.__version__}


def _gpu(device: torch.device) -> dict:
    p = torch.cuda.get_device_properties(device)
    return {
        "compute_capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "memory_gb": round(p.total_memory / 1e9, 1),
        "l2_mb": round(getattr(p, "L2_cache_size", 0) / 1e6, 1),
        "cuda": torch.version.cuda,
    }


def _commit() -> dict:
    """The checkout's commit and whether the measured sources differ from it; None without git."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain", "--", *SOURCES)
    return {"commit": git("rev-parse", "HEAD"), "modified": None if status is None else bool(status)}
