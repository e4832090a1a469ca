"""The authors' mixture, its gradients and both auxiliary losses, number by number."""

import pytest
import torch

from llama_smop import functional
from tests.golden_files import golden
from tests.rounding import two_orders

ROUNDING = two_orders(200)  # D + H + O on the way forward and again on the way back, LayerNorm, a hundred tokens
CASES = ("e4k2", "e8k1", "e3k3", "e4k2_empty_expert", "e4k1_collapsed")
NAMES = {
    "w1": "0.weight",
    "b1": "0.bias",
    "w2": "2.weight",
    "b2": "2.bias",
    "ln_weight": "3.weight",
    "ln_bias": "3.bias",
}


def run(case: str):
    """(tensors, leaves x, gate and stacked parameters, output) of a golden case."""
    tensors, notes = golden(f"topk_moe/{case}")
    E = notes["num_experts"]
    leaves = {"x": tensors["x"], "gate": tensors["param.gate.weight"][None]}
    leaves |= {n: torch.stack([tensors[f"param.experts.{e}.{key}"] for e in range(E)]) for n, key in NAMES.items()}
    leaves = {n: t.clone().requires_grad_() for n, t in leaves.items()}
    out = functional.smop(*leaves.values(), top_k=notes["top_k"], sharing="JEJR")
    return tensors, leaves, out


def expected_gradients(tensors, prefix: str, E: int):
    yield "x", tensors[f"{prefix}.x"]
    yield "gate", tensors[f"{prefix}.gate.weight"][None]
    for name, key in NAMES.items():
        if f"{prefix}.experts.0.{key}" in tensors:
            yield name, torch.stack([tensors[f"{prefix}.experts.{e}.{key}"] for e in range(E)])


def assert_close(what: str, ours, theirs, tolerance: float) -> None:
    """Relative to the largest value; where that is noise about zero, absolute."""
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
    error, scale = (ours.float() - theirs.float()).abs().max().item(), theirs.float().abs().max().item()
    assert error <= tolerance * max(scale, 1.0 if scale < 1e-5 else 0.0), f"{what}: off by {error:.2e} of {scale:.2e}"


@pytest.mark.parametrize("case", CASES)
def test_output_and_routing_equal_the_authors(case):
    tensors, _, out = run(case)
    assert_close("output", out.hidden_states, tensors["out"], ROUNDING)
    assert_close("logits", out.router_logits.flatten(0, -2), tensors["router_logits"], ROUNDING)
    assert_close("weights", out.expert_weights.flatten(0, -2), tensors["routing_weights_fp32"], ROUNDING)
    assert torch.equal(out.expert_indices.flatten(0, -2).long(), tensors["selected_experts"])


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_the_authors(case):
    tensors, leaves, out = run(case)
    (out.hidden_states * tensors["upstream"]).sum().backward()
    for name, theirs in expected_gradients(tensors, "grad", leaves["w1"].shape[0]):
        assert_close(f"gradient of {name}", leaves[name].grad, theirs, ROUNDING)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "field, prefix", [("load_balancing_loss", "load_balancing"), ("router_z_loss", "router_z")], ids=["balance", "z"]
)
def test_auxiliary_losses_and_their_gradients_equal_the_authors(case, field, prefix):
    tensors, leaves, out = run(case)
    loss = getattr(out, field)
    assert_close(prefix, loss[None], tensors[f"{prefix}.loss"], ROUNDING)
    loss.backward()
    assert_close("gradient of x", leaves["x"].grad, tensors[f"{prefix}.grad.x"], ROUNDING)
    assert_close("gradient of the gate", leaves["gate"].grad[0], tensors[f"{prefix}.grad.gate.weight"], ROUNDING)


def test_bfloat16_stays_near_the_authors():
    """Their rounding differs between versions by up to 0.125 in gradients."""
    tensors, leaves, out = run("e4k2_bf16")
    assert torch.equal(out.expert_indices.flatten(0, -2).long(), tensors["selected_experts"])
    assert_close("output", out.hidden_states, tensors["out"], 2e-2)
    (out.hidden_states * tensors["upstream"]).sum().backward()
    for name, theirs in expected_gradients(tensors, "grad", 4):
        assert_close(f"gradient of {name}", leaves[name].grad, theirs, 5e-2)
