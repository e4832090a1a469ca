"""The host-time benchmark: that it runs without a kernel, and that the document shows what was kept."""

import shutil

import pytest

from benchmarks import host_time, no_launches, results
from benchmarks.environment import ROOT
from benchmarks.report import host_time as report
from llama_smop.triton_kernels.launch import Launch

DOCUMENT = ROOT / "docs" / "performance.md"


def test_a_step_is_forward_and_backward_of_replayed_launches(monkeypatch):
    worked_out = []
    run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda launch: worked_out.append(launch.name) or run(launch))
    monkeypatch.setattr(host_time, "WARM_UP", 2)
    found = host_time.child("triton", steps=3)
    assert 0 < found["forward"][0] <= found["forward"][1] and 0 < found["both"][0] <= found["both"][1]
    forward, backward = 5, 7
    assert len(worked_out) == 2 * forward + 2 * backward, "the first two calls of either are worked out, no later one"


@pytest.mark.skipif(no_launches.missing() is not None, reason=str(no_launches.missing()))
def test_a_step_of_the_cuda_backend():
    """In a process of its own, which has no other CUDA runtime."""
    found = host_time._in_a_child(ROOT, "cuda", steps=3)
    assert 0 < found["forward"][0] < found["both"][0]


def test_a_revision_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="no-such-revision"):
        host_time.run(tmp_path / "out.json", against=("no-such-revision",), quick=True)


def test_rows_are_compared_with_this_version_of_triton():
    kept = results.load(sorted(results.FOLDER.glob("host_time/*.json"))[0])
    kept["cases"] = [
        {"revision": "0123abcd", "forward_us": 80.0, "both_us": 300.0},  # kept before there was a choice of backend
        {"revision": "", "backend": "triton", "forward_us": 70.0, "both_us": 200.0},
        {"revision": "", "backend": "cuda", "forward_us": 60.0, "both_us": 150.0},
    ]
    assert report.table(kept).rows == [
        ["Triton, at 0123abcd", "80", "300", "1.50×"],
        ["Triton, this version", "70", "200", "1.00×"],
        ["CUDA C++, this version", "60", "150", "0.75×"],
    ]


def test_the_document_shows_the_kept_results(tmp_path):
    copy = tmp_path / "performance.md"
    shutil.copy(DOCUMENT, copy)
    report.update(copy, [results.load(path) for path in sorted(results.FOLDER.glob("host_time/*.json"))])
    assert copy.read_text() == DOCUMENT.read_text(), "python -m benchmarks report"
