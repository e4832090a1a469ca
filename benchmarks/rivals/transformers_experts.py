"""transformers' experts on the same weights: eager, grouped_mm, batched_mm; sonic-moe and ours through it."""

import importlib.util
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.rivals.base import Layer, Rival, leaf, route_blocks
from benchmarks.workloads import Problem, Workload
from llama_smop.integrations import transformers_experts

BATCHED_BYTES = 8 << 30  # batched_mm copies an expert's weights for every token that chose it


def _experts_class(gated: bool):
    """An experts module as transformers' models define it, with its eager loop."""
    from transformers.integrations.moe import use_experts_implementation

    class Experts(nn.Module):
        def __init__(self, config, problem: Problem):
            super().__init__()
            self.num_experts = problem.workload.total_experts
            name = "gate_up_proj" if gated else "up_proj"
            self.register_parameter(name, leaf(problem.w1))
            self.down_proj = leaf(problem.w2)
            self.act_fn = F.silu if gated else F.relu

        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            out = torch.zeros_like(hidden_states)
            for e in range(self.num_experts):
                token, choice = torch.where(top_k_index == e)
                if token.numel() == 0:
                    continue
                if gated:
                    h = self._apply_gate(F.linear(hidden_states[token], self.gate_up_proj[e]))
                else:
                    h = self.act_fn(F.linear(hidden_states[token], self.up_proj[e]))
                rows = F.linear(h, self.down_proj[e]) * top_k_weights[token, choice, None]
                out.index_add_(0, token, rows.to(out.dtype))
            return out

    return use_experts_implementation(Experts, has_gate=gated)


class TransformersExperts(Layer):
    def __init__(self, p: Problem, implementation: str):
        super().__init__()
        self.workload = p.workload
        gated = p.workload.expert == "swiglu"
        if implementation == "smop":
            transformers_experts.register()
        config = SimpleNamespace(_experts_implementation=implementation, hidden_act="silu" if gated else "relu")
        self.gate_weight = leaf(p.gate_weight)
        self.experts = _experts_class(gated)(config, p)

    def forward(self, x: Tensor, losses: bool) -> tuple[Tensor, Tensor | None]:
        weights, experts, loss = route_blocks(x, self.gate_weight, self.workload, losses)
        return self.experts(x, experts, weights.to(x.dtype)), loss

    def stacked(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        up = "experts.gate_up_proj" if self.workload.expert == "swiglu" else "experts.up_proj"
        return {"gate_weight": grads["gate_weight"], "w1": grads[up], "w2": grads["experts.down_proj"]}


def _why_not(implementation: str):
    def why_not(w: Workload, device: torch.device) -> str | None:
        if importlib.util.find_spec("transformers") is None:
            return "transformers is not installed"
        if w.expert == "projector":
            return "transformers' experts have no LayerNorm"
        if w.in_features != w.out_features:
            return "transformers' experts need O = D"
        if implementation == "batched_mm":
            copied = w.tokens * w.top_k * (w.up_features * w.in_features + w.hidden_features * w.out_features)
            copied *= w.torch_dtype.itemsize
            if copied > (BATCHED_BYTES if device.type == "cuda" else BATCHED_BYTES // 8):
                return f"batched_mm would copy {copied / 1e9:.0f} GB of weights"
        if implementation == "sonicmoe":
            return _no_sonic_moe(w)
        return None

    return why_not


def _no_sonic_moe(w: Workload) -> str | None:
    if w.expert != "swiglu":
        return "sonic-moe has gated experts only"
    try:
        from transformers.integrations.sonicmoe import is_sonicmoe_loadable

        is_sonicmoe_loadable(raise_error=True)
    except (ImportError, TypeError) as error:
        return f"sonic-moe cannot be loaded: {error}"
    return None


RIVALS = tuple(
    Rival(
        f"transformers_{name}",
        f"transformers, {name}" + (" (ours)" if name == "smop" else ""),
        "peer",
        lambda p, name=name: TransformersExperts(p, name),
        _why_not(name),
        modes=("eager", "graph") if name in ("grouped_mm", "batched_mm", "smop") else ("eager",),
    )
    for name in ("eager", "grouped_mm", "batched_mm", "sonicmoe", "smop")
)
