"""Weights that are brought into the L2 ahead: which lines of which tensor, that nothing else changes, and when not.

Prefetches leave no trace, so for the tests that look at addresses the PTX counts each line in the memory itself.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from llama_smop import functional
from llama_smop.ops.self_check import Model, make, through_backend
from llama_smop.projector import SMoPProjector
from llama_smop.triton_kernels import ahead, projection
from llama_smop.triton_kernels.launch import INTERPRETED, Launch, recording
from tests import ptxrun_support
from tests.kernels.runners import slow, triton_params
from tests.kernels.targets import compiling_for

LINE = 32  # of float32 elements
FEW_ROWS = ahead.FEW_ROWS
fp32 = torch.float32
# Sizes that are multiples of nothing, and an expert's weights that take many programs, the last of them in part.
SMALL = Model(D=37, H=29, O=51, E=3, K=2, sharing="JEJR", dtype=fp32)
LARGE = Model(D=40, H=273, O=155, E=2, K=1, sharing="JEJR", dtype=fp32)
MODELS = {"small": (SMALL, 1 << 24), "large": (LARGE, 1 << 24), "part": (LARGE, 280_001)}  # and bytes that are brought

on_ptxrun = pytest.mark.skipif(INTERPRETED or ptxrun_support.missing() is not None, reason="no PTX is run here")
on_both = pytest.mark.parametrize("arch", [80, 90])


@contextmanager
def counted(arch: int) -> Iterator[None]:
    """Each prefetch adds 1 to the first four bytes of its line, which must lie in a tensor."""
    driver = ptxrun_support.load("ptxrun.triton_driver")
    kernel = driver.TritonKernel

    def counting(compiled):
        asm = {"ptx": re.sub(r"prefetch\.global\.L2 \[(%rd\d+)\]", r"red.global.add.u32 [\1], 1", compiled.asm["ptx"])}
        return kernel(type(compiled)(metadata=compiled.metadata, asm=asm))

    with patch.object(driver, "TritonKernel", counting), driver.active(arch=arch, strict=True):
        yield


def lines_of(weights: torch.Tensor, room: int = 1 << 24, offs: torch.Tensor | None = None) -> torch.Tensor:
    """What `counted` finds in stacked weights that are brought once: an expert's lines start where it does."""
    each = weights[0].numel()
    size = min(4 * each, room // len(weights) // 128 * 128) // 4
    lines = ((torch.arange(each) % LINE == 0) & (torch.arange(each) < size)).int().expand(len(weights), each)
    if offs is not None:
        lines = lines * (offs.diff(prepend=offs.new_zeros(1)) > 0)[:, None]
    return lines.reshape(weights.shape)


class Counts:
    """How often each line of a tensor has been brought since."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor, self.before = tensor, tensor.detach().view(torch.int32).clone()

    def since(self) -> torch.Tensor:
        return self.tensor.detach().view(torch.int32) - self.before


def routed(inputs, model: Model, weights: torch.Tensor | None):
    return projection.route_fwd(inputs.x, inputs.gate_weight, None, inputs.mask, model.K, model.X, 0, weights)


@on_ptxrun
@on_both
@pytest.mark.parametrize("name", MODELS)
def test_the_router_brings_every_line_of_w1_once_and_no_other(name, arch, monkeypatch):
    model, room = MODELS[name]
    model = replace(model, D=model.O, O=model.D)  # the larger of the two weights
    monkeypatch.setattr(ahead, "_room", lambda device: room)
    with counted(arch):
        for tokens in (20, 150):
            inputs = make(model, tokens, seed=tokens, masked=0.2)
            counts = Counts(inputs.w1)
            routed(inputs, model, inputs.w1)
            assert torch.equal(counts.since(), lines_of(inputs.w1, room))


@on_ptxrun
@on_both
@pytest.mark.parametrize("name", MODELS)
def test_the_first_product_and_combine_bring_w2_of_experts_with_rows(name, arch, monkeypatch):
    """Also where an expert's rows take several tiles, and where one token leaves experts without any."""
    model, room = MODELS[name]
    monkeypatch.setattr(ahead, "_room", lambda device: room)
    with counted(arch):
        for tokens, skew in ((1, 0.0), (150, 0.0), (150, 50.0)):
            inputs = make(model, tokens, seed=tokens, skew=skew)
            _, weights, experts, *_, order, inverse, offs = routed(inputs, model, None)
            given = inputs.x, weights, experts, (order, inverse, offs), inputs.parameters()
            wanted = lines_of(inputs.w2, room, offs)
            counts = Counts(inputs.w2)
            _, h, _, z, mean, rstd = projection.expert_projection_fwd(*given, "relu", 1e-5)
            assert torch.equal(counts.since(), wanted), "brought by the first product"
            counts = Counts(inputs.w2)
            saved = h, h.new_empty(0), z, mean, rstd
            projection.expert_projection_bwd(inputs.dy, *given, saved, "relu", 1e-5, True, True, True)
            assert torch.equal(counts.since(), wanted), "brought by combine's backward"


@on_ptxrun
def test_a_replayed_launch_brings_the_tensor_of_its_own_call():
    model = SMALL
    with counted(90):
        for call in range(4):
            inputs = make(model, 30, seed=call)
            elsewhere = Counts(torch.zeros_like(inputs.w1))
            counts = Counts(inputs.w1)
            routed(inputs, model, inputs.w1)
            assert torch.equal(counts.since(), lines_of(inputs.w1)), f"call {call}"
            assert not elsewhere.since().any()


@on_ptxrun
def test_the_layer_brings_the_weights_of_its_experts():
    torch.manual_seed(0)
    projector = SMoPProjector(37, 29, 51, sharing="JEJR", backend="triton")
    experts = dict(projector.named_parameters())
    (w1,), (w2,) = ([p for n, p in experts.items() if n.endswith(name)] for name in ("w1", "w2"))
    with counted(90), torch.no_grad():
        for _ in range(4):
            first, second = Counts(w1), Counts(w2)
            projector(torch.randn(60, 37), torch.zeros(60, dtype=torch.int32))
            assert torch.equal(first.since(), lines_of(w1))
            assert torch.equal(second.since(), lines_of(w2))


BITS = {
    "jejr": Model(48, 80, 72, E=4, K=2, sharing="JEJR"),
    "all-active": Model(33, 24, 50, E=3, K=3, sharing="JEJR"),
    "dedr-shared": Model(48, 80, 72, E=4, K=2, shared=1, dtype=torch.float16),
    "gated": Model(37, 51, 29, E=3, K=1, sharing="JEJR", activation="geglu", dtype=torch.float16),
}


@pytest.mark.parametrize(
    ("runner", "name"),
    triton_params(("jejr", 80, 90))
    + slow(triton_params(("all-active", 80, 90), ("dedr-shared", 80, 90), ("gated", 90))),
)
def test_the_bits_are_those_of_a_chain_that_brings_nothing(runner, name, monkeypatch):
    model = BITS[name]
    if model.dtype not in runner.dtypes:
        pytest.skip(f"{model.dtype} is not for this runner")
    for tokens, masked, skew in ((1, 0.0, 0.0), (1, 1.0, 0.0), (90, 0.3, 0.0), (90, 0.0, 8.0)):
        inputs = make(model, tokens, seed=3, masked=masked, skew=skew).to(runner.device)
        for options in ({}, {"recompute": "hz"}):
            found = []
            for few in (FEW_ROWS, 0):
                monkeypatch.setattr(ahead, "FEW_ROWS", few)
                with runner.running(), recording():  # recorded launches are never replayed ones
                    found.append(through_backend(runner.module, model, inputs, **options))
            for key, value in found[1].items():
                assert torch.equal(found[0][key], value), f"{key} changes at T {tokens}"


@pytest.mark.parametrize(("runner", "sizes"), triton_params(((0, 8, 12), 90), ((8, 0, 12), 80)))
def test_experts_of_no_features_or_no_hidden_units(runner, sizes):
    """Their products have no step of k in which to bring anything, or their weights no bytes to bring."""
    D, H, O = sizes
    g = torch.Generator().manual_seed(0)
    shapes = (20, D), (20, 2), (4, H, D), (4, H), (4, O, H), (4, O)
    x, weights, *parameters = (torch.randn(shape, generator=g, requires_grad=True) for shape in shapes)
    experts = torch.randint(0, 4, (20, 2), generator=g, dtype=torch.int32)

    def through(device: str, backend: str) -> list[torch.Tensor]:
        given = [t.detach().to(device).requires_grad_() for t in (x, weights, *parameters)]
        y = functional.expert_projection(*given[:2], experts.to(device), *given[2:], backend=backend)
        return [y, *torch.autograd.grad(y.square().sum(), given)]

    wanted = through("cpu", "torch")
    with runner.running():
        got = through(runner.device, "triton")
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.cpu(), other, atol=1e-3, rtol=1e-3)


