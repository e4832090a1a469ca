"""Package layout and the CUDA extension.

`triton_kernels/` stays a top-level folder and installs as `llama_smop.triton_kernels`: a top-level import name
`triton_kernels` belongs to other distributions already.

LLAMA_SMOP_BUILD_CUDA decides about the extension `llama_smop._C` (csrc/README.md): "auto" (the default) builds it where
nvcc, pybind11 and ninja are found and installs pure Python elsewhere; "1" demands it; "0" leaves it out. A compile that
fails is an error. One line says what was built (pip shows it with -v).

The machine may have the setuptools of a fresh Python and no network (`--no-build-isolation`): 64 or later will do.
"""

import os
import shutil
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
_spec = spec_from_file_location("llama_smop_csrc_build", ROOT / "csrc" / "build.py")
csrc = module_from_spec(_spec)
_spec.loader.exec_module(csrc)


class BuildCuda(build_ext):
    """Hands the extension to ninja; objects stay under build/ so that a second install compiles what changed."""

    def build_extension(self, ext: Extension) -> None:
        archs = csrc.requested_archs()
        python = f"cp{sys.version_info.major}{sys.version_info.minor}"
        build_dir = ROOT / "build" / f"cuda-{python}-{archs.replace(';', '-')}"
        nvcc = csrc.find_nvcc()
        csrc.build(nvcc, build_dir, {"static": Path(self.get_ext_fullpath(ext.name)).resolve()}, archs)
        say(f"the CUDA extension is built for sm_{archs.replace(';', ', sm_')} with {nvcc}")


def say(line: str) -> None:
    print(f"llama_smop: {line}", file=sys.stderr, flush=True)


def building() -> bool:
    """Whether this run installs something; the others ask for metadata."""
    return bool({"bdist_wheel", "editable_wheel", "build_ext", "develop"} & set(sys.argv))


def missing_tool() -> str | None:
    """What the extension cannot be built for want of, with the remedy."""
    if csrc.find_nvcc() is None:
        return "no nvcc: set CUDA_HOME or put nvcc on PATH"
    absent = [] if find_spec("pybind11") else ["pybind11"]
    absent += [] if find_spec("ninja") or shutil.which("ninja") else ["ninja"]
    return f"nvcc, but no {' and no '.join(absent)}: pip install {' '.join(absent)}" if absent else None


def cuda_extensions() -> list[Extension]:
    choice = os.environ.get("LLAMA_SMOP_BUILD_CUDA", "auto").lower()
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f'LLAMA_SMOP_BUILD_CUDA must be "0", "1" or "auto", got {choice!r}')
    if choice == "0":
        return []
    missing = missing_tool()
    if missing and choice == "1":
        raise SystemExit(f"LLAMA_SMOP_BUILD_CUDA=1, but there is {missing}")
    if missing:
        if building():
            say(f"installing without the CUDA extension; there is {missing} (csrc/README.md)")
        return []
    files = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").iterdir() if p.is_file())
    return [Extension("llama_smop._C", sources=[], depends=files)]


def version_of_setuptools() -> tuple[int, ...]:
    return tuple(int(part) for part in setuptools.__version__.split(".")[:2])


def check_setuptools() -> None:
    """An error that can be read, in place of those that an older setuptools ends in."""
    have = version_of_setuptools()
    if have < (64,):
        raise SystemExit(f"setuptools {setuptools.__version__} is too old: pip install 'setuptools>=64' wheel")
    if have < (70, 1) and find_spec("wheel") is None:
        raise SystemExit(f"setuptools {setuptools.__version__} needs the package wheel beside it: pip install wheel")


def license_field() -> dict[str, str]:
    """setuptools knows licence expressions since 77, and refuses the older form from pyproject.toml some time after."""
    return {"license_expression" if version_of_setuptools() >= (77,) else "license": "Apache-2.0"}


check_setuptools()
setup(
    packages=[
        *find_packages(include=["llama_smop", "llama_smop.*"], exclude=["llama_smop.triton_kernels"]),
        "llama_smop.triton_kernels",
    ],
    package_dir={"llama_smop.triton_kernels": "triton_kernels"},
    ext_modules=cuda_extensions(),
    cmdclass={"build_ext": BuildCuda},
    **license_field(),
)
