"""The extension as the tests want it: warnings and spills are errors, machine code and PTX for both architectures.

One compilation serves two modules: "static" is linked as a release is; "shared" takes the CUDA runtime that is in the
process, so that ptxrun's stand-in can run its kernels on the CPU. Kept in build/ under the hash of the sources.
"""

import fcntl
import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from tests import ptxrun_support

ARCHS = "80;90a"
REPOSITORY = Path(__file__).resolve().parents[2]


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


csrc = load("llama_smop_csrc_build", REPOSITORY / "csrc" / "build.py")


def missing() -> str | None:
    """Why the extension cannot be compiled here, or None when it can."""
    return None if csrc.find_nvcc() else "no nvcc: set CUDA_HOME or put it on PATH"


def missing_for_ptx() -> str | None:
    """Why its kernels cannot be run on the CPU here, or None when they can."""
    if torch.version.cuda is not None:
        return "this torch has a CUDA runtime of its own, whose place the stand-in would take"
    return missing() or ptxrun_support.missing()


@cache
def path(linkage: str) -> Path:
    """The module linked with the "static" or the "shared" CUDA runtime, compiled on first use."""
    build_dir = REPOSITORY / "build" / "cuda-tests" / csrc.sources_hash()
    outputs = {kind: build_dir / kind / csrc.MODULE for kind in ("static", "shared")}
    build_dir.mkdir(parents=True, exist_ok=True)
    with open(build_dir / ".lock", "w") as lock:  # test workers share the build
        fcntl.flock(lock, fcntl.LOCK_EX)
        csrc.build(csrc.find_nvcc(), build_dir, outputs, ARCHS, embed_ptx=True, strict=True)
    return outputs[linkage]


@cache
def static() -> ModuleType:
    return load("llama_smop_static._C", path("static"))


@cache
def on_ptxrun() -> ModuleType:
    """The shared module over ptxrun's CUDA runtime, which has to be in the process first."""
    ptxrun_support.load("ptxrun.cuda").install()
    return load("llama_smop_ptxrun._C", path("shared"))


if __name__ == "__main__":  # so that `make test` compiles on all cores first, not one test worker while others wait
    print(f"the extension for the tests: {missing() or path('static')}")
