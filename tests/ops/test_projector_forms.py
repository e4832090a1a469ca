"""`SMoPProjector` with the options of other papers' layers, against their formulas token by token."""

import copy

import pytest
import torch
from torch import Tensor

from llama_smop import SMoPProjector
from llama_smop.ops import naive
from llama_smop.ops.checks import expert_activation
from llama_smop.projector_forms import INPUT_NORM_EPS
from tests.ops.problems import relative_error

D, H, O, E, K = 6, 5, 7, 4, 2
B, N = 2, 9
FORMS = {
    "tiny-audio": {
        "shared_experts": 1, "input_norm": "rms", "balance": "mse", "activation": "gelu", "layer_norm": False,
    },
    "swiglu, scaled": {
        "shared_experts": 1, "input_norm": "rms", "gated": True, "activation": "silu", "weight_scale": 2.5,
        "normalize_weights": False, "layer_norm": False,
    },
    "MOSA": {
        "router": "mlp", "router_hidden": 3, "router_bias": True, "balance": None, "layer_norm": False, "top_k": E,
    },
    "bias": {"router_bias": True, "input_norm": "layer"},
    "SMEAR": {"merge": "utterance", "balance": "mse", "router_bias": True, "layer_norm": False},
    "merged, gated": {"merge": "utterance", "balance": None, "gated": True, "input_norm": "rms"},
}  # fmt: skip


def projector(sharing: str = "JEJR", **form) -> SMoPProjector:
    form = {"top_k": K, **form}
    torch.manual_seed(0)
    made = SMoPProjector(D, H, O, num_experts=E, sharing=sharing, dtype=torch.float64, **form)
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.copy_(torch.randn_like(p) * (0.3 if "norm" in name else 1.0) + ("layernorm_weight" in name))
    return made


