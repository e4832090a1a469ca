"""The whole backend, forward and backward, against the float64 loop, by the check of tests/kernels: each case twice
in different orders with the same bits, and no error above twice PyTorch's in the same dtype."""

import pytest
import torch

from llama_smop.ops.self_check import Model, make, through_backend
from tests.cuda import runners
from tests.cuda.runners import CudaPtx, cases
from tests.kernels.runners import poisoned_memory
from tests.kernels.test_chain import check

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
SM80, SM90 = CudaPtx(arch=80), CudaPtx(arch=90)
# Two SMs: the persistent kernels walk many tiles each, 256 columns wide.
FEW_SMS = CudaPtx(arch=90, sms=2)

MODELS = {
    # Multiples of 8: TMA and 16-byte copies, with tails in every dimension of a tile.
    "dedr-relu": Model(48, 80, 72, E=4, K=2),
    "jejr-gelu": Model(40, 136, 264, E=3, K=1, sharing="JEJR", activation="gelu", biases=False, dtype=fp16),
    # Multiples of nothing: element-wise loads.
    "jedr-silu-odd": Model(37, 51, 29, E=5, K=3, sharing="JEDR", activation="silu", layer_norm=False),
    "all-active-fp32-norm": Model(33, 24, 50, E=3, K=3, sharing="JEJR", layer_norm_dtype=fp32),
    "most-experts": Model(16, 24, 40, E=64, K=8, dtype=fp16),
    "many-experts": Model(32, 24, 40, E=17, K=5, dtype=fp16),
    # Rows in registers, 512 threads; rows too wide for that.
    "wide": Model(16, 24, 2056, E=2, K=2),
    "wider": Model(16, 24, 4104, E=2, K=2),
    "wide-plain": Model(16, 24, 3072, E=3, K=3, layer_norm=False, dtype=fp16),
    "jedr-shared": Model(37, 51, 29, E=5, K=3, sharing="JEDR", activation="silu", shared=2),
    "dedr-shared": Model(48, 80, 72, E=4, K=2, shared=1, dtype=fp16),
    "one-expert": Model(200, 264, 248, E=1, K=1, sharing="JEJR"),
}


@pytest.mark.parametrize(
    ("runner", "name"),
    cases(
        ("dedr-relu", SM80, SM90, FEW_SMS),
        ("jejr-gelu", SM80, SM90, FEW_SMS),
        ("jedr-silu-odd", SM80, SM90),
        ("all-active-fp32-norm", SM80, SM90),
        ("most-experts", SM80),
        ("many-experts", SM90),
        ("jedr-shared", SM80),
        ("dedr-shared", SM90, FEW_SMS),
    ),
)
def test_matches_the_definition(runner, name):
    with runner.running():
        check(runner, MODELS[name], make(MODELS[name], 75, seed=1, masked=0.3))


@pytest.mark.parametrize(("runner", "name"), cases(("wide", SM80, SM90), ("wider", SM80, SM90), ("wide-plain", SM90)))
def test_wide_outputs(runner, name):
    with runner.running():
        check(runner, MODELS[name], make(MODELS[name], 9, seed=2, masked=0.2))


@pytest.mark.parametrize(("runner", "name"), cases(("one-expert", SM80, SM90, FEW_SMS)))
def test_many_rows_an_expert(runner, name):
    """Several row tiles of one expert with a ragged end, and a long k in the weight gradients."""
    with runner.running():
        check(runner, MODELS[name], make(MODELS[name], 330, seed=3, masked=0.01))


@pytest.mark.parametrize(("runner", "name"), cases(("dedr-relu", SM80, SM90), ("jedr-shared", SM80)))
def test_few_tokens_and_one_busy_expert(runner, name):
    with runner.running():
        for tokens, masked, skew in ((0, 0.0, 0.0), (1, 0.0, 0.0), (1, 1.0, 0.0), (150, 0.0, 8.0)):
            check(runner, MODELS[name], make(MODELS[name], tokens, seed=tokens, masked=masked, skew=skew))


