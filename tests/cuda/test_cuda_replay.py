"""A call of shapes that came before is one call into the extension: on its own tensors, where nothing else differs."""

import gc
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from threading import Thread
from unittest import mock

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import llama_smop
from llama_smop.ops.backends import cuda as cuda_backend
from llama_smop.ops.backends import cuda_replay
from llama_smop.ops.self_check import Inputs, Model, make, through_backend
from llama_smop.projector import SMoPProjector
from tests.cuda import extension, runners
from tests.cuda.runners import ON_PTX, CudaPtx, params
from tests.kernels import differing
from tests.kernels.runners import poisoned_memory
from tests.kernels.test_host_calls import calls_of

PACKAGE = str(Path(llama_smop.__file__).parent)
SM80, SM90 = CudaPtx(arch=80), CudaPtx(arch=90)
MODEL = Model(D=32, H=48, O=40, E=4, K=2, sharing="DEDR")
PLAIN = Model(D=32, H=48, O=40, E=3, K=2, sharing="JEDR", activation="silu", biases=False, layer_norm=False, shared=1)
ODD = Model(D=37, H=51, O=29, E=3, K=2, sharing="JEJR", activation="gelu", dtype=torch.float16)  # no TMA
FIRST, SECOND, REPLAYED = range(3)
FUNCTIONS = 4  # of a backend's chain; the projector has two sequences


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch) -> None:
    """Of the shapes of other tests."""
    monkeypatch.setattr(cuda_replay, "_known", {})


@pytest.fixture
def replays(monkeypatch) -> list[cuda_replay.Plan]:
    """The plans that are run."""
    seen: list[cuda_replay.Plan] = []
    run = cuda_replay.Plan.run
    monkeypatch.setattr(cuda_replay.Plan, "run", lambda plan, flat: seen.append(plan) or run(plan, flat))
    return seen


def results(runner, model: Model, inputs: Inputs, **options) -> dict[str, torch.Tensor]:
    with poisoned_memory():
        return through_backend(runner.module, model, inputs.to(runner.device), **options)


def worked_out_afresh(runner, model: Model, inputs: Inputs, **options) -> dict[str, torch.Tensor]:
    with mock.patch.object(cuda_replay, "_known", {}):
        return results(runner, model, inputs, **options)


def same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(got[name], value), f"{name} differs when its launches are replayed"


@pytest.mark.parametrize("runner", params(SM80, SM90))
@pytest.mark.parametrize(
    ("model", "options"),
    [
        (MODEL, {"need_dx": False}),
        (MODEL, {"recompute": "h"}),
        (PLAIN, {"recompute": "hz"}),
        (ODD, {"recompute": "z"}),
    ],
)
def test_the_third_call_of_a_shape_is_replayed(runner, model, options, replays):
    with runner.running():
        for call in (FIRST, SECOND, REPLAYED):
            inputs = make(model, 40, seed=call, masked=0.2)  # other values, other routing, other memory
            wanted = worked_out_afresh(runner, model, inputs, **options)
            replays.clear()
            got = results(runner, model, inputs, **options)
            assert len(replays) == (FUNCTIONS if call == REPLAYED else 0)
            same(got, wanted)


@pytest.mark.parametrize("runner", params(SM90))
@pytest.mark.parametrize("shared", [0, 2])
def test_a_third_step_of_the_projector_is_two_calls_into_the_extension(runner, shared, replays):
    """Forward and backward as one sequence each, on the step's own tokens, routing and gradients."""
    torch.manual_seed(0)
    projector = SMoPProjector(32, 48, 40, sharing="DEDR", backend="cuda", shared_experts=shared)
    projector.to(runner.device, torch.bfloat16)

    def step(seed: int) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(40, 32, generator=g).to(runner.device, torch.bfloat16).requires_grad_()
        modality = torch.randint(0, 2, (40,), generator=g).to(runner.device)
        mask = (torch.rand(40, generator=g) > 0.2).to(runner.device)
        out = projector(x, modality, mask)
        loss = (out.hidden_states.float().square().sum() + out.load_balancing_loss + out.router_z_loss) * seed
        parameters = dict(projector.named_parameters())
        gradients = torch.autograd.grad(loss, [x, *parameters.values()])
        return out._asdict() | dict(zip(["x", *parameters], gradients, strict=True))

    with runner.running():
        for call in (FIRST, SECOND, REPLAYED):
            with mock.patch.object(cuda_replay, "_known", {}):
                wanted = step(call + 1)
            replays.clear()
            got = step(call + 1)
            assert len(replays) == (2 if call == REPLAYED else 0)
            same(got, wanted)


