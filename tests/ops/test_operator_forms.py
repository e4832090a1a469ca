"""Forms of the projector beyond the paper's, on the PyTorch backend, against the token-by-token float64 loop."""

import pytest
import torch
from torch import Tensor

from llama_smop import functional
from llama_smop.ops import expert_projection, naive
from llama_smop.ops.checks import expert_activation, layout
from tests.ops.problems import PARAMETERS, relative_error

SHARINGS = ("JEJR", "JEDR", "DEDR")
T, D, H, O, E, K = 13, 6, 5, 7, 4, 2
TOLERANCE = 1e-11  # float64: a few hundred roundings


def problem(sharing: str, *, gated: bool = False, shared: int = 0, masked: bool = False, seed: int = 0) -> dict:
    """Leaves in float64, and modality and mask."""
    g = torch.Generator().manual_seed(seed)
    R, X = layout(sharing, E)
    X, F = X + shared, 2 * H if gated else H

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    leaves = {
        "x": normal(T, D), "gate_weight": normal(R, E, D), "w1": normal(X, F, D), "b1": normal(X, F),
        "w2": normal(X, O, H), "b2": normal(X, O), "ln_weight": normal(X, O), "ln_bias": normal(X, O),
    }  # fmt: skip
    modality = torch.randint(0, 2, (T,), generator=g) if R == 2 else None
    mask = torch.rand(T, generator=g) > 0.3 if masked else None
    return {"leaves": leaves, "modality": modality, "mask": mask, "sharing": sharing, "shared": shared, "gated": gated}


def upstream(y: Tensor) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=y.dtype)


def compare(leaves: dict, ours: dict, literal: dict) -> None:
    """Values, and gradients of a scalar that depends on all of them."""
    assert ours.keys() == literal.keys()
    for name in ours:
        assert relative_error(ours[name], literal[name]) < TOLERANCE, name
    grads = []
    for results in (ours, literal):
        loss = sum((t * upstream(t)).sum() for t in results.values()) + sum(0 * t.sum() for t in leaves.values())
        grads.append(torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, materialize_grads=True))
    for name, got, want in zip(leaves, *grads, strict=True):
        assert relative_error(got, want) < TOLERANCE, f"gradient of {name}"


def run(p: dict, activation: str = "relu", top_k: int = K, given_logits: bool = False, **form) -> tuple[dict, dict]:
    """(ours, literal), each by name."""
    leaves, modality, mask, shared = p["leaves"], p["modality"], p["mask"], p["shared"]
    parameters = [leaves[n] for n in PARAMETERS]
    X = layout(p["sharing"], E)[1]
    x, gate = leaves["x"], leaves["gate_weight"]
    logits = None
    if given_logits:  # as a router of the caller's own: of each token's own modality
        router = torch.zeros(T, dtype=torch.int64) if modality is None else modality
        logits = torch.einsum("td,ted->te", x, gate[router]) + torch.linspace(-1, 1, E, dtype=x.dtype)
    out = functional.smop(
        x, None if given_logits else gate, *parameters, top_k=top_k, sharing=p["sharing"], modality=modality,
        mask=mask, activation=activation, gated=p["gated"], shared_experts=shared, router_logits=logits,
        backend="torch", **form,
    )  # fmt: skip
    r = naive.route(logits if given_logits else x, None if given_logits else gate, modality, mask, top_k, X, **form)
    weights, experts = naive.with_shared_experts(r.weights, r.experts, X, shared)
    y = naive.expert_projection(x, weights, experts, *parameters, expert_activation(activation, p["gated"]))
    assert torch.equal(out.expert_indices.long(), r.experts)
    counts = r.counts.reshape(-1) if p["sharing"] == "DEDR" else r.counts.sum(0)
    assert torch.equal(out.expert_counts.long(), counts), "the shared experts do not count"
    ours = {
        "y": out.hidden_states, "weights": out.expert_weights, "logits": out.router_logits,
        "balance": out.load_balancing_loss, "z": out.router_z_loss,
    }  # fmt: skip
    literal = {
        "y": y, "weights": r.weights, "logits": r.logits, "balance": r.load_balancing_loss, "z": r.router_z_loss
    }  # fmt: skip
    return ours, literal


