"""A call of shapes that came before replays their launches: with its own tensors, and where nothing else differs."""

import gc
from dataclasses import replace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from llama_smop.ops.self_check import Inputs, Model, make, through_backend
from llama_smop.projector import SMoPProjector
from llama_smop.triton_kernels import launch, replay
from llama_smop.triton_kernels.combine import combine_fwd_kernel
from llama_smop.triton_kernels.launch import Launch
from tests.kernels import differing
from tests.kernels.runners import triton_params

MODEL = Model(D=32, H=48, O=40, E=4, K=2, sharing="DEDR")
FIRST, SECOND, REPLAYED = range(3)


def launched_one_by_one(monkeypatch) -> list[str]:
    """Names of the kernels whose launches were worked out, not replayed."""
    names: list[str] = []
    run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: names.append(self.name) or run(self))
    return names


def results(runner, inputs: Inputs, **options) -> dict[str, torch.Tensor]:
    return through_backend(runner.module, MODEL, inputs.to(runner.device), **options)


def worked_out_afresh(runner, inputs: Inputs, **options) -> dict[str, torch.Tensor]:
    with launch.recording():
        return results(runner, inputs, **options)


def same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(got[name], value), f"{name} differs when its launches are replayed"


@pytest.mark.parametrize(("runner", "need_dx"), triton_params((False, 90), (True, 80)))
def test_the_third_call_of_a_shape_is_replayed(runner, need_dx, monkeypatch):
    names = launched_one_by_one(monkeypatch)
    with runner.running():
        for call in (FIRST, SECOND, REPLAYED, REPLAYED):
            inputs = make(MODEL, 50, seed=call, masked=0.2)  # other values, other routing, other memory
            wanted = worked_out_afresh(runner, inputs, need_dx=need_dx)
            names.clear()
            got = results(runner, inputs, need_dx=need_dx)
            assert bool(names) == (call != REPLAYED), f"worked out: {names}"
            same(got, wanted)


@pytest.mark.parametrize(("runner", "form"), triton_params(("DEDR", 90)))
def test_memory_is_free_as_soon_as_results_are(runner, form):
    """In the call whose launches are noted too, without the garbage collector: h and z are most of a step's memory."""
    projector = SMoPProjector(32, 48, 40, sharing=form, backend="triton").to(runner.device)
    modality = (torch.arange(50) % 2).to(runner.device)
    gc.disable()
    try:
        with runner.running(), torch.no_grad():
            for call in (FIRST, SECOND, REPLAYED):
                out = projector(torch.randn(50, 32).to(runner.device), modality)
                memory = [StorageWeakRef(value.untyped_storage()) for value in out]
                del out
                assert all(one.expired() for one in memory), f"call {call} keeps tensors"
    finally:
        gc.enable()


@pytest.mark.parametrize(("runner", "form"), triton_params(("DEDR", 90), ("JEJR", 80), ("JEDR, shared", 90)))
def test_a_third_step_of_the_projector_is_replayed(runner, form, monkeypatch):
    """Forward and backward as one sequence each, on the step's own tokens, routing and gradients."""
    names = launched_one_by_one(monkeypatch)
    torch.manual_seed(0)
    shared = {"shared_experts": 2} if form.endswith("shared") else {}
    projector = SMoPProjector(32, 48, 40, sharing=form[:4], backend="triton", **shared).to(runner.device)

    def step(seed: int) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(50, 32, generator=g).to(runner.device).requires_grad_()
        modality = torch.randint(0, 2, (50,), generator=g).to(runner.device)
        mask = (torch.rand(50, generator=g) > 0.2).to(runner.device)
        out = projector(x, modality, mask)
        loss = (out.hidden_states.square().sum() + out.load_balancing_loss + out.router_z_loss) * seed
        parameters = dict(projector.named_parameters())
        gradients = torch.autograd.grad(loss, [x, *parameters.values()])
        return out._asdict() | dict(zip(["x", *parameters], gradients, strict=True))

    with runner.running():
        for call in (FIRST, SECOND, REPLAYED, REPLAYED):
            with launch.recording():
                wanted = step(call + 1)
            names.clear()
            got = step(call + 1)
            assert bool(names) == (call != REPLAYED), f"worked out: {names}"
            same(got, wanted)


@pytest.mark.parametrize(("runner", "recompute"), triton_params(("", 90)))
def test_a_call_that_differs_is_not(runner, recompute):
    """In a size, alignment, an option, in what is recomputed."""
    inputs, others = differing.calls(MODEL, 50)
    with runner.running():
        for _ in range(3):
            results(runner, inputs)
        for other, options in others:
            same(results(runner, other, **options), worked_out_afresh(runner, other, **options))


@pytest.mark.parametrize(("runner", "times"), triton_params((4, 90)))
def test_tensors_that_are_one_and_the_same(runner, times):
    """Both losses often have the same gradient; the next call's may be two tensors."""
    inputs = make(MODEL, 50, seed=1)
    one = torch.tensor(0.5)
    with runner.running():
        for call in range(times):
            same_tensor = call < times - 1
            given = replace(inputs, dbalance=one, dz=one if same_tensor else torch.tensor(-0.25))
            i = given.to(runner.device)
            if same_tensor:
                i.dz = i.dbalance
            same(through_backend(runner.module, MODEL, i), worked_out_afresh(runner, given))


@pytest.mark.parametrize(("runner", "most"), triton_params((6, 90)))
def test_the_oldest_shapes_make_room(runner, most, monkeypatch):
    monkeypatch.setattr(replay, "MOST_PLANS", most)
    monkeypatch.setattr(launch, "_plans", {})  # on a GPU the tests before have made some
    with runner.running():
        for tokens in (20, 20, 20, 21, 22, 20, 20, 20):
            inputs = make(MODEL, tokens, seed=tokens)
            same(results(runner, inputs), worked_out_afresh(runner, inputs))
            assert len(launch._plans) <= most


@pytest.mark.parametrize(("runner", "arch"), triton_params((90, 90)))
def test_hooks_of_a_kernel_see_every_launch(runner, arch):
    seen: list[bool] = []
    inputs = make(MODEL, 50, seed=1)
    with runner.running():
        for _ in range(3):
            results(runner, inputs)
        combine_fwd_kernel.add_pre_run_hook(lambda *args, **options: seen.append(True))
        try:
            results(runner, inputs)
        finally:
            combine_fwd_kernel.pre_run_hooks.clear()
    assert seen


@pytest.mark.parametrize(("runner", "arch"), triton_params((90, 90)))
def test_what_no_kernel_has_written_is_made_anew_each_time(runner, arch):
    """A sequence that fills a tensor by other means is never replayed: replaying knows empty tensors alone."""

    @replay.replayed
    def filled(tensor: torch.Tensor, times: int) -> tuple[torch.Tensor, int]:
        return torch.full_like(tensor, times), times

    with runner.running():
        for _ in range(4):
            found, _ = filled(torch.empty(3, device=runner.device), 7)
            assert found.tolist() == [7.0] * 3
