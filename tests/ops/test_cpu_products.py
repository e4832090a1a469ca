"""Products of reduced dtypes on a CPU, with and without instructions for them."""

import pytest
import torch

from llama_smop import functional
from llama_smop.ops.backends import cpu_products
from tests.ops.problems import make, relative_error
from tests.ops.test_torch_against_naive import gradients, objective, ours
from tests.rounding import two_orders

UNIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # half a unit in the last place, relative


@pytest.fixture
def without_fast_products(monkeypatch):
    """As on a CPU that multiplies only float32 and float64 fast; blocks small enough that these shapes take several."""
    monkeypatch.setattr(cpu_products, "_cpu_multiplies", lambda dtype: dtype not in UNIT)
    monkeypatch.setattr(cpu_products, "BLOCK_BYTES", 1)


def normal(*shape, seed, dtype):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_rounded_once(got, exact, dtype):
    """Float32 sums of 70 and a shift err far less than the one rounding to `dtype`."""
    assert got.dtype == dtype
    error = (got.double() - exact).abs() - UNIT[dtype] * exact.abs()
    allowed = two_orders(71) * exact.abs().max()
    assert error.max() <= allowed, f"{error.max():.1e} beyond one rounding, allowed {allowed:.1e}"


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize("transposed", (False, True), ids=("rows", "columns"))
@pytest.mark.parametrize("bias", (False, True), ids=("", "bias"))
def test_linear_rounds_once(without_fast_products, dtype, transposed, bias):
    rows, shift = normal(11, 70, seed=0, dtype=dtype), normal(45, seed=2, dtype=dtype) if bias else None
    weight = normal(70, 45, seed=1, dtype=dtype).t() if transposed else normal(45, 70, seed=1, dtype=dtype)
    exact = rows.double() @ weight.double().t() + (shift.double() if bias else 0)
    out = torch.empty(11, 45, dtype=dtype)
    assert_rounded_once(cpu_products.linear(rows, weight, shift, out=out), exact, dtype)
    assert relative_error(cpu_products.linear(rows, weight, shift), exact) < two_orders(71), (
        "a product without `out` is float32's"
    )


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize("rows", (0, 1, 13))
def test_outer_rounds_once(without_fast_products, dtype, rows):
    a, b = normal(rows, 70, seed=0, dtype=dtype), normal(rows, 45, seed=1, dtype=dtype)
    out = torch.full((70, 45), float("nan"), dtype=dtype)
    cpu_products.outer(a, b, out=out)
    assert_rounded_once(out, a.double().t() @ b.double(), dtype)


@pytest.mark.parametrize("transposed", (False, True), ids=("rows", "columns"))
def test_float32_in_parts(monkeypatch, transposed):
    """Few rows and a weight whose last part is short, as AVX2 takes them."""
    monkeypatch.setattr(cpu_products, "_cpu_is_avx2", lambda: True)
    monkeypatch.setattr(cpu_products, "PART_ROWS", 16)
    rows, shift = normal(11, 70, seed=0, dtype=torch.float32), normal(45, seed=2, dtype=torch.float32)
    weight = normal(70, 45, seed=1, dtype=torch.float32)
    weight = weight.t() if transposed else weight.t().contiguous()
    exact = rows.double() @ weight.double().t()
    assert relative_error(cpu_products.linear(rows, weight), exact) < two_orders(71)
    assert relative_error(cpu_products.linear(rows, weight, shift), exact + shift.double()) < two_orders(71)
    out = torch.full((70, 45), float("nan"))
    cpu_products.outer(rows, rows[:, :45], out=out)
    assert relative_error(out, rows.double().t() @ rows[:, :45].double()) < two_orders(71)


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize("activation, recompute", (("relu", "none"), ("gelu", "hz")))
def test_the_layer_without_fast_products(without_fast_products, dtype, activation, recompute):
    """Output and gradients are as near float64's as roundings of h, z and the results allow."""
    low = make(T=60, D=40, H=72, O=48, sharing="DEDR", masked=True, dtype=dtype)
    got, grads, _ = ours(low, activation, recompute)
    exact, exact_grads, _ = ours(low.to(torch.float64), activation, recompute)
    assert relative_error(got[0], exact[0]) < 2 * UNIT[dtype]
    for name, want in exact_grads.items():
        assert relative_error(grads[name], want) < 3 * UNIT[dtype], f"gradient of {name}"


@pytest.mark.parametrize("fast", (True, False))
def test_layer_norm_gradients_do_not_lose_accuracy_with_tokens(monkeypatch, fast):
    """PyTorch's sum over rows in bfloat16 is off by 2e-2 at this many."""
    if not fast:
        monkeypatch.setattr(cpu_products, "_cpu_multiplies", lambda dtype: dtype not in UNIT)
    low = make(T=1500, D=16, H=16, O=32, dtype=torch.bfloat16)
    exact = low.to(torch.float64)

    def layer_norm_gradients(p):
        out = functional.smop(p.x, p.gate_weight, *p.parameters.values(), top_k=2, sharing=p.sharing)
        parts = (out.hidden_states, out.router_logits, out.expert_weights)
        grads = gradients(p, objective(*parts, out.load_balancing_loss, out.router_z_loss))
        return out.expert_indices, grads["ln_weight"], grads["ln_bias"]

    experts, *got = layer_norm_gradients(low)
    same, *want = layer_norm_gradients(exact)
    assert torch.equal(experts, same), "the inputs no longer route alike: choose another seed"
    for name, g, w in zip(("ln_weight", "ln_bias"), got, want, strict=True):
        assert relative_error(g, w) < 8e-3, f"gradient of {name}"
