"""`python -m tests.versions [lowest-direct] [highest]`: the wheel with other versions of what it needs.

The lowest that pyproject.toml allows, and the newest on the index.

Each in an environment of its own, which takes some 6 GB, from a folder without the checkout. With --write the counts go
into docs/versions.json, and from there into docs/integrations.md.
"""

import argparse
import datetime
import os
import platform
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from benchmarks.report.performance import update
from llama_smop.system import files
from tests.versions.areas import (
    AREAS,
    DOCUMENT,
    EXTRAS,
    MARKS,
    RESOLUTIONS,
    RESULTS,
    ROOT,
    SHOWN,
    TOOLS,
    area_of,
    read,
    table,
)

BUILD = ROOT / "build" / "versions"


def call(*command: str | Path, **settings) -> subprocess.CompletedProcess:
    settings["env"] = {k: v for k, v in settings.get("env", os.environ).items() if k != "PYTHONPATH"}  # the checkout
    return subprocess.run([str(word) for word in command], **{"check": True} | settings)


def make_wheel() -> Path:
    shutil.rmtree(BUILD / "dist", ignore_errors=True)
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "build.log", "w") as log:
        command = (sys.executable, "-m", "build", "--no-isolation", "--outdir", BUILD / "dist", ROOT)
        call(*command, env=os.environ | {"LLAMA_SMOP_BUILD_CUDA": "0"}, stdout=log, stderr=log)
    (wheel,) = (BUILD / "dist").glob("*.whl")
    return wheel


def make_environment(resolution: str, wheel: Path) -> Path:
    """Its Python."""
    folder = BUILD / resolution
    python = folder / "bin" / "python"
    install = (sys.executable, "-m", "uv", "pip", "install", "-q", "--python", python)
    call(sys.executable, "-m", "uv", "venv", "-q", "--clear", folder)
    extras = [word for extra in EXTRAS for word in ("--extra", extra)]
    call(*install, "--resolution", resolution, "-r", ROOT / "pyproject.toml", *extras, *TOOLS)
    call(*install, "--no-deps", wheel)
    return python


def run_tests(resolution: str, python: Path) -> dict[str, Counter]:
    """Outcomes by area. Output goes into build/versions."""
    away = BUILD / f"{resolution}-tests"
    shutil.rmtree(away, ignore_errors=True)
    for name in ("tests", "examples"):
        shutil.copytree(ROOT / name, away / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", away)
    code = "import llama_smop; print(llama_smop.__file__)"
    place = call(python, "-c", code, cwd=away, stdout=subprocess.PIPE, text=True).stdout
    if "site-packages" not in place:
        raise SystemExit(f"the wheel is not what was imported: {place}")
    report = BUILD / f"{resolution}.xml"
    report.unlink(missing_ok=True)
    paths = sorted({path for paths in AREAS.values() for path in paths})
    paths = [path for path in paths if not any(path.startswith(f"{other}/") for other in paths)]
    with open(BUILD / f"{resolution}.log", "w") as log:
        pytest = ["-m", "pytest", "-n2", "--dist", "loadgroup", "-o", "junit_family=xunit1"]
        command = (python, *pytest, f"--junitxml={report}", *paths)
        call(*command, cwd=away, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log, check=False)
    if not report.exists():
        raise SystemExit(f"the tests did not run; see {BUILD / f'{resolution}.log'}")
    counts: dict[str, Counter] = {area: Counter() for area in AREAS}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counts[area_of(case.get("file", ""))][outcome] += 1
    return counts


def versions(python: Path) -> dict[str, str]:
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    found = call(python, "-c", code, *SHOWN, stdout=subprocess.PIPE, text=True).stdout.split()
    return dict(zip(SHOWN, found, strict=True)) | {"python": platform.python_version()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.versions", description=__doc__)
    parser.add_argument("resolutions", nargs="*", choices=[[], *RESOLUTIONS], help="of uv; by default both")
    parser.add_argument("--keep", action="store_true", help="keep the environments, and use those that are there")
    parser.add_argument("--write", action="store_true", help="keep the counts in docs/, where all is well")
    arguments = parser.parse_args()
    wheel, failed = make_wheel(), False
    for resolution in arguments.resolutions or RESOLUTIONS:
        print(f"{resolution}: installing", flush=True)
        python = BUILD / resolution / "bin" / "python"
        if arguments.keep and python.exists():
            install = ("-m", "uv", "pip", "install", "-q", "--reinstall", "--no-deps", "--python")
            call(sys.executable, *install, python, wheel)
        else:
            python = make_environment(resolution, wheel)
        found = versions(python)
        print(f"{resolution}: testing with " + ", ".join(f"{n} {v}" for n, v in found.items()), flush=True)
        counts = run_tests(resolution, python)
        if not arguments.keep:
            shutil.rmtree(BUILD / resolution)
        for area, outcomes in counts.items():
            print(f"  {area}: " + ", ".join(f"{n} {outcome}" for outcome, n in outcomes.items()))
        wrong = [area for area, outcomes in counts.items() if outcomes["failed"] or not outcomes["passed"]]
        failed |= bool(wrong)
        if wrong:
            print(f"{resolution}: fails, see {BUILD / f'{resolution}.log'}")
        elif arguments.write:
            kept = read() if RESULTS.exists() else {}
            areas = {area: {o: outcomes[o] for o in ("passed", "skipped")} for area, outcomes in counts.items()}
            today = datetime.date.today().isoformat()
            kept[RESOLUTIONS[resolution]] = {"date": today, "versions": found, "areas": areas}
            files.write_json(RESULTS, {name: kept[name] for name in RESOLUTIONS.values() if name in kept})
            if len(kept) == len(RESOLUTIONS):
                update(DOCUMENT, table(read()), *MARKS)
    return failed


if __name__ == "__main__":
    sys.exit(main())
