"""What `python -m build` makes: a source distribution and wheels that work away from the checkout."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("build.env")  # a folder build/ answers to the name alone
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("llama_smop", "triton_kernels", "csrc")
BASE = """
import sys
from pathlib import Path
import torch
import llama_smop, llama_smop.triton_kernels
from llama_smop import SMoPProjector, functional
from llama_smop.integrations import replace_experts

assert Path(llama_smop.__file__).parents[1] == Path(sys.argv[1]), llama_smop.__file__
SMoPProjector(8, 16, 8)(torch.randn(5, 8), torch.zeros(5, dtype=torch.long))[0].sum().backward()
from llama_smop.training.compose import shipped
assert "recipe" in shipped()
"""


def build(folder: Path, *options: str, cuda: str) -> list[Path]:
    """Run it on a copy of what git would give, so that tests beside this one are not disturbed."""
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, source)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), *options, str(source)]
    environment = os.environ | {"LLAMA_SMOP_BUILD_CUDA": cuda}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return sorted((folder / "dist").iterdir())


def install(wheel: Path, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def run(code: str, installed: Path) -> subprocess.CompletedProcess:
    """With the wheel in place of the checkout; -S leaves out the link that an editable install made."""
    path = os.pathsep.join((str(installed), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-S", "-c", code, str(installed)]
    return subprocess.run(command, env=environment, cwd=installed.parent, capture_output=True, text=True)


def env(installed: Path) -> list[str]:
    """What `llama-smop env` prints."""
    done = run("from llama_smop.cli import main; main(['env'])", installed)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def on_cpu(lines: list[str], backend: str) -> str:
    """What `env` says of a backend on the CPU."""
    below = lines[next(i for i, line in enumerate(lines) if line.startswith("cpu: ")) + 1 :]
    return next(line for line in below if line.split()[0] == backend).split(None, 1)[1]


def test_a_source_distribution_and_a_pure_wheel(tmp_path):
    source, wheel = sorted(build(tmp_path, cuda="0"), key=lambda path: path.suffix)
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"llama_smop/py.typed", "llama_smop/triton_kernels/projection.py", "llama_smop/configs/recipe.yaml"} <= names
    assert not [name for name in names if name.startswith(("tests", "csrc", "benchmarks"))]
    with tarfile.open(source) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"csrc/api.h", "triton_kernels/projection.py", "NOTICE"} <= inside, "the extension is built from these"
    installed = install(wheel, tmp_path / "installed")
    done = run(BASE, installed)
    assert done.returncode == 0, done.stderr
    said = env(installed)
    assert not [line for line in said if line.startswith("CUDA extension")]
    assert on_cpu(said, "torch") == "serves"
    why = "cannot serve: the CUDA extension cannot be imported .*LLAMA_SMOP_BUILD_CUDA=1"
    assert re.match(why, on_cpu(said, "cuda"))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_a_wheel_with_the_extension_is_for_one_python_and_platform(tmp_path):
    (wheel,) = build(tmp_path, "--wheel", cuda="1")
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-{python}-{python}-{platform}.whl")
    installed = install(wheel, tmp_path / "installed")
    done = run(BASE + "from llama_smop.ops.backends.cuda_extension import extension\nextension()\n", installed)
    assert done.returncode == 0, done.stderr
    said = env(installed)
    (built,) = (line for line in said if line.startswith("CUDA extension: "))
    nvcc = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release ([\d.]+)", nvcc)[1]
    architectures = os.environ.get("LLAMA_SMOP_CUDA_ARCHS") or "80;90a"
    assert f"architectures {architectures}, nvcc {version}" in built, built
    assert on_cpu(said, "cuda") == "cannot serve: the CUDA extension needs a CUDA device, got cpu"
