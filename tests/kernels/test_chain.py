"""The whole backend, forward and backward, against the float64 loop. The error PyTorch makes in the same dtype is the
measure. Each example runs twice, with copies landing and warps running in another order: the bits must agree."""

from dataclasses import replace

import pytest
import torch

from llama_smop.ops.backends import torch as torch_backend
from llama_smop.ops.self_check import make, through_backend
from tests.kernels.compare import MODELS, check, fp16, skip_unless_served
from tests.kernels.runners import poisoned_memory, triton_params

EVERY_MODEL = triton_params(
    ("dedr-relu", 80, 90), ("jejr-gelu", 90), ("jedr-silu", 80), ("all-active", 80), ("many-experts", 90),
    ("dedr-swiglu", 80, 90), ("jedr-shared", 80, 90), ("dedr-shared", 90),
)  # fmt: skip


@pytest.mark.parametrize(("runner", "name"), EVERY_MODEL)
def test_matches_the_definition(runner, name):
    model = MODELS[name]
    skip_unless_served(runner, model)
    with runner.running():
        check(runner, model, make(model, 65, seed=1, skew=8.0, masked=0.3))


@pytest.mark.slow
@pytest.mark.parametrize(("runner", "name"), triton_params(("jejr-geglu", 90), ("jedr-reglu", 80)))
def test_other_gates_match_the_definition(runner, name):
    test_matches_the_definition(runner, name)


@pytest.mark.parametrize(("runner", "name"), triton_params(("dedr-relu", 90), ("jedr-silu", 80), ("jedr-shared", 90)))
def test_few_tokens(runner, name):
    """No tokens, one, and up to one tile of rows an expert."""
    model = MODELS[name]
    skip_unless_served(runner, model)
    with runner.running():
        for tokens, masked in ((0, 0.0), (1, 0.0), (1, 1.0), (20, 0.3), (64, 0.0)):
            check(runner, model, make(model, tokens, seed=tokens, masked=masked))


@pytest.mark.parametrize(("runner", "name"), triton_params(("one-expert", 80, 90)))
def test_many_rows_an_expert(runner, name):
    """Enough rows for the largest tiles of the table, several of them, with a ragged end."""
    model = MODELS[name]
    skip_unless_served(runner, model)
    with runner.running():
        check(runner, model, make(model, 1100, seed=3, masked=0.01))


@pytest.mark.parametrize(("runner", "absent"), triton_params((("b1", "ln_weight", "ln_bias"), 90), (("b2",), 80)))
def test_each_bias_and_layer_norm_may_be_absent(runner, absent):
    model = MODELS["dedr-relu"]
    skip_unless_served(runner, model)
    with runner.running():
        check(runner, model, replace(make(model, 70, seed=9, masked=0.1), **dict.fromkeys(absent)))


@pytest.mark.parametrize(
    ("runner", "name"), triton_params(("dedr-relu", 80, 90), ("jejr-gelu", 90), ("dedr-swiglu", 90))
)
@pytest.mark.parametrize("recompute", ["h", "z", "hz"])
def test_recompute_gives_the_same_bits(runner, name, recompute):
    model = MODELS[name]
    skip_unless_served(runner, model)
    inputs = make(model, 100, seed=5, masked=0.2)
    with runner.running():
        kept = through_backend(runner.module, model, inputs.to(runner.device))
        again = through_backend(runner.module, model, inputs.to(runner.device), recompute=recompute)
    for t in kept:
        assert torch.equal(kept[t], again[t]), f"{t} changes with recompute={recompute}"


@pytest.mark.parametrize(("runner", "name"), triton_params(("jedr-silu", 90)))
def test_tf32_follows_the_matmul_precision(runner, name):
    """TF32 cuts operands off at 10 bits, once for each of the products a result went through."""
    model = MODELS[name]
    skip_unless_served(runner, model)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with runner.running():
            check(runner, model, make(model, 90, seed=7), relative=2**-8)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("tokens", [40, 90])
@pytest.mark.parametrize(("runner", "name"), triton_params(("dedr-relu", 90), ("dedr-swiglu", 90)))
def test_an_idle_expert_gets_zero_gradients(runner, name, tokens):
    """And its parameters reach nothing, not even when they are NaN."""
    model = MODELS[name]
    skip_unless_served(runner, model)
    inputs = make(model, tokens, seed=2, video=0.0)  # no video token: experts E to 2E−1 have no rows
    for parameter in inputs.parameters():
        parameter[model.E :] = float("nan")
    with runner.running(), poisoned_memory():
        results = through_backend(runner.module, model, inputs.to(runner.device))
    for parameter in ("w1", "b1", "w2", "b2", "ln_weight", "ln_bias"):
        assert results[f"d{parameter}"][: model.E].abs().sum() > 0
        assert results[f"d{parameter}"][model.E :].abs().sum() == 0, f"d{parameter} of an idle expert is not zero"
    for t, value in results.items():
        assert value.isfinite().all(), f"{t} is not finite"


PADDED = ("dedr-relu", 90), ("jejr-gelu", 80), ("jedr-silu", 90), ("dedr-swiglu", 80)


@pytest.mark.parametrize("tokens", [40, 90])
@pytest.mark.parametrize(("runner", "name"), triton_params(*PADDED))
def test_padding_may_hold_anything(runner, name, tokens):
    """A masked token's features and gradients reach nothing, not even when they are NaN."""
    model = MODELS[name]
    skip_unless_served(runner, model)
    inputs = make(model, tokens, seed=6, masked=0.3)
    padding = {t: getattr(inputs, t).clone() for t in ("x", "dy", "dlogits")}
    for t in padding.values():
        t[~inputs.mask] = float("nan")
    with runner.running(), poisoned_memory():
        clean = through_backend(runner.module, model, inputs.to(runner.device))
        results = through_backend(runner.module, model, replace(inputs, **padding).to(runner.device))
    for t in clean:
        assert torch.equal(results[t], clean[t]), f"{t} depends on what padding holds"


@pytest.mark.parametrize(("runner", "activation"), triton_params(("relu", 80), ("gelu", 90), ("silu", 90)))
def test_an_expert_may_overflow_on_tokens_that_pass_it_by(runner, activation):
    """In float16: a token is infinite on the experts it did not choose."""
    model = replace(MODELS["dedr-relu"], activation=activation, dtype=fp16)
    inputs = make(model, 40, seed=8)
    inputs.gate_weight[:, :, :8] = 0.0  # the router does not see what makes it overflow
    _, _, experts, *_ = torch_backend.route_fwd(
        inputs.x, inputs.gate_weight, inputs.modality, inputs.mask, model.K, model.X
    )
    inputs.x[:, :8] = 0.0
    inputs.x[0, :8] = 8.0
    inputs.w1[:, :, :8] = 2048.0
    inputs.w1[experts[0].long(), :, :8] = 0.0
    with runner.running():
        check(runner, model, inputs)


@pytest.mark.parametrize(("runner", "name"), triton_params(("dedr-relu", 80, 90), ("jedr-shared", 90)))
def test_no_access_to_shared_memory_races(runner, name):
    model = MODELS[name]
    skip_unless_served(runner, model)
    with runner.running():
        runner.vary(1, races=True)  # raises on a race
        through_backend(runner.module, model, make(model, 70, seed=4).to(runner.device))
