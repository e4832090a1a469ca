"""The table of versions in docs/integrations.md is what `make test-versions` counted last."""

import tomllib

from benchmarks.report.performance import update
from tests.versions.areas import AREAS, DOCUMENT, MARKS, RESOLUTIONS, RESULTS, ROOT, area_of, read, table

FOUND = {
    name: {
        "date": "2026-01-01",
        "versions": dict.fromkeys(
            ("torch", "triton", "transformers", "accelerate", "peft", "torchao", "numpy", "kernels"), "1"
        ),
        "areas": {area: {"passed": 2, "skipped": number % 2} for number, area in enumerate(AREAS)},
    }
    for name in RESOLUTIONS.values()
}


def test_the_document_shows_what_was_counted():
    shown = DOCUMENT.read_text().split(MARKS[0])[1].split(MARKS[1])[0].strip()
    assert shown == (table(read()).strip() if RESULTS.exists() else ""), "run make test-versions"


def test_what_was_counted_is_of_the_versions_that_are_allowed():
    if not RESULTS.exists():
        return
    found = read()
    assert list(found) == list(RESOLUTIONS.values())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    allowed = [
        *project["dependencies"],
        *(line for lines in project["optional-dependencies"].values() for line in lines),
    ]
    lowest = dict(line.split(",")[0].split(">=") for line in allowed if ">=" in line)
    for package, version in found["lowest"]["versions"].items():
        if package in lowest:
            assert version.split(".")[: lowest[package].count(".") + 1] == lowest[package].split("."), package
    for name, result in found.items():
        assert result["areas"].keys() == AREAS.keys() and all(n["passed"] for n in result["areas"].values()), name


def test_every_path_of_an_area_exists_and_a_file_is_of_the_nearest():
    assert [path for paths in AREAS.values() for path in paths if not (ROOT / path).exists()] == []
    assert area_of("tests/models/test_generation.py") == "`generate`"
    assert area_of("tests/ops/test_trust.py").startswith("Projector and operators")


def test_the_table_stands_between_the_marks_alone(tmp_path):
    document = tmp_path / "page.md"
    document.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n")
    assert update(document, table(FOUND), *MARKS)
    lines = document.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    assert "| | lowest (2026-01-01) | newest (2026-01-01) |" in lines and "| torch | 1 | 1 |" in lines
    assert (
        "| `generate` | 2 passed, 1 skipped | 2 passed, 1 skipped |" in lines
        or "| `generate` | 2 passed | 2 passed |" in lines
    )
