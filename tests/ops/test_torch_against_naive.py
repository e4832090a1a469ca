"""The PyTorch backend against the token-by-token float64 loop: values and every gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama_smop import functional
from llama_smop.ops import naive
from tests.ops.problems import PARAMETERS, Problem, make, relative_error

SHARINGS = ("JEJR", "JEDR", "DEDR")


def upstream(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(like.dtype)


def objective(y, logits, weights, balance, z_loss) -> Tensor:
    """A scalar that depends on every differentiable output."""
    total = 0.3 * balance + 0.2 * z_loss
    for seed, output in enumerate((y, logits, weights)):
        total = total + (output * upstream(output, seed)).sum().to(balance.dtype)
    return total


def ours(p: Problem, activation="relu", recompute="none"):
    out = functional.smop(
        p.x, p.gate_weight, *p.parameters.values(), top_k=p.top_k, sharing=p.sharing, modality=p.modality, mask=p.mask,
        activation=activation, recompute=recompute, backend="torch",
    )  # fmt: skip
    parts = (out.hidden_states, out.router_logits, out.expert_weights, out.load_balancing_loss, out.router_z_loss)
    return parts, gradients(p, objective(*parts)), out


def literal(p: Problem, activation="relu", experts: Tensor | None = None):
    r = naive.route(p.x, p.gate_weight, p.modality, p.mask, p.top_k, p.num_experts, experts)
    y = naive.expert_projection(p.x, r.weights, r.experts, *(p.parameters[n] for n in PARAMETERS), activation)
    parts = (y, r.logits, r.weights, r.load_balancing_loss, r.router_z_loss)
    return parts, gradients(p, objective(*parts)), r


def gradients(p: Problem, loss: Tensor) -> dict[str, Tensor]:
    leaves = p.leaves()
    if not loss.requires_grad:
        return {n: torch.zeros_like(t) for n, t in leaves.items()}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(leaves.items(), grads, strict=True)}


def assert_equal_to_naive(p: Problem, activation="relu", recompute="none", tolerance=1e-11) -> None:
    parts, grads, out = ours(p, activation, recompute)
    expected, expected_grads, routing = literal(p, activation)
    assert torch.equal(out.expert_indices.long(), routing.experts), "experts"
    counts = routing.counts.reshape(-1) if p.sharing == "DEDR" else routing.counts.sum(0)
    assert torch.equal(out.expert_counts.long(), counts), "counts"
    names = ("output", "logits", "weights", "load balancing loss", "z-loss")
    for name, got, want in zip(names, parts, expected, strict=True):
        assert relative_error(got, want) < tolerance, name
    for name, got in grads.items():
        assert relative_error(got, expected_grads[name]) < tolerance, f"gradient of {name}"


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("masked", (False, True), ids=("all", "masked"))
@pytest.mark.parametrize("top_k", (1, 2, 4))
def test_every_sharing(sharing, masked, top_k):
    assert_equal_to_naive(make(sharing=sharing, masked=masked, top_k=top_k))


@pytest.fixture
def two_threads():
    """PyTorch deals rows of no width out to threads, and fails."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("width", ("H", "O"))
def test_no_hidden_units_or_no_outputs(width, two_threads):
    """What an operator makes of nothing: empty or zero, not an error of another library."""
    p = make(sharing="DEDR", top_k=1, dtype=torch.float32)
    for name, dims in {"w1": "XHD", "b1": "XH", "w2": "XOH", "b2": "XO", "ln_weight": "XO", "ln_bias": "XO"}.items():
        if width in dims:
            p.parameters[name] = p.parameters[name].detach().narrow(dims.index(width), 0, 0).requires_grad_()
    assert_equal_to_naive(p, tolerance=1e-5)


def test_no_features(two_threads):
    p = make(sharing="JEJR", top_k=1, dtype=torch.float32)
    p.x, p.gate_weight = (t.detach()[..., :0].requires_grad_() for t in (p.x, p.gate_weight))
    p.parameters["w1"] = p.parameters["w1"].detach()[..., :0].requires_grad_()
    assert_equal_to_naive(p, tolerance=1e-5)


@pytest.mark.parametrize("activation", ("relu", "gelu", "silu"))
@pytest.mark.parametrize("recompute", ("none", "h", "z", "hz"))
def test_activations_and_recompute(activation, recompute):
    assert_equal_to_naive(make(sharing="DEDR", masked=True), activation, recompute)