@pytest.mark.parametrize("activation", ("relu", "gelu", "silu"))
@pytest.mark.parametrize("sharing", ("JEJR", "DEDR"))
def test_gated_experts(activation, sharing):
    p = problem(sharing, gated=True, masked=True)
    compare(p["leaves"], *run(p, activation))


@pytest.mark.parametrize("recompute", ("h", "z", "hz", 0, 10**6))
def test_gated_experts_computed_again(recompute):
    p = problem("JEDR", gated=True, masked=True)
    ours, literal = run(p, "silu")
    leaves, parameters = p["leaves"], [p["leaves"][n] for n in PARAMETERS]
    again = functional.smop(
        leaves["x"], leaves["gate_weight"], *parameters, top_k=K, sharing="JEDR", modality=p["modality"],
        mask=p["mask"], activation="silu", gated=True, recompute=recompute, backend="torch",
    )  # fmt: skip
    compare(leaves, ours | {"y": again.hidden_states}, literal)


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("shared", (1, 2))
@pytest.mark.parametrize("masked", (False, True))
def test_shared_experts(sharing, shared, masked):
    p = problem(sharing, shared=shared, masked=masked)
    compare(p["leaves"], *run(p))


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("form", ({"normalize_weights": False}, {"weight_scale": 2.5}), ids=("as they are", "scaled"))
@pytest.mark.parametrize("given_logits", (False, True))
def test_gate_weights(sharing, form, given_logits):
    p = problem(sharing, masked=True)
    compare(p["leaves"], *run(p, given_logits=given_logits, **form))


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("top_k", (1, 2, E))
def test_logits_of_another_router(sharing, top_k):
    p = problem(sharing, masked=True, shared=1, gated=True)
    ours, literal = run(p, "gelu", top_k=top_k, given_logits=True, normalize_weights=False, weight_scale=0.5)
    compare(p["leaves"], ours, literal)


def test_no_tokens_and_all_masked():
    for masked in (0, T):
        p = problem("DEDR", gated=True, shared=1)
        p["mask"] = torch.arange(T) >= masked
        compare(p["leaves"], *run(p, "silu", given_logits=True, normalize_weights=False))
    empty = functional.smop(
        torch.randn(0, D), torch.randn(1, E, D), torch.randn(E + 1, 2 * H, D), None, torch.randn(E + 1, O, H), None,
        None, None, top_k=K, sharing="JEJR", gated=True, shared_experts=1, normalize_weights=False, backend="torch",
    )  # fmt: skip
    assert empty.hidden_states.shape == (0, O)


def test_route_and_route_logits_agree():
    p = problem("DEDR", masked=True)
    x, gate, modality, mask = p["leaves"]["x"], p["leaves"]["gate_weight"], p["modality"], p["mask"]
    options = {"top_k": K, "num_experts": 2 * E, "modality": modality, "mask": mask, "weight_scale": 3.0}
    one = functional.route(x, gate, **options)
    other = functional.route_logits(torch.einsum("td,ted->te", x, gate[modality]), **options)
    for name, a, b in zip(one._fields, one, other, strict=True):
        assert relative_error(a, b) < TOLERANCE, name


def test_gradients_by_differences():
    """Gated and shared experts, own weights: against finite differences, which know none of the formulas."""
    p = problem("JEJR", gated=True, shared=1)
    leaves = {n: t.detach()[:3].clone().requires_grad_() if n == "x" else t for n, t in p["leaves"].items()}

    def function(*values):
        v = dict(zip(leaves, values, strict=True))
        out = functional.smop(
            v["x"], v["gate_weight"], *(v[n] for n in PARAMETERS), top_k=K, sharing="JEJR", activation="silu",
            gated=True, shared_experts=1, normalize_weights=False, weight_scale=1.5, backend="torch",
        )  # fmt: skip
        return out.hidden_states, out.load_balancing_loss, out.router_z_loss

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)


