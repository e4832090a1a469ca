"""The memory benchmark: that it runs, and what its table and its kept results say."""

from pathlib import Path

import pytest
import torch

from benchmarks import results, training_memory
from benchmarks.report.training_memory import table
from llama_smop.models import lm_loss


@pytest.mark.slow
def test_it_measures_every_case_and_the_table_has_them(tmp_path, monkeypatch):
    """In this process, which is quicker; what it measures there depends on what the allocator kept from before."""
    monkeypatch.setattr(training_memory, "_in_a_child", training_memory.child)
    monkeypatch.setattr(lm_loss, "CHUNK", lm_loss.CHUNK)  # a case sets it for its process
    path = tmp_path / "memory.json"
    training_memory.run(path, quick=True, say=lambda line: None)
    found = results.load(path)
    assert all(case["model_bytes"] > 0 and case["estimated_bytes"] > 0 for case in found["cases"])
    assert [row[0] for row in table(found).rows] == [name for name, _ in training_memory.CASES]


def test_the_peak_of_resident_memory_is_measured():
    size = 64 << 20
    Path("/proc/self/clear_refs").write_text("5")
    before = training_memory._resident("VmRSS")
    torch.ones(size, dtype=torch.uint8)  # held and given back
    grown = training_memory._resident("VmHWM") - before
    assert 0.9 * size < grown < 1.5 * size, f"{grown} bytes measured where {size} were held"


def test_a_case_that_fails_says_what_the_process_said(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho out of luck >&2\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(training_memory.sys, "executable", str(python))
    with pytest.raises(ValueError, match=r"the case {'recompute': 'hz'} ended with status 3: out of luck"):
        training_memory._in_a_child({"recompute": "hz"}, quick=True)


@pytest.mark.slow
def test_a_case_runs_in_a_process_of_its_own():
    found = training_memory._in_a_child({"recompute": "hz"}, quick=True)
    assert found["model_bytes"] > 0 and found["peak_bytes"] > 0
    with pytest.raises(ValueError, match="recompute must be one of"):
        training_memory._in_a_child({"recompute": "everything"}, quick=True)


@pytest.mark.parametrize("path", sorted(training_memory.FOLDER.glob("*.json")), ids=lambda p: p.stem)
def test_in_the_kept_results_each_measure_saves_memory_and_as_much_as_estimated(path):
    """What the libraries and the allocator hold besides is the same in all cases."""
    cases = results.load(path)["cases"]
    resident, estimated = ([case[name] for case in cases] for name in ("peak_bytes", "estimated_bytes"))
    assert resident == sorted(resident, reverse=True)
    for i in (1, 2):  # the two that concern the logits
        assert resident[0] - resident[i] == pytest.approx(estimated[0] - estimated[i], rel=0.1), cases[i]["case"]
