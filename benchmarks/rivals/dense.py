"""Rivals without sparsity: all experts on every token, and dense projectors (Llama-AVSR's) of several widths."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.floors import dense_work
from benchmarks.rivals.base import Layer, Rival, activate, route_blocks
from benchmarks.rivals.grouped import Stacked
from benchmarks.workloads import Problem, Workload


class AllExperts(Stacked):
    """Batched matrix products of every token with every expert; the gate weights of unchosen experts are 0."""

    def forward(self, x: Tensor, losses: bool) -> tuple[Tensor, Tensor | None]:
        w = self.workload
        weights, experts, loss = route_blocks(x, self.gate_weight, w, losses)
        if w.sharing != "DEDR":
            return self._mix(x, weights, experts, slice(None)), loss
        E = w.num_experts
        parts = [
            self._mix(x[start:stop], weights[start:stop], experts[start:stop] - m * E, slice(m * E, (m + 1) * E))
            for m, start, stop in w.blocks()
        ]
        return torch.cat(parts), loss

    def _mix(self, x: Tensor, weights: Tensor, experts: Tensor, used: slice) -> Tensor:
        w = self.workload
        w1, w2 = self.w1[used].transpose(1, 2), self.w2[used].transpose(1, 2)
        x = x.expand(w1.shape[0], *x.shape)
        if self.b1 is None:
            z = activate(x @ w1, w) @ w2
        else:
            z = torch.baddbmm(self.b2[used, None], activate(torch.baddbmm(self.b1[used, None], x, w1), w), w2)
        if self.ln_weight is not None:
            z = F.layer_norm(z, z.shape[-1:]) * self.ln_weight[used, None] + self.ln_bias[used, None]
        every = weights.new_zeros(x.shape[1], x.shape[0]).scatter(1, experts, weights).to(z.dtype)
        return torch.einsum("xto,tx->to", z, every)


class Dense(Layer):
    """Linear, ReLU, Linear of `hidden` units, no LayerNorm; with two routers one for each modality."""

    def __init__(self, p: Problem, hidden: int):
        super().__init__()
        w = self.workload = p.workload
        factory = {"device": p.x.device, "dtype": p.x.dtype}
        self.projectors = nn.ModuleList(
            nn.Sequential(
                nn.Linear(w.in_features, hidden, **factory), nn.ReLU(), nn.Linear(hidden, w.out_features, **factory)
            )
            for _ in range(w.routers)
        )

    def forward(self, x: Tensor, losses: bool) -> tuple[Tensor, Tensor | None]:
        parts = [self.projectors[m](x[start:stop]) for m, start, stop in self.workload.blocks()]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)), None


def hidden_units(w: Workload, kind: str) -> int:
    """Width of the dense projector with one expert's width (H), the same active FLOPs (KH) or parameters (EH)."""
    return w.hidden_features * {"H": 1, "KH": w.top_k, "EH": w.num_experts}[kind]


def _dense(kind: str, meaning: str) -> Rival:
    return Rival(
        f"dense_{kind}",
        f"dense, hidden {'·'.join(kind)} ({meaning})",
        "dense",
        lambda p: Dense(p, hidden_units(p.workload, kind)),
        lambda w, device: None if w.expert == "projector" else "only compared with the projector's own experts",
        modes=("eager", "graph", "compiled"),
        exact=False,
        work=lambda w, which: dense_work(w, hidden_units(w, kind), which),
    )


ALL_EXPERTS = Rival("dense_all", "all experts on all tokens", "peer", AllExperts, modes=("eager", "graph", "compiled"))
PROJECTORS = (_dense("KH", "same active FLOPs"), _dense("EH", "same parameters"), _dense("H", "one expert's width"))
