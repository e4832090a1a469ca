"""The memory benchmark: that it runs, and what its table and its kept results say."""

import pytest

from benchmarks import results, training_memory
from benchmarks.report.training_memory import table


def test_it_measures_every_case_and_the_table_has_them(tmp_path, monkeypatch):
    monkeypatch.setattr(training_memory, "_in_a_child", training_memory.child)  # in this process, which is quicker
    path = tmp_path / "memory.json"
    training_memory.run(path, quick=True, say=lambda line: None)
    found = results.load(path)
    assert all(case["peak_bytes"] >= 0 and case["estimated_bytes"] > 0 for case in found["cases"])
    assert [row[0] for row in table(found).rows] == [name for name, _ in training_memory.CASES]


def test_a_case_that_fails_says_what_the_process_said():
    with pytest.raises(ValueError, match="recompute must be one of"):
        training_memory._in_a_child({"recompute": "everything"}, quick=True)


@pytest.mark.parametrize("path", sorted(training_memory.FOLDER.glob("*.json")), ids=lambda p: p.stem)
def test_in_the_kept_results_each_measure_saves_memory_and_the_estimate_is_near(path):
    cases = {case["case"]: case for case in results.load(path)["cases"]}
    resident = [cases[name]["peak_bytes"] for name, _ in training_memory.CASES[:4]]
    assert resident == sorted(resident, reverse=True)
    for name, case in cases.items():
        assert case["peak_bytes"] == pytest.approx(case["estimated_bytes"], rel=0.35), name
