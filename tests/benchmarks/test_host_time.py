"""The host-time benchmark: that it runs without a kernel, and that the document shows what was kept."""

import shutil

import pytest

from benchmarks import host_time, results
from benchmarks.environment import ROOT
from benchmarks.report import host_time as report
from llama_smop.triton_kernels.launch import Launch

DOCUMENT = ROOT / "docs" / "performance.md"


def test_a_step_is_forward_and_backward_of_replayed_launches(monkeypatch):
    worked_out = []
    run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda launch: worked_out.append(launch.name) or run(launch))
    monkeypatch.setattr(host_time, "WARM_UP", 2)
    found = host_time.child(steps=3)
    assert 0 < found["forward"][0] <= found["forward"][1] and 0 < found["both"][0] <= found["both"][1]
    forward, backward = 5, 7
    assert len(worked_out) == 2 * forward + 2 * backward, "the first two calls of either are worked out, no later one"


def test_a_revision_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="no-such-revision"):
        host_time.run(tmp_path / "out.json", against=("no-such-revision",), quick=True)


def test_the_document_shows_the_kept_results(tmp_path):
    copy = tmp_path / "performance.md"
    shutil.copy(DOCUMENT, copy)
    report.update(copy, [results.load(path) for path in sorted(results.FOLDER.glob("host_time/*.json"))])
    assert copy.read_text() == DOCUMENT.read_text(), "python -m benchmarks report"
