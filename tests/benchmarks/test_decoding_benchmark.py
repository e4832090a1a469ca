"""The benchmark of decoding: that it runs, and that docs/integrations.md shows what was kept."""

import shutil

import pytest

from benchmarks import decoding, results
from benchmarks.report.decoding import table, update
from tests.test_readme import ROOT

DOCUMENT = ROOT / "docs" / "integrations.md"


@pytest.mark.slow
def test_every_way_is_measured_and_shown(tmp_path):
    found = decoding.run(tmp_path / "decoding.json", quick=True, say=lambda line: None)
    assert results.load(tmp_path / "decoding.json") == found
    head, *rows = table(found).rows
    assert head[0].startswith("**the demo's, 0.4")
    assert [row[0] for row in rows] == list(decoding.WAYS)
    assert rows[0][2] == "1.00×" and [bool(row[3]) for row in rows] == [False, False, True, True, True]


@pytest.mark.slow
def test_a_way_that_writes_other_tokens_is_an_error(tmp_path, monkeypatch):
    from transformers import GenerationMixin

    real = GenerationMixin.generate
    monkeypatch.setattr(GenerationMixin, "generate", lambda self, **k: real(self, **k) + ("cache_implementation" in k))
    with pytest.raises(ValueError, match="static cache: other tokens than with the growing cache"):
        decoding.run(tmp_path / "decoding.json", quick=True, say=lambda line: None)
    assert not (tmp_path / "decoding.json").exists()


def test_speeds_are_medians_beside_that_of_the_default():
    ways = [
        {"way": way, "seconds": [seconds, seconds, 9.0], "compiling_s": compiling}
        for way, seconds, compiling in zip(
            decoding.WAYS, (2.0, 2.0, 0.5, 1.0, 4.0), (None, None, 30.0, 10.0, 99.0), strict=True
        )
    ]
    where = {"device": "A CPU", "threads": 1, "versions": {"torch": "2", "transformers": "5"}, "date": "2026-01-01"}
    loads = {"load_average": 0.1, "load_average_after": 0.2}
    models = [{"model": "small", "parameters": 2_000_000, "ways": ways}]
    shown = table({"environment": where | loads, "new_tokens": 64, "rounds": 3, "models": models}).rows
    assert [row[1].split(" ± ")[0] for row in shown[1:]] == ["32.0", "32.0", "128", "64.0", "16.0"]
    assert [row[2] for row in shown[1:]] == ["1.00×", "1.00×", "4.00×", "2.00×", "0.50×"]
    assert [row[3] for row in shown[1:]] == ["", "", "30.0", "10.0", "99.0"]


def test_the_document_shows_what_was_kept(tmp_path):
    copy = tmp_path / DOCUMENT.name
    shutil.copy(DOCUMENT, copy)
    assert update(copy, sorted(decoding.FOLDER.glob("*.json"))), "no place between markers"
    assert copy.read_text() == DOCUMENT.read_text(), "python -m benchmarks report"


@pytest.mark.parametrize("path", sorted(decoding.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_the_kept_results_are_of_all_models_and_ways(path):
    found = results.load(path)
    assert [model["model"] for model in found["models"]] == list(decoding.MODELS)
    for model in found["models"]:
        assert [way["way"] for way in model["ways"]] == list(decoding.WAYS)
        assert all(len(way["seconds"]) == found["rounds"] >= 5 for way in model["ways"])