@pytest.mark.parametrize("bias, layer_norm", ((False, True), (True, False), (False, False)))
def test_without_bias_or_layer_norm(bias, layer_norm):
    assert_equal_to_naive(make(bias=bias, layer_norm=layer_norm, masked=True))


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("T", (0, 1))
def test_no_token_and_one(sharing, T):
    assert_equal_to_naive(make(T=T, sharing=sharing))


@pytest.mark.parametrize("sharing", SHARINGS)
def test_all_tokens_masked(sharing):
    p = make(sharing=sharing)
    p.mask = torch.zeros(p.x.shape[0], dtype=torch.bool)
    assert_equal_to_naive(p)


def test_one_modality_absent():
    p = make(sharing="DEDR")
    p.modality = torch.ones_like(p.modality)
    assert_equal_to_naive(p)


def test_ties_go_to_the_lower_expert():
    p = make(E=5, top_k=3)
    p.gate_weight.data.zero_()
    _, _, out = ours(p)
    assert out.expert_indices.unique(dim=0).tolist() == [[0, 1, 2]]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    T=st.integers(0, 20),
    D=st.integers(1, 9),
    H=st.integers(1, 9),
    O=st.integers(2, 9),
    E=st.integers(1, 6),
    choice=st.integers(0, 5),
    sharing=st.sampled_from(SHARINGS),
    masked=st.booleans(),
    skew=st.sampled_from((0.0, 1.0, 30.0)),
    activation=st.sampled_from(("relu", "gelu", "silu")),
    recompute=st.sampled_from(("none", "hz")),
    seed=st.integers(0, 9),
)
def test_any_shape(T, D, H, O, E, choice, sharing, masked, skew, activation, recompute, seed):
    # At width 1 LayerNorm is constant and at 2 nearly: 1/σ magnifies rounding there, hence the looser bound.
    p = make(T, D, H, O, E, 1 + choice % E, sharing, masked=masked, skew=skew, seed=seed)
    assert_equal_to_naive(p, activation, recompute, tolerance=1e-7)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("sharing", ("JEJR", "DEDR"))
def test_rounding_is_within_twice_that_of_plain_pytorch(dtype, sharing):
    """Against float64 at the same, rounded inputs; plain PyTorch is the literal loop in the same dtype."""
    low = make(T=48, D=40, H=56, O=48, sharing=sharing, masked=True, dtype=dtype)
    parts, grads, out = ours(low)
    exact, exact_grads, _ = literal(low.to(torch.float64), experts=out.expert_indices)
    plain, plain_grads, _ = literal(low.to(dtype), experts=out.expert_indices)
    for i, name in enumerate(("output", "logits", "weights", "load balancing loss", "z-loss")):
        bound = 2 * relative_error(plain[i], exact[i]) + 1e-5
        assert relative_error(parts[i], exact[i]) <= bound, name
    for name, want in exact_grads.items():
        bound = 2 * relative_error(plain_grads[name], want) + 1e-5
        assert relative_error(grads[name], want) <= bound, f"gradient of {name}"


def test_padding_may_hold_anything():
    """A masked token's features reach nothing, not even when they are NaN."""
    p = make(sharing="DEDR", masked=True)
    garbage = p.to(torch.float64)
    garbage.x.data[~p.mask] = float("nan")
    for got, want in zip(ours(garbage)[0], ours(p)[0], strict=True):
        assert torch.equal(got, want)
    clean = ours(p)[1]
    for name, grad in ours(garbage)[1].items():
        assert torch.equal(grad, clean[name]), name


def test_masked_tokens_yield_zero_and_get_no_gradient():
    p = make(sharing="JEDR", masked=True)
    parts, grads, out = ours(p)
    assert not parts[0][~p.mask].any() and not grads["x"][~p.mask].any()
    assert (out.expert_indices[~p.mask] == p.num_experts).all() and not out.expert_weights[~p.mask].any()


def test_idle_experts_get_zero_gradients():
    """Gradient memory is reused, so whatever an idle expert's slice held before must be overwritten."""
    big = make(T=8, D=64, H=1024, O=64, E=8, top_k=1, skew=50.0, dtype=torch.float32)
    for attempt in range(2):
        _, grads, out = ours(big)
        idle = out.expert_counts == 0
        assert idle.sum() == 7
        for name in PARAMETERS:
            assert not grads[name][idle].any(), f"{name}, attempt {attempt}"
            grads[name].fill_(float("nan"))


