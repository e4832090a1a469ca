"""The check of products by TMA, which are larger than a check's others: it is made of such, sees what is wrong with
them, and what it has refused is computed by pointers."""

import pytest
import torch

from llama_smop.ops import large_products
from llama_smop.ops.self_check import Model, make, through_backend
from llama_smop.triton_kernels import boxes, configs, grouped_gemm, launch, projection
from llama_smop.triton_kernels.tiles import TileConfig
from tests.kernels.runners import triton_params
from tests.kernels.targets import compiling_for

bf16, fp16 = torch.bfloat16, torch.float16
SIXTEEN_BIT = {"bf16": bf16, "fp16": fp16}


@pytest.fixture(autouse=True)
def nothing_is_refused():
    yield
    boxes.refused.clear()


def device_of(runner) -> torch.device:
    return torch.device(runner.device, 0) if runner.device == "cuda" else torch.device("cpu")


def by_tma(launches: list[launch.Launch]) -> list[str | None]:
    return [one.constexprs["BOXES"] for one in launches if one.kernel is grouped_gemm.grouped_gemm_kernel]


@pytest.mark.parametrize(("runner", "dtype"), triton_params(("bf16", 90), ("fp16", 90)))
def test_it_multiplies_boxes_of_weights_that_lie_either_way(runner, dtype):
    with runner.running() as module, launch.recording() as recorder:
        if launch.target_arch() < 90:
            pytest.skip("is not for this runner")
        assert large_products.faults(module, SIXTEEN_BIT[dtype], device_of(runner)) == []
    assert by_tma(recorder.launches) == ["XKN", "XNK"]


@pytest.mark.parametrize(("arch", "dtype"), [(80, bf16), (90, torch.float32)])
def test_it_launches_nothing_where_large_products_take_pointers(arch, dtype):
    with compiling_for(arch), launch.recording(execute=False) as recorder:
        assert large_products.faults(projection, dtype, torch.device("cpu")) == []
    assert not recorder.launches


@pytest.mark.parametrize("arch", [90, 100, 120])
def test_it_takes_the_tile_of_the_largest_products(arch):
    """For the default sizes, of more tokens than fit a batch."""
    with torch.device("meta"):
        a, b, offs = torch.empty(1 << 18, 2048), torch.empty(4, 2048, 2048), torch.empty(4, dtype=torch.int32)
    with compiling_for(arch), launch.recording(execute=False) as recorder:
        projection.grouped_mm(a.bfloat16(), b.bfloat16(), offs, None, None)
        projection.product_by_boxes(a[:64].bfloat16(), b.bfloat16(), offs)
    large, small = ({k: v for k, v in one.constexprs.items() if "BLOCK" in k} for one in recorder.launches)
    assert by_tma(recorder.launches) == ["XKN", "XKN"] and large == small


@pytest.mark.parametrize(("runner", "dtype"), triton_params(("bf16", 90)))
def test_descriptors_that_read_something_else_are_seen(runner, dtype, monkeypatch):
    honest = boxes._described
    monkeypatch.setattr(boxes, "_described", lambda tensor, *how: honest(torch.zeros_like(tensor), *how))
    with runner.running() as module:
        if launch.target_arch() < 90:
            pytest.skip("is not for this runner")
        first, second = large_products.faults(module, SIXTEEN_BIT[dtype], device_of(runner))
    assert first.startswith("a·b by TMA is off by") and second.startswith("a·bᵀ by TMA is off by")


@pytest.mark.parametrize(("runner", "name"), triton_params(("refused", 90)))
def test_what_is_refused_takes_pointers_in_replays_too(runner, name, monkeypatch):
    """Of that dtype on that device; the bits are the same."""
    monkeypatch.setattr(configs, "SMALLEST_BY_BOXES", 0)
    tile = TileConfig(64, 64, 64, num_warps=4, num_stages=3)
    monkeypatch.setattr(grouped_gemm, "gemm_config", lambda *_: tile)
    model = Model(48, 72, 40, E=2, K=1, sharing="JEJR", dtype=bf16)
    inputs = make(model, 70).to(runner.device)
    with runner.running() as module:
        if launch.target_arch() < 90:
            pytest.skip("is not for this runner")
        wanted = [through_backend(module, model, inputs) for _ in range(3)][-1]
        assert any(plan is not None and plan.boxes for plan in launch._plans.values())
        large_products.do_without(module, fp16, device_of(runner))
        with launch.recording() as recorder:
            through_backend(module, model, inputs)
        assert by_tma(recorder.launches)[1:] == ["XNK", "XKN", "XKN"], "of another dtype they are right"
        large_products.do_without(module, bf16, device_of(runner))
        for _ in range(3):
            got = through_backend(module, model, inputs)
        assert not any(plan is not None and plan.boxes for plan in launch._plans.values())
    for t, value in wanted.items():
        assert torch.equal(got[t], value), t
