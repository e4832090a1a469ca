"""`python -m tests.conformance [--all] [VARIANT...]`: transformers' common tests on this model.

What they do is compared with what is expected:
expected.json names every test that is skipped, by its reason, and every test that fails, with why that is right. A test
that does something else is an error, also one that has begun to pass. --write keeps what was found: the reasons of new
failures are to be filled in.
"""

import argparse
import json
import os
import re
import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.conformance.fetch import PACKAGE, common_tests

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EXPECTED = HERE / "expected.json"
# Between them they have both towers, each projector, and every head; the others with --all.
USUAL = ("AudioVisual", "Video", "Dense", "Ctc", "Config", "Processor")
UNEXPLAINED = "to be explained"


class Results:
    """A pytest plugin that keeps the worst outcome of each test, with the reason of skips."""

    def __init__(self) -> None:
        self.outcomes: dict[str, tuple[str, str]] = {}

    def pytest_runtest_logreport(self, report) -> None:
        name = "::".join(report.nodeid.split("::")[1:])
        known = self.outcomes.get(name, ("passed", ""))[0]
        if report.failed:
            self.outcomes[name] = ("failed", "")
        elif report.skipped and known != "failed":
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.outcomes[name] = (
                "skipped",
                re.sub(r"<class '[\w.]+\.(\w+)'>", r"\1", reason.removeprefix("Skipped: ")),
            )
        elif known == "passed":
            self.outcomes[name] = ("passed", "")


def expected() -> dict[str, tuple[str, str]]:
    """Outcome and reason of every test that does not pass."""
    kept = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {"skipped": {}, "failed": {}}
    tests: dict[str, tuple[str, str]] = {}
    for outcome in ("skipped", "failed"):
        for reason, names in kept[outcome].items():
            tests |= {name: (outcome, reason) for test in names for name in _spelt_out(test)}
    return tests


def write(found: dict[str, tuple[str, str]]) -> None:
    """Keep what was found, with the reasons of failures that are known already."""
    before = expected()
    ran = {name.split("::")[0] for name in found}
    found = {name: outcome for name, outcome in before.items() if name.split("::")[0] not in ran} | found
    kept: dict[str, dict[str, list[str]]] = {"skipped": defaultdict(list), "failed": defaultdict(list)}
    by_test: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for name, (outcome, reason) in sorted(found.items()):
        if outcome == "failed":
            old = before.get(name, ("", ""))
            reason = old[1] if old[0] == "failed" else UNEXPLAINED
        if outcome != "passed":
            variant, test = name.split("::")
            by_test[outcome, reason, test].append(variant)
    for (outcome, reason, test), variants in by_test.items():
        kept[outcome][reason].append(f"{' '.join(variants)}::{test}")
    EXPECTED.write_text(json.dumps({"transformers": version("transformers"), **kept}, indent=1) + "\n")


def _spelt_out(test: str) -> list[str]:
    variants, name = test.split("::")
    return [f"{variant}::{name}" for variant in variants.split()]


def differences(found: dict[str, tuple[str, str]], wanted: dict[str, tuple[str, str]]) -> list[str]:
    """A line for each test that did not do what is expected of it."""
    lines = []
    for name, (outcome, _) in sorted(found.items()):
        should, why = wanted.get(name, ("passed", ""))
        if outcome != should:
            lines.append(f"{name}: {outcome}, expected {should}" + (f" ({why})" if why else ""))
        elif why == UNEXPLAINED:
            lines.append(f"{name}: fails, and {EXPECTED.name} does not say why that is right")
    ran = {name.split("::")[0] for name in found}
    gone = sorted(name for name in wanted if name not in found and name.split("::")[0] in ran)
    return lines + [f"{name}: is no test any more" for name in gone]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("variants", nargs="*", help=f"classes of variants.py; by default {', '.join(USUAL)}")
    parser.add_argument("--all", action="store_true", help="every variant")
    parser.add_argument("--write", action="store_true", help="keep what is found as what is expected")
    parser.add_argument("--workers", type=int, default=2, help="processes, 2 by default")
    arguments = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    folder = common_tests(ROOT / "build" / "conformance")
    path = [str(folder), str(folder / PACKAGE)]
    sys.path[:0] = path
    os.environ["PYTHONPATH"] = os.pathsep.join([*path, str(ROOT)])  # of the worker processes
    options = ["-c", str(HERE / "settings.ini"), "--rootdir", str(ROOT), "-q", f"-n{arguments.workers}", "--tb=short"]
    options += ["--no-summary", "--no-header"]
    chosen = [""] if arguments.all else [f"::{name}" for name in arguments.variants or USUAL]
    results = Results()
    code = pytest.main([*options, *(f"{HERE / 'variants.py'}{name}" for name in chosen)], plugins=[results])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or not results.outcomes:
        print(f"the tests did not run (pytest says {code!r})")
        return 1
    if arguments.write:
        write(results.outcomes)
    lines = differences(results.outcomes, expected())
    print("\n".join(lines))
    counts = [sum(o == outcome for o, _ in results.outcomes.values()) for outcome in ("passed", "failed", "skipped")]
    print("{} passed, {} failed, {} skipped; ".format(*counts), end="")
    print(f"{len(lines)} are not as {EXPECTED.relative_to(ROOT)} expects" if lines else "all as expected")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
