"""The benchmark's stages on "cuda", at the sizes of a dry run: every case ends well."""

import sys

import pytest
import torch

from benchmarks import gpu
from tests.gpu_path.problems import STAND_IN

# What a stand-in for the device cannot show: other people's kernels on NVIDIA's libraries, the profiler, builds.
ELSEWHERE = {"build", "tests", "kernels", "tune"}


@pytest.mark.gpu
@pytest.mark.skipif(not STAND_IN, reason="on a GPU the benchmark itself is run: python -m benchmarks gpu")
def test_every_stage_at_tiny_sizes(tmp_path):
    names = [stage.name for stage in gpu.stages() if stage.name not in ELSEWHERE]
    worker = [sys.executable, "-m", "tests.gpu_path.benchmark_worker"]
    found = gpu.run(tmp_path, 1200, dry=True, only=names, command=worker, device="cuda", silence_s=600)
    log = (tmp_path / "log.txt").read_text()
    for name in names:
        state = found["stages"][name]
        assert state["status"] == "done" and not state["failed"], f"{name}: {state}\n{log[-3000:]}"
    assert torch.cuda.get_device_name() in str(found["environment"])
    launches = {r["backend"]: r for r in found["predictions"]}
    assert launches.keys() == {"triton", "cuda"} and all(r["median_us"] > 0 for r in found["predictions"])
    assert {r["backend"] for r in found["techniques"]} == {"triton", "cuda"}
    ours = [c for c in found["correctness"] if "triton" in c["backend"] or "cuda" in c["backend"]]
    assert ours and all(c["within"] for c in ours), ours
