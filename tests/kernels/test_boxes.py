"""Products whose operands come by TMA, on sizes that TMA can read and on others, as small as the tests need them."""

from dataclasses import fields, replace

import pytest
import torch

from llama_smop.ops.self_check import Model, make, through_backend
from llama_smop.triton_kernels import configs, grouped_gemm, launch, projection
from llama_smop.triton_kernels.tiles import TileConfig
from tests.kernels.compare import MODELS, check, fp16
from tests.kernels.runners import poisoned_memory, triton_params
from tests.kernels.targets import compiling_for

NARROW = TileConfig(64, 64, 64, num_warps=4, num_stages=3)
WIDEST = TileConfig(128, 256, 64, num_warps=8, num_stages=4)  # takes the PTX interpreter longer

# No tile divides the sizes; those of the second have steps that are not multiples of 16 bytes, so pointers serve it.
READABLE = {
    "relu": MODELS["dedr-relu"],
    "gelu": replace(MODELS["dedr-relu"], activation="gelu", dtype=fp16, K=1),
    "swiglu": MODELS["dedr-swiglu"],
    "one-expert": MODELS["one-expert"],
    "wide": Model(48, 280, 264, E=2, K=1, sharing="JEJR"),
}
UNREADABLE = MODELS["jejr-gelu"]


def tile(arch: int, dtype: torch.dtype, precision: str, rows: int, groups: int, n: int, k: int) -> TileConfig:
    return NARROW if max(n, k) < 256 else WIDEST


@pytest.fixture(autouse=True)
def small_products_too(monkeypatch):
    monkeypatch.setattr(configs, "SMALLEST_BY_BOXES", 0)
    monkeypatch.setattr(grouped_gemm, "gemm_config", tile)


def boxes(model: Model, tokens: int, arch: int) -> list[str | None]:
    """How weights lie in the boxes of h, z, dh and dx."""
    with torch.device("meta"):
        inputs = make(model, tokens)
    with compiling_for(arch), launch.recording(execute=False) as recorder:
        through_backend(projection, model, inputs)
    return [one.constexprs["BOXES"] for one in recorder.launches if one.kernel is grouped_gemm.grouped_gemm_kernel]


@pytest.mark.parametrize("name", READABLE)
def test_operands_come_as_boxes(name):
    """Not for h, whose rows are gathered."""
    assert boxes(READABLE[name], 70, arch=90) == [None, "XNK", "XKN", "XKN"]


def test_pointers_serve_the_others(monkeypatch):
    assert boxes(UNREADABLE, 70, arch=90) == [None] * 4
    assert boxes(replace(READABLE["relu"], dtype=torch.float32), 70, arch=90) == [None] * 4
    assert boxes(READABLE["relu"], 70, arch=80) == [None] * 4
    monkeypatch.undo()
    assert boxes(READABLE["relu"], 70, arch=90) == [None] * 4, "few tokens wait for the host to describe boxes"


@pytest.mark.parametrize(("runner", "name"), triton_params(*[(name, 90) for name in READABLE]))
@pytest.mark.parametrize("tokens", [0, 20, 65, pytest.param(700, marks=pytest.mark.slow)])
def test_matches_the_definition(runner, name, tokens):
    with runner.running():
        check(runner, READABLE[name], make(READABLE[name], tokens, seed=1, skew=8.0, masked=0.3))


@pytest.mark.parametrize(("runner", "name"), triton_params(("relu", 90), ("swiglu", 90)))
def test_boxes_give_the_bits_of_pointers(runner, name, monkeypatch):
    """The sum over k has the same order."""
    model = READABLE[name]
    inputs = make(model, 100, seed=2, masked=0.2)
    with runner.running():
        by_tma = through_backend(runner.module, model, inputs.to(runner.device))
        monkeypatch.setattr(configs, "SMALLEST_BY_BOXES", 1 << 62)
        pointers = through_backend(runner.module, model, inputs.to(runner.device))
    for t, value in pointers.items():
        assert torch.equal(by_tma[t], value), f"{t} differs"


