"""A GPU that has few tokens waits for the host: little of this package's Python runs before the first launch."""

import sys
from pathlib import Path

import pytest
import torch

import llama_smop
from llama_smop.ops import dispatch, trust
from llama_smop.projector import SMoPProjector
from llama_smop.triton_kernels.launch import Launch, recording
from tests.kernels.targets import CompileOnly, driven_by

PACKAGE = str(Path(llama_smop.__file__).parent)


class CpuAsGpu(CompileOnly):
    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def calls_before_the_first_launch(function, *args) -> list[str]:
    """Names of the package's functions that ran, in order; generators count once a value."""
    calls, launched = [], []

    def watch(frame, event, _):
        launched.extend([True] if frame.f_code is Launch.run.__code__ else [])
        if event == "call" and not launched and frame.f_code.co_filename.startswith(PACKAGE):
            calls.append(f"{Path(frame.f_code.co_filename).name}: {frame.f_code.co_name}")

    sys.setprofile(watch)
    try:
        function(*args)
    finally:
        sys.setprofile(None)
    assert launched, "nothing was launched"
    return calls


@pytest.mark.parametrize("backend", ("triton", "auto"))
@pytest.mark.parametrize("gradients", (True, False))
def test_few_calls_before_the_first_launch(gradients, backend, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(trust, "known", {})
    monkeypatch.setattr(dispatch, "_auto_candidates", lambda device: dispatch.BACKENDS_BY_SPEED)  # as on a GPU
    projector = SMoPProjector(48, 64, 40, num_experts=4, top_k=2, sharing="DEDR", backend=backend)
    tokens = torch.randn(100, 48), torch.zeros(100, dtype=torch.int32), torch.ones(100, dtype=torch.bool)
    with driven_by(CpuAsGpu(90)), recording(execute=False), torch.set_grad_enabled(gradients):
        projector(*tokens)  # the first call also asks the driver
        calls = calls_before_the_first_launch(projector.forward, *tokens)
    assert calls[0] == "projector.py: forward"
    assert len(calls) < 30, "\n".join(calls)
