"""Kernels of other projects, timed if their package is installed: ScatterMoE and Liger-Kernel."""

import importlib.util

import torch
from torch import Tensor

from benchmarks.rivals.base import Rival, activate, route_blocks
from benchmarks.rivals.grouped import Stacked, combine, layer_norm_rows
from benchmarks.workloads import Workload


class ScatterMoE(Stacked):
    """github.com/shawntan/scattermoe: products that gather and scatter their rows inside the kernel."""

    def forward(self, x: Tensor, losses: bool) -> tuple[Tensor, Tensor | None]:
        from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

        w = self.workload
        weights, experts, loss = route_blocks(x, self.gate_weight, w, losses)
        schedule = flatten_sort_count(experts, num_experts=w.total_experts)
        h = parallel_linear(x, self.w1.transpose(1, 2), w.top_k, *schedule, expert_biases=self.b1, grouped_out=True)
        z = parallel_linear(
            activate(h, w), self.w2.transpose(1, 2), 1, *schedule, expert_biases=self.b2, grouped_in=True
        )
        z = layer_norm_rows(z, self.ln_weight, self.ln_bias, experts.flatten())
        return combine(z, weights), loss


class LigerFusedMoE(Stacked):
    """github.com/linkedin/Liger-Kernel: fused gated experts, SiLU, O = D."""

    def forward(self, x: Tensor, losses: bool) -> tuple[Tensor, Tensor | None]:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

        weights, experts, loss = route_blocks(x, self.gate_weight, self.workload, losses)
        return LigerFusedMoEFunction.apply(x, self.w1, self.w2, experts.int(), weights), loss


def _missing(package: str, device: torch.device) -> str | None:
    if importlib.util.find_spec(package) is None:
        return f"the package {package} is not installed"
    return None if device.type == "cuda" else f"{package} needs a CUDA device"


def _no_liger(w: Workload, device: torch.device) -> str | None:
    if w.expert != "swiglu" or w.in_features != w.out_features:
        return "Liger-Kernel's fused experts are gated, without biases or LayerNorm, and need O = D"
    return _missing("liger_kernel", device)


RIVALS = (
    Rival("scattermoe", "ScatterMoE", "peer", ScatterMoE, lambda w, device: _missing("scattermoe", device)),
    Rival("liger", "Liger-Kernel fused MoE", "peer", LigerFusedMoE, _no_liger),
)