def test_opcheck_of_gated_experts():
    p = problem("JEJR", gated=True)
    x, parameters = p["leaves"]["x"], [p["leaves"][n] for n in PARAMETERS]
    r = functional.route(x, p["leaves"]["gate_weight"], top_k=K)
    choices = r.weights.detach().requires_grad_(), r.experts, r.order, r.inverse, r.offs
    operator = expert_projection.expert_projection.op
    torch.library.opcheck(operator, (x, *choices, *parameters, "swiglu", 1e-5, "none", "torch"))


@pytest.mark.parametrize("experts", (E, 2 * E))
@pytest.mark.parametrize("with_modality", (False, True))
@pytest.mark.parametrize("gated", (False, True))
def test_merged_experts(experts, with_modality, gated):
    if experts > E and not with_modality:
        pytest.skip("two sets of experts need a modality")
    g = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    F = 2 * H if gated else H
    leaves = {
        "x": normal(3, 6, D), "logits": normal(3, 6, E), "w1": normal(experts, F, D), "b1": normal(experts, F),
        "w2": normal(experts, O, H), "b2": normal(experts, O), "ln_weight": normal(experts, O),
        "ln_bias": normal(experts, O),
    }  # fmt: skip
    modality = torch.randint(0, 2, (3, 6), generator=g) if with_modality else None
    mask = torch.rand(3, 6, generator=g) > 0.3
    mask[2] = False  # a clip of padding
    parameters = tuple(leaves[n] for n in PARAMETERS)
    y = functional.merged_projection(
        leaves["x"], leaves["logits"], *parameters, modality=modality, mask=mask, activation="silu", gated=gated,
        backend="torch",
    )  # fmt: skip
    literal = naive.merged_projection(
        leaves["x"], leaves["logits"], modality, mask, parameters, expert_activation("silu", gated)
    )
    compare(leaves, {"y": y}, {"y": literal})


def test_more_clips_than_a_backend_takes_experts(monkeypatch):
    from llama_smop.ops import merge

    x, logits = torch.randn(5, 3, D), torch.randn(5, 3, E)
    parameters = torch.randn(E, H, D), None, torch.randn(E, O, H), None
    whole = functional.merged_projection(x, logits, *parameters)
    monkeypatch.setattr(merge, "MAX_GROUPS", 2)
    assert torch.allclose(functional.merged_projection(x, logits, *parameters), whole, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "says"),
    (
        ({"gated": True}, "w1 of gated experts must hold gate and up rows"),
        ({"shared_experts": 1}, "w1 must hold 5 experts for JEJR with 1 shared, got 4"),
        ({"shared_experts": -1}, "shared_experts must be at least 0"),
        ({"weight_scale": 0.0}, "weight_scale must be a number above 0"),
        ({"normalize_weights": 0}, "normalize_weights must be True or False"),
        ({"router_logits": torch.zeros(T, E)}, "pass gate_weight, or None in its place and router_logits"),
        ({"activation": "swiglu"}, "with gated=True"),
    ),
)
def test_what_does_not_fit_is_refused_by_name(change, says):
    p = problem("JEJR")
    leaves = [t.detach() for t in p["leaves"].values()]
    with pytest.raises(ValueError, match=says):
        functional.smop(*leaves, top_k=K, sharing="JEJR", **change)


def test_logits_that_do_not_fit_are_refused_by_name():
    leaves = [t.detach() for t in problem("DEDR")["leaves"].values()]
    leaves[1] = None
    for logits, says in ((torch.zeros(T - 1, E), "leading shape"), (torch.zeros(T, E), "modality is required")):
        with pytest.raises(ValueError, match=says):
            functional.smop(*leaves, top_k=K, sharing="DEDR", router_logits=logits)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_the_cuda_backend_refuses_gated_experts_by_name(dtype):
    with pytest.raises(RuntimeError, match="no gated experts; use the Triton backend"):
        functional.expert_projection(
            torch.zeros(2, D, dtype=dtype), torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int32),
            torch.zeros(1, 2 * H, D, dtype=dtype), None, torch.zeros(1, O, H, dtype=dtype), None, gated=True,
            activation="silu", backend="cuda",
        )  # fmt: skip
