"""`replace_experts` on the authors' kind of mixture: same numbers, same keys, and back again."""

from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload, disk_offload, dispatch_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainingArguments

from llama_smop.integrations import replace_experts
from llama_smop.integrations.replace_experts import StackedMixture
from llama_smop.training.weight_decay import decayed_names
from tests.golden_files import golden
from tests.rounding import assert_same_gradients, assert_same_sums

ADDITIONS = 200  # D + H + O on the way forward and again on the way back, LayerNorm, and a hundred tokens
CASES = ("e4k2", "e8k1", "e3k3", "e4k2_empty_expert", "e4k1_collapsed")


class Mixture(nn.Module):
    """A mixture written the usual way: a mask an expert, `where`, `index_add_`."""

    def __init__(self, D=12, H=20, O=16, E=4, top_k=2, activation=nn.ReLU, layer_norm=True, bias=True, normalise=True):
        super().__init__()
        self.top_k, self.num_experts, self.normalise = top_k, E, normalise
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(
                nn.Linear(D, H, bias=bias), activation(), nn.Linear(H, O, bias=bias),
                *([nn.LayerNorm(O)] if layer_norm else []),
            )
            for _ in range(E)
        )  # fmt: skip

    def forward(self, hidden_states):
        x = hidden_states.view(-1, hidden_states.shape[-1])
        logits = self.gate(x)
        weights, chosen = F.softmax(logits, dim=1, dtype=torch.float).topk(self.top_k, dim=-1)
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights.to(x.dtype)
        out = torch.zeros(x.shape[0], self.experts[0][2].out_features, dtype=x.dtype)
        for e, expert in enumerate(self.experts):
            tokens, k = torch.where(chosen == e)
            out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, k, None])
        return out.view(*hidden_states.shape[:-1], -1), logits


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(12, 12)
        self.projector = Mixture(**options)

    def forward(self, x):
        return self.projector(self.encoder(x))


def from_golden(case: str):
    tensors, notes = golden(f"topk_moe/{case}")
    model = Model(E=notes["num_experts"], top_k=notes["top_k"])
    state = {n.removeprefix("param."): t for n, t in tensors.items() if n.startswith("param.")}
    model.projector.load_state_dict(state)
    return tensors, model


def results(mixture, x, upstream):
    """Output, logits, gradient of x, and gradients by state-dict key."""
    x = x.clone().requires_grad_()
    out, logits = mixture(x)
    mixture.zero_grad()
    (out * upstream).sum().backward()
    grads = deepcopy(mixture)  # the same keys, holding the gradients
    with torch.no_grad():
        for p, q in zip(grads.parameters(), mixture.parameters(), strict=True):
            p.copy_(q.grad)
    return out, logits, x.grad, grads.state_dict()


@pytest.mark.parametrize("case", CASES)
def test_golden_before_and_after(case):
    tensors, model = from_golden(case)
    before = results(model.projector, tensors["x"], tensors["upstream"])
    report = replace_experts(model)
    assert report.replaced == ["projector"] and not report.left_alone
    assert isinstance(model.projector, StackedMixture)
    for out, logits, dx, grads in (before, results(model.projector, tensors["x"], tensors["upstream"])):
        assert_same_sums(out, tensors["out"], ADDITIONS, "the output")
        assert_same_sums(logits, tensors["router_logits"], ADDITIONS, "the router's logits")
        assert_same_sums(dx, tensors["grad.x"], ADDITIONS, "the gradient of x")
        assert_same_gradients(grads, {key: tensors[f"grad.{key}"] for key in grads}, ADDITIONS)


@pytest.mark.parametrize(
    "options",
    (
        {"activation": nn.GELU},
        {"activation": nn.SiLU, "layer_norm": False},
        {"bias": False},
        {"E": 2, "top_k": 1, "layer_norm": False, "bias": False},
    ),
    ids=str,
)
def test_every_variant_of_the_shape(options):
    model, x = Model(**options), torch.randn(3, 5, 12)
    expected, expected_logits = model(x)
    assert replace_experts(model).replaced == ["projector"]
    out, logits = model(x)
    assert_same_sums(out, expected, ADDITIONS, "the output")
    assert_same_sums(logits, expected_logits, ADDITIONS, "the router's logits")


