"""The committed predictions and the bytes beside them: consistent, marked as predicted, and what the document shows."""

import shutil

import pytest

from benchmarks import layer_memory, predictions, results
from benchmarks.environment import ROOT
from benchmarks.report import predicted, tables

DOCUMENT = ROOT / "docs" / "performance.md"


def test_a_pass_is_its_launches_a_gap_each_and_a_start():
    found = predictions.load()
    of = {(p["backend"], p["compiler"]) for p in found["passes"]}
    assert of == {
        *(("triton", version) for version in found["compilers"]["triton"]),
        ("cuda", found["compilers"]["nvcc"]),
    }
    for one in found["passes"]:
        launches = one["launches"]
        assert {launch["part"] for launch in launches} <= predicted.PARTS.keys()
        for total, counted in (
            ("forward_us", [launch for launch in launches if launch["pass"] == "forward"]),
            ("both_us", launches),
        ):
            spent = found["graph_start_us"] + sum(launch["us"] for launch in counted)
            gaps = (found["gap_us"]["dependent" if launch["dependent"] else "ordinary"] for launch in counted)
            assert one[total] == pytest.approx(spent + sum(gaps), abs=0.1)
        ordinary = [launch["part"] for launch in launches if not launch["dependent"]]
        assert ordinary == ["router", "h = act(x·W1)", "combine, backward", "router, backward"], "an operator's first"


def test_multicast_saves_time_where_there_are_clusters():
    """Few tokens are one round of tiles, for blocks alone."""
    for one in predictions.load()["passes"]:
        if one["backend"] == "cuda":
            for total, counted in one["copies_counted"].items():
                few = one["workload"]["tokens"] <= 256
                assert one[total] == counted if few else one[total] < counted


def test_what_is_recomputed_lowers_the_peak_by_as_much_as_what_is_kept():
    for tokens in layer_memory.TOKENS:
        cases = {c["recompute"]: c for c in results.load(layer_memory.PATH)["cases"] if c["tokens"] == tokens}
        most = cases.pop("none")
        for recompute, case in cases.items():
            saved = most["kept_bytes"] - case["kept_bytes"]
            assert saved >= len(recompute) * tokens * 2 * 2048 * 2, "choices × columns × bytes"
            assert most["peak_bytes"] - case["peak_bytes"] >= saved


def test_the_document_shows_the_committed_predictions(tmp_path):
    copy = tmp_path / "docs" / "performance.md"
    copy.parent.mkdir()
    shutil.copy(DOCUMENT, copy)
    picture = tmp_path / predictions.PREDICTED.parent.relative_to(ROOT) / predicted.PICTURE
    predicted.update(copy, predictions.load(), results.load(layer_memory.PATH), picture)
    assert copy.read_text() == DOCUMENT.read_text(), "python -m benchmarks report"
    assert "Predicted by a model" in copy.read_text() and (predictions.PREDICTED.parent / predicted.PICTURE).exists()


def test_what_a_pass_waits_for_is_all_of_it():
    found = predictions.load()
    for one, (_, *spent, _) in zip(found["passes"], predicted.limits(found).rows, strict=True):
        assert sum(float(us) for us in spent if us != "–") == pytest.approx(one["both_us"], abs=0.5 * len(spent))


def test_launches_are_shown_beside_their_prediction():
    record = {"question": "q", "workload": "w", "backend": "cuda", "launch": "dh", "median_us": 150.0}
    found = results.new("gpu") | {"predictions": [record | {"predicted_us": 120.0}, record | {"predicted_us": None}]}
    known, unknown = tables.predictions(found).rows
    assert known[-3:] == ["150", "120", "+25%"] and unknown[-2:] == ["–", "–"]
    assert tables.predictions(results.new("gpu")) is None
