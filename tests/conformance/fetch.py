"""transformers' own common tests, of the installed version, from its source distribution; none of it is kept here."""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

PACKAGE = "transformers_tests"
# What the tests import and the distribution lacks, as empty stand-ins: it is in transformers' repository only.
STAND_INS = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "fetch_hub_objects_for_ci.py": "def url_to_local_path(url, return_url_if_not_found=True):\n    return url\n",
}


def common_tests(build: Path) -> Path:
    """The folder that holds the package `transformers_tests`; downloaded where it is not there yet."""
    folder = build / version("transformers")
    if not (folder / PACKAGE).is_dir():
        build.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=build) as aside:
            _unpack(Path(aside))
            shutil.rmtree(folder, ignore_errors=True)
            Path(aside).rename(folder)
            Path(aside).mkdir()  # for its own removal
    return folder


def _unpack(folder: Path) -> None:
    # From pip's index, as the version is pinned there; its build is not run.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    wanted = f"transformers=={version('transformers')}"
    subprocess.run([*command, "--no-build-isolation", wanted, "--dest", str(folder)], check=True)
    (archive,) = folder.glob("transformers-*.tar.gz")
    with tarfile.open(archive) as files:
        members = [m for m in files.getmembers() if m.isfile() and m.name.split("/")[1] == "tests"]
        files.extractall(folder, members, filter="data")
    (unpacked,) = folder.glob("transformers-*/tests")
    unpacked.rename(folder / PACKAGE)
    for name, text in STAND_INS.items():
        place = folder / PACKAGE / name
        if not place.exists():
            place.parent.mkdir(exist_ok=True)
            place.write_text(text)
    for package in {folder / PACKAGE, *(p.parent for p in (folder / PACKAGE).rglob("*.py"))}:
        (package / "__init__.py").touch()
    archive.unlink()
    shutil.rmtree(folder / archive.name.removesuffix(".tar.gz"))