def test_old_checkpoints_load_and_new_ones_load_in_the_old_code(tmp_path):
    old, other = Model(), Model()
    for p in other.parameters():
        nn.init.normal_(p)
    keys = list(old.state_dict())
    x = torch.randn(2, 5, 12)
    replace_experts(old)
    assert list(old.state_dict()) == keys, "same keys, same order"
    old.load_state_dict(other.state_dict())
    assert_same_sums(old(x)[0], other(x)[0], ADDITIONS, "the output")
    save_file(old.state_dict(), tmp_path / "new.safetensors")
    torch.save(old.state_dict(), tmp_path / "new.pt")
    for state in (load_file(tmp_path / "new.safetensors"), torch.load(tmp_path / "new.pt", weights_only=True)):
        plain = Model()
        plain.load_state_dict(state)
        assert torch.equal(plain.projector.experts[3][2].weight, other.projector.experts[3][2].weight)


def test_bad_checkpoints_are_refused_as_before():
    model = Model()
    replace_experts(model)
    state = model.state_dict()
    del state["projector.experts.1.2.bias"]
    state["projector.experts.9.0.weight"] = torch.zeros(1)
    state["projector.experts.0.0.bias"] = torch.zeros(3)
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(state)
    for part in (
        'Missing key(s) in state_dict: "projector.experts.1.2.bias"',
        'Unexpected key(s) in state_dict: "projector.experts.9.0.weight"',
        "size mismatch for projector.experts.0.0.bias: expected (20,), got (3,)",
    ):
        assert part in str(caught.value)
    found = model.load_state_dict({"projector.experts.0.0.bias": torch.ones(20)}, strict=False)
    assert "projector.experts.1.0.bias" in found.missing_keys and model.projector.experts.bias1[0].eq(1).all()


def test_assigning_a_state_dict_to_a_meta_model():
    source = Model()
    with torch.device("meta"):
        model = Model()
    report = replace_experts(model)
    assert report.replaced == ["projector"] and model.projector.experts.w1.is_meta
    model.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(4, 12)
    assert_same_sums(model(x)[0], source(x)[0], ADDITIONS, "the output")


def test_undo_returns_the_original_with_the_trained_weights():
    model, x = Model(), torch.randn(6, 12)
    original = model.projector
    report = replace_experts(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x)[0].square().sum().backward()
    optimizer.step()
    trained, state = model(x)[0], model.state_dict()
    report.undo()
    assert model.projector is original
    assert_same_sums(model(x)[0], trained, ADDITIONS, "the output")
    assert list(model.state_dict()) == list(state)
    assert all(p.is_leaf and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64), ids=str)
def test_other_dtypes(dtype):
    model, x = Model().to(dtype), torch.randn(40, 12, dtype=dtype)
    expected, expected_logits = model(x)
    assert replace_experts(model).replaced == ["projector"]
    out, logits = model(x)
    assert out.dtype == logits.dtype == dtype and model.projector.experts.w1.dtype == dtype
    near = (out - expected).abs().amax(-1) < 0.05 * expected.abs().max()
    assert near.float().mean() > 0.9  # a near tie may be routed otherwise
    assert_same_sums(logits, expected_logits, ADDITIONS, "the router's logits")


def unreadable(model):
    model.projector.forward = lambda x, y: (x, y)


def test_dry_run_lists_and_changes_nothing():
    model = Model()
    original = model.projector
    report = replace_experts(model, dry_run=True)
    assert report.replaced == ["projector"] and model.projector is original
    assert str(report) == "projector: replaced"


def differing_experts(model):
    model.projector.experts[1][1] = nn.GELU()


def dropout_inside(model):
    for e in range(4):
        model.projector.experts[e].insert(1, nn.Dropout(0.1))


def deep_router(model):
    model.projector.gate = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 4))


def own_parameter(model):
    model.projector.scale = nn.Parameter(torch.ones(16))


def half_frozen(model):
    model.projector.experts[0].requires_grad_(False)


def extra_part(model):
    model.projector.dropout = nn.Dropout(0.1)


def three_results(model):
    forward = model.projector.forward
    model.projector.forward = lambda x: (*forward(x), None)