@pytest.mark.parametrize("runner", [pytest.param(SM90, marks=ON_PTX)])  # a GPU's backward is another thread's
def test_a_step_whose_shapes_came_before_works_nothing_out(runner):
    """A GPU that has few tokens waits for the host: for what PyTorch asks of an operator, and little else."""
    projector = SMoPProjector(32, 48, 40, sharing="DEDR", backend="cuda").to(runner.device, torch.bfloat16)
    tokens = torch.randn(40, 32).to(runner.device, torch.bfloat16), torch.zeros(40, dtype=torch.int32).to(runner.device)

    def step() -> None:
        out = projector(*tokens)
        given = out.hidden_states, out.load_balancing_loss, out.router_z_loss
        torch.autograd.backward(given, [torch.ones_like(r) for r in given])

    with runner.running():
        for _ in range(2):
            step()
        calls = calls_of((PACKAGE,), step)
    assert not [call for call in calls if call.startswith("cuda.py")], "\n".join(calls)
    assert calls.count("cuda_replay.py: run") == 2
    assert len(calls) < 70, f"{len(calls)}:\n" + "\n".join(calls)


@pytest.mark.parametrize("runner", params(SM90))
def test_a_call_that_differs_is_not_replayed(runner):
    """In a size, in what is asked for, in what is recomputed. An input that begins elsewhere takes other kernels."""
    inputs, others = differing.calls(MODEL, 40)
    with runner.running():
        for _ in range(3):
            results(runner, MODEL, inputs)
        for other, options in others:
            same(results(runner, MODEL, other, **options), worked_out_afresh(runner, MODEL, other, **options))


@pytest.mark.parametrize("runner", params(SM80))
def test_tensors_that_are_one_and_the_same(runner):
    """Both losses often have the same gradient; the next call's may be two tensors."""
    inputs = make(MODEL, 40, seed=1)
    one = torch.tensor(0.5)
    with runner.running():
        for same_tensor in (True, True, True, False):
            given = replace(inputs, dbalance=one, dz=one if same_tensor else torch.tensor(-0.25))
            i = given.to(runner.device)
            if same_tensor:
                i.dz = i.dbalance
            same(results(runner, MODEL, i), worked_out_afresh(runner, MODEL, given))


@pytest.mark.parametrize("runner", params(SM80))
def test_the_oldest_shapes_make_room(runner, monkeypatch):
    monkeypatch.setattr(cuda_replay, "MOST_SHAPES", 6)
    with runner.running():
        for tokens in (20, 20, 20, 21, 22, 20, 20, 20):
            inputs = make(MODEL, tokens, seed=tokens)
            same(results(runner, MODEL, inputs), worked_out_afresh(runner, MODEL, inputs))
            assert len(cuda_replay._known) <= 6


@pytest.mark.parametrize("runner", params(SM80))
def test_memory_is_free_as_soon_as_results_are(runner):
    """In the call whose launches are noted too, without the garbage collector: h and z are most of a step's memory."""
    projector = SMoPProjector(32, 48, 40, sharing="DEDR", backend="cuda").to(runner.device, torch.bfloat16)
    modality = (torch.arange(40) % 2).to(runner.device)
    gc.disable()
    try:
        with runner.running(), torch.no_grad():
            for call in (FIRST, SECOND, REPLAYED):
                out = projector(torch.randn(40, 32).to(runner.device, torch.bfloat16), modality)
                memory = [StorageWeakRef(value.untyped_storage()) for value in out]
                del out
                if runner.device == "cpu":
                    runners.launches.session.tensors.clear()
                assert all(one.expired() for one in memory), f"call {call} keeps tensors"
    finally:
        gc.enable()


@pytest.mark.parametrize("runner", params(SM80))
def test_what_no_launch_has_written_is_made_anew_each_time(runner):
    """A sequence that fills a tensor by other means is never replayed: replaying knows empty tensors alone."""

    @cuda_replay.replayed
    def filled(tensor: torch.Tensor, times: int) -> tuple[torch.Tensor, int]:
        return torch.full_like(tensor, times), times

    with runner.running():
        for _ in range(4):
            found, _ = filled(torch.empty(3, device=runner.device), 7)
            assert found.tolist() == [7.0] * 3