@pytest.mark.parametrize(
    ("runner", "name"), cases(("dedr-relu", CudaPtx(arch=80, races=True), CudaPtx(arch=90, races=True, sms=3)))
)
def test_the_order_of_warps_and_copies_does_not_show(runner, name):
    """Copies at once, as late as allowed, or either; several warp orders; with the race detector."""
    model, results = MODELS[name], []
    inputs = make(model, 70, seed=4, masked=0.2)
    with runner.running(), poisoned_memory():
        for seed in (0, 1, 2, 4):
            runner.vary(seed)
            results.append(through_backend(runner.module, model, inputs.to(runner.device)))
    for result in results[1:]:
        for key, first in results[0].items():
            assert torch.equal(first, result[key]), f"{key} differs from run to run"


@pytest.mark.parametrize(("runner", "name"), cases(("dedr-relu", SM90), ("jejr-gelu", SM80)))
def test_recompute_gives_the_same_bits(runner, name):
    model = MODELS[name]
    inputs = make(model, 60, seed=5, masked=0.2)
    with runner.running():
        kept = through_backend(runner.module, model, inputs.to(runner.device))
        for recompute in ("h", "z", "hz"):
            again = through_backend(runner.module, model, inputs.to(runner.device), recompute=recompute)
            for key in kept:
                assert torch.equal(kept[key], again[key]), f"{key} changes with recompute={recompute}"


@pytest.mark.parametrize(("runner", "name"), cases(("dedr-relu", SM80, SM90)))
def test_no_row_of_another_expert_leaks(runner, name):
    """With NaN in the video experts audio results stay finite; an idle expert's gradients are zero."""
    model = MODELS[name]
    inputs = make(model, 80, seed=6)
    audio, E = inputs.modality == 0, model.E
    for parameter in (inputs.w1, inputs.w2, inputs.b1, inputs.ln_weight):
        parameter[E:] = float("nan")
    with runner.running(), poisoned_memory():
        results = through_backend(runner.module, model, inputs.to(runner.device))
    for key in ("y", "dx_projection", "dx_route", "dweights", "logits"):
        assert results[key][audio].isfinite().all(), f"{key} of audio tokens"
    for key in ("dw1", "db1", "dw2", "db2", "dln_weight", "dln_bias"):
        assert results[key][:E].isfinite().all(), f"{key} of audio experts"
    assert results["dgate"][0].isfinite().all()

    idle = make(model, 80, seed=6, video=0.0)
    with runner.running(), poisoned_memory():
        results = through_backend(runner.module, model, idle.to(runner.device))
    for key in ("dw1", "db1", "dw2", "db2", "dln_weight", "dln_bias"):
        assert results[key][E:].eq(0).all(), f"{key} of idle experts is not zero"


@pytest.mark.parametrize(("runner", "name"), cases(("dedr-relu", SM80, SM90)))
def test_masked_tokens_may_hold_anything(runner, name):
    model, results = MODELS[name], []
    inputs = make(model, 50, seed=8, masked=0.4)
    with runner.running(), poisoned_memory():
        for padding in (0.0, float("nan")):
            inputs.x[~inputs.mask] = padding
            inputs.dy[~inputs.mask] = padding
            results.append(through_backend(runner.module, model, inputs.to(runner.device)))
    for key, clean in results[0].items():
        assert torch.equal(clean, results[1][key]), f"{key} depends on what masked tokens hold"


@pytest.mark.parametrize(("runner", "name"), cases(("dedr-relu", SM80, SM90), ("dedr-shared", SM90)))
def test_launch_sequence(runner, name):
    """Five launches forward and seven backward, shared experts or not; on Hopper the projections take wgmma kernels."""
    if runner.device != "cpu":
        pytest.skip("launches are counted under ptxrun")
    model = MODELS[name]
    with runner.running():
        through_backend(runner.module, model, make(model, 40), need_dx=False)
        kernels = [kernel.split("<")[0].split()[-1] for kernel in runners.launches.kernels]
    gemm, wgrad = f"grouped_gemm_sm{runner.arch}", f"grouped_wgrad_sm{runner.arch}"
    forward = ["router_fwd", "scatter_slots", gemm, gemm, "combine_fwd"]
    backward = ["combine_bwd", gemm, wgrad, wgrad, "bias_sums"]
    assert kernels == [*forward, *backward, "gate_wgrad", "gate_sums"]
