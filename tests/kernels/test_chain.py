"""The whole backend, forward and backward, against the float64 oracle. The error PyTorch makes in the same dtype is the
measure. Each example runs twice, with copies landing and warps running in another order: the bits must agree."""

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llama_smop.ops import backend_torch
from tests.kernels.cases import Model, error, make, through_backend, through_oracle
from tests.kernels.runners import Runner, poisoned_memory, triton_params

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32

# Sizes that are multiples of no tile; every sharing, activation and dtype; K = 1, some, and all.
MODELS = {
    "dedr-relu": Model(48, 80, 72, E=4, K=2),
    "jejr-gelu": Model(37, 51, 29, E=3, K=1, sharing="JEJR", activation="gelu", biases=False, dtype=fp16),
    "jedr-silu": Model(40, 56, 24, E=5, K=3, sharing="JEDR", activation="silu", layer_norm=False, dtype=fp32),
    "all-active": Model(33, 24, 50, E=3, K=3, sharing="JEJR", dtype=bf16, layer_norm_dtype=fp32),
    "many-experts": Model(16, 24, 24, E=64, K=4, dtype=fp16),
    "one-expert": Model(64, 96, 32, E=1, K=1, sharing="JEJR"),
}
QUIET = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}


def check(runner: Runner, model: Model, inputs, relative: float = 0.0, **options) -> dict:
    """Run twice on the runner. The bits of both runs agree, and no error exceeds twice PyTorch's.

    `relative` allows that share of a result's own root mean square besides, for formats PyTorch lacks on a CPU.
    """
    runs = []
    for seed in (0, 4):
        runner.vary(seed)
        with poisoned_memory():
            results = through_backend(runner.module, model, inputs.to(runner.device), **options)
        runs.append({name: t.cpu() for name, t in results.items()})
    results = runs[0]

    plain = through_backend(backend_torch, model, inputs, **options)
    exact = through_oracle(model, inputs, results["experts"])
    assert torch.equal(results["counts"].long(), exact["counts"])
    for name, truth in exact.items():
        if name in results:
            got, bound = results[name], 2 * error(plain[name], truth) + 1e-5
            bound += relative * error(truth, torch.zeros_like(truth))
            assert got.shape == truth.shape, f"{name} has shape {tuple(got.shape)}"
            assert error(got, truth) <= bound, f"{name} is off by {error(got, truth):.2e}, allowed {bound:.2e}"
    for name in ("experts", "inverse", "offs"):
        assert torch.equal(results[name], plain[name]), f"{name} differs from PyTorch's"
    for name, first in results.items():
        assert torch.equal(first, runs[1][name]), f"{name} differs from run to run"
    return results


def skip_unless_served(runner: Runner, model: Model) -> None:
    if model.dtype not in runner.dtypes:
        pytest.skip(f"{model.dtype} is not for this runner")


@pytest.mark.parametrize(
    ("runner", "name"),
    triton_params(
        ("dedr-relu", 80, 90), ("jejr-gelu", 90), ("jedr-silu", 80), ("all-active", 80), ("many-experts", 90)
    ),
)
def test_matches_the_oracle(runner, name):
    model = MODELS[name]
    skip_unless_served(runner, model)

    @settings(max_examples=3, phases=runner.phases, **QUIET)
    @given(
        tokens=st.integers(65, 170),
        seed=st.integers(0, 99),
        skew=st.sampled_from([0.0, 8.0]),
        masked=st.sampled_from([0.0, 0.3]),
        video=st.sampled_from([0.0, 0.5, 1.0]),
    )
    @example(tokens=65, seed=1, skew=8.0, masked=0.3, video=0.5)
    def compare(tokens, **drawn):
        check(runner, model, make(model, tokens, **drawn))

    with runner.running():
        compare()


@pytest.mark.parametrize(("runner", "name"), triton_params(("dedr-relu", 90), ("jedr-silu", 80)))
def test_few_tokens(runner, name):
    """No tokens, one, and enough for every expert to see every token (the dense-all order), duplicates aside."""
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


@pytest.mark.parametrize(("runner", "name"), triton_params(("dedr-relu", 90)))
@pytest.mark.parametrize("recompute", ["h", "hz"])
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


@pytest.mark.parametrize(("runner", "name"), triton_params(("dedr-relu", 90)))
def test_an_idle_expert_gets_zero_gradients(runner, name):
    model = MODELS[name]
    skip_unless_served(runner, model)
    inputs = make(model, 100, seed=2, video=0.0)  # no video token: experts E to 2E−1 have no rows
    with runner.running(), poisoned_memory():
        results = through_backend(runner.module, model, inputs.to(runner.device))
    for parameter in ("w1", "b1", "w2", "b2", "ln_weight", "ln_bias"):
        assert results[f"d{parameter}"][: model.E].abs().sum() > 0
        assert results[f"d{parameter}"][model.E :].abs().sum() == 0, f"d{parameter} of an idle expert is not zero"