@pytest.mark.parametrize(
    "change, why",
    [
        (differing_experts, "its experts differ in shape, activation"),
        (half_frozen, "or in what is frozen"),
        (dropout_inside, "its experts are not Linear, ReLU | GELU | SiLU, Linear[, LayerNorm]"),
        (deep_router, "its router is not a Linear, or Linear, ReLU, Linear"),
        (extra_part, "it has more parts than router, experts"),
        (own_parameter, "it has parameters of its own"),
        (unreadable, "it cannot be called with hidden states alone (TypeError"),
        (three_results, "it does not return its output, or (output, router_logits)"),
    ],
)
def test_what_does_not_fit_is_left_alone_with_the_reason(change, why):
    model = Model()
    change(model)
    kept = model.projector
    report = replace_experts(model)
    assert not report.replaced and model.projector is kept
    assert why in report.left_alone["projector"] and why in str(report)


def test_a_mixture_that_computes_something_else_is_left_alone():
    model = Model()  # the shape fits, the numbers do not
    forward = model.projector.forward
    model.projector.forward = lambda x: (forward(x)[0].tanh(), forward(x)[1])
    report = replace_experts(model)
    assert report.left_alone == {
        "projector": "it computes another function than the weighted mean of its top-K experts"
    }


def test_top_k_is_found_by_trying_when_the_module_does_not_say():
    model = Model(top_k=3)
    model.projector.chosen = model.projector.top_k
    del model.projector.top_k
    model.projector.forward = lambda x: _forward_with(model.projector, x)
    report = replace_experts(model)
    assert report.replaced == ["projector"] and model.projector.top_k == 3


def _forward_with(mixture, x):
    other = Mixture(top_k=mixture.chosen)
    other.load_state_dict(mixture.state_dict())
    return other(x)


def test_a_mixture_used_twice_stays_one_module():
    model = Model()
    model.again = model.projector
    report = replace_experts(model)
    assert report.replaced == ["projector", "again"] and model.again is model.projector


def test_plain_settings_survive_and_frozen_stays_frozen():
    model = Model()
    model.projector.experts.requires_grad_(False)
    model.eval()
    replace_experts(model)
    assert model.projector.num_experts == 4 and not model.projector.training
    assert not model.projector.experts.w1.requires_grad and model.projector.gate.weight.requires_grad


def test_the_module_itself_has_no_place_to_be_replaced_in():
    with pytest.raises(ValueError, match="module is itself a mixture: wrap it"):
        replace_experts(Mixture())


@pytest.mark.parametrize("options", ({}, {"bias": False}, {"layer_norm": False}), ids=str)
def test_weight_decay_spares_what_it_spared_before(options, tmp_path):
    """By transformers' Trainer as it is, and by this package's rule."""

    def numbers_decayed(rule) -> int:
        model = Model(**options)
        before = sum(model.get_parameter(name).numel() for name in rule(model))
        replace_experts(model)
        after = sum(model.get_parameter(name).numel() for name in rule(model))
        assert after == before
        return after

    trainer = Trainer(Model(), TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    matrices = 12 * 12 + 4 * 12 + 4 * (12 * 20 + 20 * 16)
    assert numbers_decayed(trainer.get_decay_parameter_names) == numbers_decayed(decayed_names) == matrices


@pytest.mark.parametrize("place", ("cpu", "disk"))
def test_weights_that_accelerate_offloads_are_refused_in_one_line(tmp_path, place):
    model, x = Model().eval(), torch.randn(2, 5, 12)
    report = replace_experts(model)
    expected = model(x)[0]
    offload = {"cpu": cpu_offload, "disk": partial(disk_offload, offload_dir=tmp_path)}[place]
    with torch.no_grad(), pytest.raises(ValueError, match=r"replace_experts replaced cannot be offloaded.*device_map"):
        offload(deepcopy(model), execution_device=torch.device("cpu"))(x)
    placed = dispatch_model(deepcopy(model), {"encoder": "disk", "projector": "cpu"}, "cpu", offload_dir=tmp_path)
    torch.testing.assert_close(placed(x)[0], expected)
    report.undo()
    torch.testing.assert_close(offload(model, execution_device=torch.device("cpu"))(x)[0], expected)
