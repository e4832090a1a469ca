"""Compiles the extension with ninja: used by setup.py for the release and by the tests for their own variant.

Needs nvcc, g++, pybind11 and ninja; no GPU, no driver, no torch.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

CSRC = Path(__file__).resolve().parent
CUDA_SOURCES = (
    "gemm.cu", "grouped_gemm_sm80.cu", "router.cu", "schedule.cu", "router_bwd.cu", "combine_fwd.cu", "combine_bwd.cu",
    "bias_sums.cu", "rows.cu",
)  # fmt: skip
SM90A_SOURCE = "grouped_gemm_sm90.cu"
HOST_SOURCE = "bindings.cpp"
MODULE = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
# sm_80 code serves sm_86, sm_87 and sm_89 too; sm_90a code serves sm_90 alone.
DEFAULT_ARCHS = "80;90a"


def requested_archs() -> str:
    """LLAMA_SMOP_CUDA_ARCHS, or the default. Raises ValueError when it is not a list such as "80;90a"."""
    archs = os.environ.get("LLAMA_SMOP_CUDA_ARCHS") or DEFAULT_ARCHS
    if not re.fullmatch(r"\d+a?(;\d+a?)*", archs):
        raise ValueError(f'LLAMA_SMOP_CUDA_ARCHS must look like "80;90a", got {archs!r}')
    return archs


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME, else of PATH. Raises FileNotFoundError when CUDA_HOME is set and has none."""
    home = os.environ.get("CUDA_HOME")
    if home:
        nvcc = Path(home) / "bin" / "nvcc"
        if not nvcc.exists():
            raise FileNotFoundError(f"CUDA_HOME={home} has no bin/nvcc; unset it to use the nvcc on PATH")
        return nvcc
    found = shutil.which("nvcc")
    return Path(found) if found else None


def sources_hash() -> str:
    """Of everything a build depends on besides its options."""
    digest = hashlib.sha256(sys.version.encode())
    for path in sorted(p for p in CSRC.iterdir() if p.suffix in (".cu", ".cuh", ".h", ".cpp", ".py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def build(
    nvcc: Path, build_dir: Path, outputs: dict[str, Path], archs: str, embed_ptx: bool = False, strict: bool = False
) -> None:
    """Compile the sources once and link `outputs`: cudart linkage ("static" or "shared") → where the module goes.

    strict: warnings and register spills are errors.
    Raises RuntimeError with the compilers' output when a command fails.
    """
    build_dir.mkdir(parents=True, exist_ok=True)
    for path in outputs.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    (build_dir / "build.ninja").write_text(_ninja_file(nvcc, outputs, archs, embed_ptx, strict))
    ninja = [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else [shutil.which("ninja") or "ninja"]
    jobs = os.environ.get("MAX_JOBS")
    command = [*ninja, "-C", str(build_dir), *(["-j", jobs] if jobs else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"building the CUDA extension failed ({' '.join(command)}):\n{done.stdout}\n{done.stderr}")


def _ninja_file(nvcc: Path, outputs: dict[str, Path], archs: str, embed_ptx: bool, strict: bool) -> str:
    import pybind11

    targets = {arch: _target(arch, embed_ptx) for arch in archs.split(";")}
    sm90a = "90a" in targets
    files = {name: " ".join(targets.values()) for name in CUDA_SOURCES}
    if sm90a:
        files[SM90A_SOURCE] = targets["90a"]
    python_include = sysconfig.get_path("include")
    lines = [
        f"nvcc = {_escape(nvcc)}",
        f"nvcc_flags = -std=c++17 -O3 -DSMOP_HAS_SM90A={int(sm90a)} -Xcompiler -fPIC,-fvisibility=hidden"
        + (" -Werror all-warnings -Xptxas -warn-spills -Xcompiler -Wall,-Wextra" if strict else ""),
        f"cxx = {os.environ.get('CXX', 'g++')}",
        f"cxx_flags = -std=c++17 -O2 -fPIC -fvisibility=hidden -isystem {_escape(pybind11.get_include())} "
        f"-isystem {_escape(python_include)} '-DSMOP_ARCHS=\"{archs}\"'" + (" -Wall -Wextra -Werror" if strict else ""),
        "rule cuda",
        "  command = $nvcc $nvcc_flags $targets -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "rule cxx",
        "  command = $cxx $cxx_flags -DSMOP_CUDART='\"$cudart\"' -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "rule link",
        "  command = $nvcc -shared -cudart $cudart -Xcompiler -fPIC $in -o $out.tmp && mv $out.tmp $out",
    ]
    objects = [f"{name}.o" for name in files]
    for name, gencode in files.items():
        lines += [f"build {name}.o: cuda {_escape(CSRC / name)}", f"  targets = {gencode}"]
    for cudart, path in outputs.items():
        host = f"{HOST_SOURCE}.{cudart}.o"
        lines += [f"build {host}: cxx {_escape(CSRC / HOST_SOURCE)}", f"  cudart = {cudart}"]
        lines += [f"build {_escape(path)}: link {host} {' '.join(objects)}", f"  cudart = {cudart}"]
    return "\n".join(lines) + "\n"


def _target(arch: str, embed_ptx: bool) -> str:
    code = f"[sm_{arch},compute_{arch}]" if embed_ptx else f"sm_{arch}"
    return f"-gencode arch=compute_{arch},code={code}"


def _escape(path: Path | str) -> str:
    """A path in a build.ninja line."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