def bringing(model: Model, tokens: int, **changed) -> tuple[list[str], int]:
    """Names of the launches that bring weights, and how many there are in all."""
    with torch.device("meta"):
        inputs = replace(make(model, tokens), **changed)
    with compiling_for(90), recording(execute=False) as recorder:
        through_backend(projection, model, inputs, need_dx=False)
    return [one.name for one in recorder.launches if brought(one) is not None], len(recorder.launches)


def brought(launch: Launch) -> torch.Tensor | None:
    given = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    return given.get("ahead_ptr")


ALL = ["router_fwd_kernel", "grouped_gemm_kernel", "combine_bwd_kernel"]
FULL = Model(1024, 2048, 2048, E=4, K=2, sharing="JEJR")


def test_weights_are_brought_for_few_tokens_alone():
    assert bringing(FULL, 64)[0] == bringing(FULL, 512)[0] == ALL
    assert bringing(FULL, 513)[0] == []
    assert bringing(FULL, 7)[0] == ALL[1:]  # 14 choices leave an expert without rows
    assert bringing(FULL, 0)[0] == []


def test_the_router_brings_no_experts_of_which_half_may_be_needed():
    assert bringing(replace(FULL, sharing="DEDR"), 64)[0] == ALL[1:]
    assert bringing(replace(FULL, sharing="JEDR"), 64)[0] == ALL