@pytest.mark.parametrize("poison", ["nan", "inf"])
@pytest.mark.parametrize(("runner", "name"), triton_params(("relu", 90), ("swiglu", 90)))
def test_a_box_reaches_into_the_next_experts_rows_and_weights(runner, name, poison):
    """Neither leaves a trace: not in the columns past N and K, not in the rows past an expert's last."""
    model = READABLE[name]
    inputs = make(model, 90, seed=3, masked=0.2, video=0.0)  # experts E to 2E − 1 have no rows
    bad = replace(inputs, w1=inputs.w1.clone(), w2=inputs.w2.clone())
    bad.w1[model.E :] = float(poison)
    bad.w2[model.E :] = float(poison)
    with runner.running(), poisoned_memory():
        clean = through_backend(runner.module, model, inputs.to(runner.device))
        results = through_backend(runner.module, model, bad.to(runner.device))
    for t, value in clean.items():
        assert torch.equal(results[t], value), f"{t} depends on the weights of an expert without rows"


@pytest.mark.parametrize(("runner", "poison"), triton_params((float("nan"), 90), (float("inf"), 90)))
def test_an_expert_that_overflows_spoils_no_other(runner, poison):
    """Rows of the next expert lie in the last box of an expert's own."""
    model = replace(READABLE["relu"], K=1)
    inputs = make(model, 90, seed=4)
    bad = replace(inputs, b1=inputs.b1.clone())
    with runner.running():
        clean = through_backend(runner.module, model, inputs.to(runner.device))
        expert = int(clean["experts"][0])
        bad.b1[expert] = poison
        results = through_backend(runner.module, model, bad.to(runner.device))
    others = (clean["experts"][:, 0] != expert).cpu()
    assert not results["y"][0].isfinite().all()
    assert torch.equal(results["y"][others], clean["y"][others])
    assert torch.equal(results["dx_projection"][others], clean["dx_projection"][others])
    rest = torch.arange(len(inputs.w1)) != expert
    for t in ("dw1", "dw2", "db1", "db2"):
        assert torch.equal(results[t][rest], clean[t][rest]), f"{t} of other experts has changed"


@pytest.mark.parametrize(("runner", "name"), triton_params(("relu", 90), ("swiglu", 90)))
def test_no_access_to_shared_memory_races(runner, name):
    model = READABLE[name]
    with runner.running():
        for seed in (1, 2):
            runner.vary(seed, races=True)
            through_backend(runner.module, model, make(model, 70, seed=4).to(runner.device))


@pytest.mark.parametrize(("runner", "name"), triton_params(("relu", 90)))
def test_a_replay_describes_the_tensors_of_its_own_call(runner, name):
    """And holds none of an earlier call's."""
    model = READABLE[name]
    with runner.running():
        for call in range(4):
            inputs = make(model, 70, seed=call, masked=0.2).to(runner.device)
            with launch.recording() as recorder:
                wanted = through_backend(runner.module, model, inputs)
            assert any(one.constexprs.get("BOXES") for one in recorder.launches)
            got = through_backend(runner.module, model, inputs)
            for t, value in wanted.items():
                assert torch.equal(got[t], value), f"call {call}: {t} differs when its launches are replayed"
        plans = [plan for plan in launch._plans.values() if plan is not None and plan.boxes]
        assert plans
        for plan in plans:
            kept = [plan.constants[place] for place, _ in plan.boxes]
            assert all(descriptor.base is None for descriptor in kept)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_graph_reads_what_lies_in_the_tensors_it_was_captured_with():
    model = READABLE["relu"]
    batches = [make(model, 70, seed=seed, masked=0.2).to("cuda") for seed in (1, 2)]
    wanted = [through_backend(projection, model, batch) for batch in batches]  # compiled, and the launches noted
    static = make(model, 70, seed=3, masked=0.2).to("cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = through_backend(projection, model, static)
    for batch, right in zip(batches, wanted, strict=True):
        for field in fields(batch):
            if isinstance(value := getattr(batch, field.name), torch.Tensor):
                getattr(static, field.name).copy_(value)
        graph.replay()
        for t, value in right.items():
            assert torch.equal(results[t], value), f"{t} differs when a graph of TMA's products is replayed"
