"""The package's own metadata under the setuptools of a fresh Python 3.11, as `--no-build-isolation` meets it.

Nothing is downloaded: the wheel that Python itself carries for new environments is unpacked.
"""

import ensurepip
import os
import re
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> Path:
    """A folder with that setuptools, to go first on the path."""
    bundled = sorted(Path(ensurepip.__file__).parent.glob("_bundled/setuptools-*.whl"))
    if not bundled:
        pytest.skip(f"Python {sys.version_info.major}.{sys.version_info.minor} carries no setuptools of its own")
    folder = tmp_path_factory.mktemp("setuptools")
    zipfile.ZipFile(bundled[0]).extractall(folder)
    return folder


def setup(path: list[Path], *command: str, isolated: bool = False) -> subprocess.CompletedProcess:
    """`python setup.py COMMAND`; isolated: without the packages of this environment."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "LLAMA_SMOP_BUILD_CUDA": "0"}
    options = ["-S"] if isolated else []
    return subprocess.run(
        [sys.executable, *options, "setup.py", "-q", *command], cwd=REPOSITORY, env=env, capture_output=True, text=True
    )


def metadata(folder: Path, done: subprocess.CompletedProcess):
    assert done.returncode == 0, done.stderr
    return message_from_string(next(folder.glob("*.egg-info/PKG-INFO")).read_text())


def test_the_setuptools_of_a_fresh_python_reads_the_licence(fresh, tmp_path):
    (tmp_path / "stub" / "wheel").mkdir(parents=True)
    (tmp_path / "stub" / "wheel" / "__init__.py").touch()
    done = setup([fresh, tmp_path / "stub"], "egg_info", "--egg-base", str(tmp_path), isolated=True)
    found = metadata(tmp_path, done)
    assert found["Name"] == "llama-smop" and found["License"] == "Apache-2.0"
    assert found["License-File"] == "LICENSE"


def test_without_wheel_it_says_what_is_missing(fresh, tmp_path):
    done = setup([fresh], "egg_info", "--egg-base", str(tmp_path), isolated=True)
    assert done.returncode != 0
    assert "needs the package wheel beside it: pip install wheel" in done.stderr.splitlines()[-1]


def test_todays_setuptools_states_a_licence_expression(tmp_path):
    setuptools = pytest.importorskip("setuptools", minversion="77")
    found = metadata(tmp_path, setup([], "egg_info", "--egg-base", str(tmp_path)))
    assert found["License-Expression"] == "Apache-2.0", setuptools.__version__
    assert found["License-File"] == "LICENSE"


def test_nvcc_without_what_compiles_the_binding_still_installs(fresh, tmp_path):
    """A GPU machine without a network: no pybind11 and no ninja, and a line that says so."""
    for name in ("nvcc", "stub/wheel/__init__.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(0o755)
    env = {"PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join(map(str, (fresh, tmp_path / "stub")))}
    for choice, ends_well in (("auto", True), ("1", False)):
        command = [sys.executable, "-S", "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / choice)]
        done = subprocess.run(
            command, cwd=REPOSITORY, env=env | {"LLAMA_SMOP_BUILD_CUDA": choice}, capture_output=True, text=True
        )
        assert (done.returncode == 0) == ends_well, done.stderr
        assert done.stderr.count("no pybind11 and no ninja: pip install pybind11 ninja") == 1


def test_pre_commit_has_the_ruff_of_the_environment():
    (pinned,) = re.findall(r"^ruff==.*$", (REPOSITORY / "constraints.txt").read_text(), re.M)
    assert set(re.findall(r"ruff==[\d.]+", (REPOSITORY / ".pre-commit-config.yaml").read_text())) == {pinned}