def inputs(sharing: str) -> tuple[Tensor, Tensor | None, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(B, N, D, generator=g, dtype=torch.float64)
    modality = None if sharing == "JEJR" else torch.randint(0, 2, (B, N), generator=g)
    return x, modality, torch.rand(B, N, generator=g) > 0.2


def literal(p: SMoPProjector, x: Tensor, modality: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(y, load balancing loss, z-loss) by the formulas, a token at a time."""
    form = p.form
    tokens = x.reshape(-1, D)
    if form.input_norm == "rms":
        tokens = naive.rms_norm(tokens, p.input_layernorm_weight, INPUT_NORM_EPS["rms"])
    elif form.input_norm == "layer":
        centred = torch.stack([t - t.sum() / D for t in tokens])
        tokens = naive.rms_norm(centred, p.input_layernorm_weight, INPUT_NORM_EPS["layer"]) + p.input_layernorm_bias
    m, real = None if modality is None else modality.reshape(-1), mask.reshape(-1)
    logits = []
    for t in range(len(tokens)):
        r = 0 if m is None else int(m[t])
        h = tokens[t]
        if p.router_weight is not None:
            h = (p.router_weight[r] @ h + p.router_bias[r]).clamp(min=0)
        logit = p.gate_weight[r] @ h
        logits.append(logit if p.gate_bias is None else logit + p.gate_bias[r])
    logits = torch.stack(logits)
    stacked = p.w1, p.bias1, p.w2, p.bias2, p.layernorm_weight, p.layernorm_bias
    X = len(p.w1) - form.shared_experts
    routed = naive.route(
        logits, None, m, real, p.top_k, X, normalize_weights=form.normalize_weights, weight_scale=form.weight_scale,
        balance_form=form.balance,
    )  # fmt: skip
    activation = expert_activation(p.activation, form.gated)
    if form.merge:
        y = naive.merged_projection(tokens.view(B, N, D), logits.view(B, N, E), modality, mask, stacked, activation)
    else:
        weights, experts = naive.with_shared_experts(routed.weights, routed.experts, X, form.shared_experts)
        y = naive.expert_projection(tokens, weights, experts, *stacked, activation, p.eps).view(B, N, O)
    return y, routed.load_balancing_loss, routed.router_z_loss


@pytest.mark.parametrize("sharing", ("JEJR", "JEDR", "DEDR"))
@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_its_formulas(name, sharing):
    p = projector(sharing, **FORMS[name])
    x, modality, mask = inputs(sharing)
    x.requires_grad_()
    out = p(x, modality, mask)
    expected = literal(p, x, modality, mask)
    got = out.hidden_states, out.load_balancing_loss, out.router_z_loss
    grads = []
    for results in (got, expected):
        g = torch.Generator().manual_seed(2)
        loss = sum((t * torch.randn(t.shape, generator=g, dtype=t.dtype)).sum() for t in results)
        grads.append(torch.autograd.grad(loss, (x, *p.parameters()), retain_graph=True, materialize_grads=True))
    for what, a, b in zip(("output", "load balancing loss", "z-loss"), got, expected, strict=True):
        assert relative_error(a, b) < 1e-10, what
    for what, a, b in zip(("x", *dict(p.named_parameters())), *grads, strict=True):
        assert relative_error(a, b) < 1e-10, f"gradient of {what}"


@pytest.mark.parametrize("name", FORMS)
def test_padding_may_hold_anything(name):
    """In forward and backward: a masked token's features reach nothing."""
    p = projector("DEDR", **FORMS[name])
    x, modality, mask = inputs("DEDR")
    results = []
    for value in (0.0, float("nan")):
        padded = x.masked_fill(~mask[..., None], value).requires_grad_()
        out = p(padded, modality, mask)
        loss = out.hidden_states.square().sum() + out.load_balancing_loss + out.router_z_loss
        results.append((out.hidden_states, *torch.autograd.grad(loss, (padded, *p.parameters()))))
    assert not results[0][0][~mask].any()
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("name", ("tiny-audio", "MOSA", "SMEAR"))
def test_compiled_as_one_graph(name):
    p = projector("DEDR", **FORMS[name]).float()
    x, modality, mask = inputs("DEDR")
    compiled = torch.compile(p, backend="eager", fullgraph=True)
    out, expected = compiled(x.float(), modality, mask), p(x.float(), modality, mask)
    assert torch.equal(out.hidden_states, expected.hidden_states)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", FORMS)
def test_shapes_on_the_meta_device(name):
    p, (x, modality, mask) = projector("DEDR", **FORMS[name]).to("meta"), inputs("DEDR")
    out = p(x.to("meta"), modality.to("meta"), mask.to("meta"))
    assert out.hidden_states.shape == (B, N, O) and out.router_logits.shape == (B, N, E)


def test_jitter_is_for_training_and_within_its_bounds():
    p = projector(router_jitter=0.1)
    x, _, mask = inputs("JEJR")
    calm = p.eval()(x, None, mask).router_logits
    assert torch.equal(p(x, None, mask).router_logits, calm)
    assert relative_error(calm, projector()(x, None, mask).router_logits) < 1e-12
    factors = (p.train()(x, None, mask).router_logits / calm)[mask]
    assert factors.min() >= 0.9 and factors.max() <= 1.1 and factors.std() > 0.03


def test_the_default_is_the_papers_form_with_its_parameters_alone():
    assert sorted(projector().state_dict()) == [
        "bias1", "bias2", "gate_weight", "layernorm_bias", "layernorm_weight", "w1", "w2",
    ]  # fmt: skip


def test_a_form_survives_a_state_dict_and_a_copy():
    for name, form in FORMS.items():
        p, x = projector("DEDR", **form), inputs("DEDR")
        other = SMoPProjector(D, H, O, num_experts=E, sharing="DEDR", dtype=torch.float64, **{"top_k": K, **form})
        other.load_state_dict(p.state_dict())
        for same in (other, copy.deepcopy(p)):
            assert torch.equal(same(*x).hidden_states, p(*x).hidden_states), name


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize("name", FORMS)
def test_lower_precision_and_autocast(name, dtype):
    """Within a few roundings of the float64 result; the experts are those that float64 chooses here."""
    p = projector(**FORMS[name])
    x, _, mask = inputs("JEJR")
    exact = p(x, None, mask).hidden_states
    low = copy.deepcopy(p).to(dtype)(x.to(dtype), None, mask).hidden_states
    bound = 40 * torch.finfo(dtype).eps
    assert low.dtype == dtype and relative_error(low, exact) < bound
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype):
            mixed = copy.deepcopy(p).float()(x.float(), None, mask).hidden_states
        assert relative_error(mixed, exact) < bound


@pytest.mark.parametrize(
    ("form", "says"),
    (
        ({"input_norm": "batch"}, "input_norm must be one of"),
        ({"router": "deep"}, "router must be one of"),
        ({"balance": "loss-free"}, "balance must be one of"),
        ({"merge": "token"}, "merge must be one of"),
        ({"gated": "yes"}, "gated must be True or False"),
        ({"shared_experts": -1}, "shared_experts must be a whole number of at least 0"),
        ({"shared_experts": 1.5}, "shared_experts must be a whole number of at least 0"),
        ({"router_hidden": 0}, "router_hidden must be a whole number of at least 1"),
        ({"weight_scale": float("nan")}, "weight_scale must be a number above 0"),
        ({"router_jitter": 1.0}, r"router_jitter must lie in \[0, 1\)"),
        ({"merge": "utterance"}, 'balance must be "mse" or None'),
        ({"merge": "utterance", "balance": None, "shared_experts": 1}, "no gate weights: leave shared_experts at 0"),
    ),
)  # fmt: skip
def test_options_that_are_none_or_do_not_go_together(form, says):
    with pytest.raises(ValueError, match=says):
        projector(**form)


def test_a_merge_needs_clips():
    p = projector(merge="utterance", balance=None)
    with pytest.raises(ValueError, match="needs clips"):
        p(torch.zeros(N, D, dtype=torch.float64))


@pytest.mark.parametrize("form", ({}, {"router_bias": True}, {"merge": "utterance", "balance": None}))
def test_shapes_that_do_not_fit(form):
    p, x = projector("DEDR", **form), torch.zeros(B, N, D, dtype=torch.float64)
    with pytest.raises(ValueError, match="modality is required"):
        p(x)
    with pytest.raises(ValueError, match="modality must have x's leading shape"):
        p(x, torch.zeros(N, dtype=torch.int64))
    with pytest.raises(TypeError, match="modality must be an integer tensor"):
        p(x, torch.zeros(B, N))
    with pytest.raises(IndexError, match=r"modality must lie in \[0, 1\]"):
        p(x, torch.full((B, N), 2))
