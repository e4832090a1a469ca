"""Package layout and the CUDA extension.

`triton_kernels/` stays a top-level folder and installs as `llama_smop.triton_kernels`: a top-level import name
`triton_kernels` belongs to other distributions already.

LLAMA_SMOP_BUILD_CUDA decides about the extension `llama_smop._C` (csrc/README.md): "auto" (the default) builds it where
nvcc is found and installs pure Python elsewhere; "1" demands it; "0" leaves it out. A compile that fails is an error.
"""

import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

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
        csrc.build(csrc.find_nvcc(), build_dir, {"static": Path(self.get_ext_fullpath(ext.name)).resolve()}, archs)


def cuda_extensions() -> list[Extension]:
    choice = os.environ.get("LLAMA_SMOP_BUILD_CUDA", "auto").lower()
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f'LLAMA_SMOP_BUILD_CUDA must be "0", "1" or "auto", got {choice!r}')
    if choice == "0":
        return []
    if csrc.find_nvcc() is None:
        if choice == "1":
            raise SystemExit("LLAMA_SMOP_BUILD_CUDA=1 but there is no nvcc: set CUDA_HOME or put nvcc on PATH")
        if {"bdist_wheel", "editable_wheel", "build_ext"} & set(sys.argv):
            print(
                "llama_smop: no nvcc found, installing without the CUDA extension (see csrc/README.md)", file=sys.stderr
            )
        return []
    files = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").iterdir() if p.is_file())
    return [Extension("llama_smop._C", sources=[], depends=files)]


setup(
    packages=[
        *find_packages(include=["llama_smop", "llama_smop.*"], exclude=["llama_smop.triton_kernels"]),
        "llama_smop.triton_kernels",
    ],
    package_dir={"llama_smop.triton_kernels": "triton_kernels"},
    ext_modules=cuda_extensions(),
    cmdclass={"build_ext": BuildCuda},
)
