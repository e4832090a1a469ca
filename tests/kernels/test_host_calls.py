"""A GPU that has few tokens waits for the host: little of this package's Python runs before the first launch."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import llama_smop
from llama_smop.ops import dispatch, trust
from llama_smop.projector import SMoPProjector
from llama_smop.triton_kernels import launch
from llama_smop.triton_kernels.launch import Launch, recording
from tests.kernels.targets import CompileOnly, driven_by

PACKAGE = str(Path(llama_smop.__file__).parent)
KERNELS = str(Path(launch.__file__).parent)  # in a checkout a folder beside the package


class CpuAsGpu(CompileOnly):
    utils = SimpleNamespace(unload_module=lambda module: None)  # of another driver, forgotten here

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Launched:
    """A compiled kernel that does nothing."""

    def __getitem__(self, grid):
        return self.run

    def run(self, *args, stream):
        pass


def calls_of(folders: tuple[str, ...], function, *args, until: tuple = ()) -> list[str]:
    """Names of their functions that ran, in order, before one of `until` did; generators count once a value."""
    calls, reached = [], []

    def watch(frame, event, _):
        reached.extend([True] if frame.f_code in until else [])
        if event == "call" and not reached and frame.f_code.co_filename.startswith(folders):
            calls.append(f"{Path(frame.f_code.co_filename).name}: {frame.f_code.co_name}")

    sys.setprofile(watch)
    try:
        function(*args)
    finally:
        sys.setprofile(None)
    assert reached or not until, "nothing was launched"
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
        calls = calls_of((PACKAGE,), projector.forward, *tokens, until=(Launch.run.__code__,))
    assert calls[0] == "projector.py: forward"
    assert len(calls) < 30, "\n".join(calls)


def test_a_step_whose_shapes_came_before_works_nothing_out(monkeypatch):
    """Forward and backward of the third step: launches, and what PyTorch asks of an operator."""
    monkeypatch.setattr(Launch, "_run_by_name", lambda self: Launched())
    projector = SMoPProjector(48, 64, 40, num_experts=4, top_k=2, sharing="DEDR", backend="triton")
    tokens = torch.randn(100, 48), torch.zeros(100, dtype=torch.int32)

    def step() -> None:
        out = projector(*tokens)
        results = out.hidden_states, out.load_balancing_loss, out.router_z_loss
        torch.autograd.backward(results, [torch.ones_like(r) for r in results])

    with driven_by(CpuAsGpu(90)):
        for _ in range(2):
            step()
        calls = calls_of((PACKAGE, KERNELS), step)
    working_out = ("launch.py: run", "configs.py", "tiles.py", "grouped_gemm.py", "partials.py", "projection.py")
    assert not [call for call in calls if call.startswith(working_out)]
    assert calls.count("replay.py: run") == 2, "forward and backward are one sequence each"
    assert len(calls) < 70, f"{len(calls)}:\n" + "\n".join(calls)