class Clearing:
    """A sequence of one launch, which sets the rows of a new tensor from ends[0] on to zero."""

    def __init__(self):
        self.before_it_returns = lambda: None
        self.run = cuda_replay.replayed(self.clear)

    def clear(self, ends: torch.Tensor) -> tuple[torch.Tensor]:
        out = ends.new_empty(8, 8, dtype=torch.bfloat16)
        with cuda_replay.launches(ends) as stream:
            cuda_backend.extension().zero_tail(
                dtype=0, out=cuda_backend._ptr(out), rows=8, n=8, offs=cuda_backend._ptr(ends), experts=1,
                dependent=False, stream=stream,
            )  # fmt: skip
        self.before_it_returns()
        return (out,)

    def check(self, device: str, first_row: int) -> None:
        with poisoned_memory():
            (out,) = self.run(torch.tensor([first_row], dtype=torch.int32, device=device))
        assert out[first_row:].eq(0).all() and out[:first_row].isnan().all()


@pytest.mark.parametrize("runner", params(SM90))
def test_a_call_that_fails_is_not_remembered(runner, replays):
    def fail() -> None:
        raise ValueError("the sizes do not fit")

    with runner.running():
        clearing = Clearing()
        clearing.check(runner.device, 2)
        clearing.before_it_returns = fail
        with pytest.raises(ValueError, match="do not fit"):
            clearing.run(torch.tensor([3], dtype=torch.int32, device=runner.device))
        clearing.before_it_returns = lambda: None
        for call, first_row in enumerate((4, 5, 6)):
            clearing.check(runner.device, first_row)
            assert len(replays) == call


@pytest.mark.parametrize("runner", params(SM90))
def test_threads_note_their_own_launches(runner, replays):
    """While one GPU's thread is in a sequence, another one's makes, notes and replays launches of its own."""
    errors: list[BaseException] = []

    def other_thread() -> None:
        try:
            theirs = Clearing()
            for first_row in (1, 2, 3):
                theirs.check(runner.device, first_row)
        except BaseException as error:
            errors.append(error)

    def meanwhile() -> None:
        thread = Thread(target=other_thread)
        thread.start()
        thread.join()

    with runner.running():
        mine = Clearing()
        mine.check(runner.device, 4)
        mine.before_it_returns = meanwhile
        mine.check(runner.device, 5)
        mine.check(runner.device, 6)
    assert not errors and len(replays) == 2


@pytest.mark.parametrize("runner", params(SM90))
def test_views_among_the_results_are_made_anew_each_time(runner):
    """Of an argument, or of another result: a replay would give memory that nothing has written."""

    class Viewing(Clearing):
        def clear(self, ends: torch.Tensor) -> tuple[torch.Tensor, ...]:
            (out,) = super().clear(ends)
            return out, out.t(), ends.detach()

    with runner.running():
        viewing = Viewing()
        for first_row in (4, 5, 6):
            ends = torch.tensor([first_row], dtype=torch.int32, device=runner.device)
            out, turned, same_ends = viewing.run(ends)
            assert turned[:, first_row:].eq(0).all() and turned.data_ptr() == out.data_ptr()
            assert same_ends.tolist() == [first_row]


@pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))
def test_a_plan_runs_on_as_many_arrays_as_it_needs():
    """Else its launches would be given addresses from nowhere."""
    module = extension.static()
    plan = module.Plan()
    with plan:  # nothing to launch: no device is needed
        module.zero_tail(dtype=0, out=64, rows=0, n=8, offs=128, experts=1, dependent=False, stream=0)
    assert sorted(plan.addresses) == [64, 128]
    with pytest.raises(ValueError, match="each address of a plan needs a place"):
        module.run(plan=plan, arrays=[64, 128], stream=0)
    plan.place([(0, 0), (1, 256)])
    with pytest.raises(IndexError):
        module.run(plan=plan, arrays=[64], stream=0)
    module.run(plan=plan, arrays=[64, 128], stream=0)
    module.zero_tail(dtype=0, out=192, rows=0, n=8, offs=128, experts=1, dependent=False, stream=0)
    assert sorted(plan.addresses) == [64, 128], "it notes what is launched inside `with` alone"


def test_it_needs_no_triton():
    """It shares a file with the Triton kernels' own replay."""
    script = "import sys; sys.modules['triton'] = None; import llama_smop.ops.backends.cuda"
    subprocess.run([sys.executable, "-c", script], check=True)
