"""The CUDA extension over a CUDA runtime that launches nothing (no_launches.cpp), for what the host does by itself.

It is the extension of the tests, which is linked with whatever CUDA runtime is in the process, and compiled once.
"""

import ctypes
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType

import torch

SOURCE = Path(__file__).with_suffix(".cpp")


def missing() -> str | None:
    """Why it cannot be made here, or None when it can."""
    from tests.cuda import extension

    if torch.version.cuda is not None:
        return "this torch has a CUDA runtime of its own"
    return extension.missing()


def extension() -> ModuleType:
    from tests.cuda import extension as built

    path = built.path("shared")
    with tempfile.TemporaryDirectory() as folder:
        ctypes.CDLL(str(_runtime(built.csrc.find_nvcc(), Path(folder))), mode=ctypes.RTLD_GLOBAL)
    return built.load("llama_smop_no_launches._C", path)


def _runtime(nvcc: Path, folder: Path) -> Path:
    """Under the name of the real one and the version of its symbols, by which the loader takes it for that."""
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    name = f"libcudart.so.{version.split('release ')[1].split('.')[0]}"
    versions = folder / "versions"
    versions.write_text(f"{name} {{ global: *; }};")
    linked = ["-Xlinker", f"-soname={name},--version-script={versions}"]
    command = [nvcc, "-shared", "-cudart", "none", "-Xcompiler", "-fPIC", *linked, SOURCE, "-o", folder / name]
    subprocess.run([str(part) for part in command], check=True)
    return folder / name