def test_gradients_are_the_same_from_run_to_run():
    p = make(T=64, D=32, H=48, O=40, sharing="DEDR", masked=True, dtype=torch.float32)
    first, second = ours(p)[1], ours(p)[1]
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_non_contiguous_inputs():
    p = make(T=12, sharing="DEDR", masked=True)
    strided = p.to(torch.float64)
    strided.x = strided.x.detach().t().contiguous().t().requires_grad_()
    strided.gate_weight = strided.gate_weight.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    strided.parameters = {
        n: t.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for n, t in p.parameters.items()
    }
    strided.mask = p.mask.repeat_interleave(2)[::2]
    strided.modality = p.modality.repeat_interleave(2)[::2]
    assert not strided.x.is_contiguous() and not strided.parameters["w1"].is_contiguous()
    for got, want in zip(ours(strided)[0], ours(p)[0], strict=True):
        assert torch.equal(got, want)
    expected = ours(p)[1]
    for name, grad in ours(strided)[1].items():
        assert torch.equal(grad, expected[name]), name


def test_leading_dimensions_are_kept():
    p = make(T=12, sharing="JEDR", masked=True)
    flat = ours(p)[2]
    shaped = functional.smop(
        p.x.view(3, 4, -1), p.gate_weight, *p.parameters.values(), top_k=2, sharing="JEDR",
        modality=p.modality.view(3, 4), mask=p.mask.view(3, 4),
    )  # fmt: skip
    for got, want in zip(shaped[:4], flat[:4], strict=True):
        assert got.shape[:2] == (3, 4) and torch.equal(got.reshape(want.shape), want)


def test_caller_made_routing_may_skip_and_repeat_experts():
    p = make(T=9, E=3, top_k=2)
    experts = torch.tensor([[0, 0], [3, 3], [3, 1], [2, 3], [1, 1], [0, 2], [2, 2], [1, 0], [3, 0]])
    weights = torch.rand(9, 2, dtype=torch.float64, requires_grad=True)
    arguments = tuple(p.parameters[n] for n in PARAMETERS)
    got = functional.expert_projection(p.x, weights, experts, *arguments)
    want = naive.expert_projection(p.x, weights, experts, *arguments)
    assert relative_error(got, want) < 1e-11
    for a, b in zip(*(torch.autograd.grad(o.square().sum(), [weights, p.x]) for o in (got, want)), strict=True):
        assert relative_error(a, b) < 1e-11


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), max_size=12))
def test_schedule_is_the_stable_sort_by_expert(rows):
    experts = torch.tensor(rows, dtype=torch.int64).view(-1, 3)
    order, inverse, offs = torch.ops.smop.schedule(experts, 5, "torch")
    expected_order, expected_inverse, expected_offs = naive.schedule(experts, 5)
    assert order[: len(expected_order)].tolist() == expected_order
    assert inverse.flatten().tolist() == expected_inverse and offs.tolist() == expected_offs


def test_a_compiled_call_takes_offsets_beyond_the_rows_as_clamped():
    """Compiled code reads no value of a caller's schedule, which eager code refuses."""
    p = make(T=8, D=6, H=5, O=4)
    weights, experts = torch.rand(8, 2), torch.randint(0, p.num_experts, (8, 2))
    order, inverse, offs = torch.ops.smop.schedule(experts, p.num_experts, "torch")
    beyond = torch.where(offs == 16, 100, offs)

    def project(ends):
        leaves = [p.parameters[n].detach().requires_grad_() for n in ("w1", "b1", "w2", "b2", "ln_weight", "ln_bias")]
        y = functional.expert_projection(p.x, weights, experts, *leaves, schedule=(order, inverse, ends))
        return y, torch.autograd.grad(y.sum(), leaves)

    (y, grads), (expected, expected_grads) = torch.compile(project, backend="aot_eager")(beyond), project(offs)
    assert torch.equal(y, expected) and all(map(torch.equal, grads, expected_grads))
    with pytest.raises(IndexError, match="offs must rise from 0 to at most 16"):
        project(beyond)