def test_no_more_is_brought_than_a_third_of_the_l2():
    for shape in ((4, 2048, 1024), (4, 2048, 2048), (8, 2048, 2048), (100, 2048, 2048)):
        weights = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        size, stride = ahead.worth_bringing(weights, 64).numbers
        assert size % 128 == 0 and size <= stride == 2 * shape[1] * shape[2]
        assert shape[0] * size <= ahead.SMALLEST_L2 / 3
        assert size == stride or shape[0] * (size + 128) > ahead.SMALLEST_L2 / 3


def test_parts_of_other_tensors_are_not_brought():
    wide = torch.empty(4, 2048, 2048, device="meta", dtype=torch.bfloat16)
    assert bringing(FULL, 64, w1=wide[..., :1024])[0] == ALL[1:]


@pytest.mark.parametrize("sharing", ["JEJR", "DEDR"])
def test_it_costs_no_launch(sharing, monkeypatch):
    model = replace(FULL, sharing=sharing)
    with_it = bringing(model, 64)[1]
    monkeypatch.setattr(ahead, "FEW_ROWS", 0)
    assert bringing(model, 64) == ([], with_it)


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_the_compiler_takes_prefetches_and_drops_none(arch):
    with torch.device("meta"):
        inputs = make(FULL, 64)
    with compiling_for(arch), recording(execute=False) as recorder:
        through_backend(projection, FULL, inputs, need_dx=False)
        for one in recorder.launches:
            found = one.compile().asm["ptx"].count("prefetch.global.L2")
            assert bool(found) == (brought(one) is not None), f"{one.name} has {found}"
