"""The eager loop over experts, each a module: the straightforward implementation.

In float64 it is also the reference for all other implementations.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.rivals.base import Layer, Reference, Rival, activate, gradients, leaf, route_blocks
from benchmarks.workloads import Problem


class EagerLoop(Layer):
    def __init__(self, p: Problem):
        super().__init__()
        self.workload = p.workload
        self.gates = nn.ParameterList([leaf(g) for g in p.gate_weight])
        stacked = {n: t for n, t in p.parameters().items() if n != "gate_weight"}
        self.experts = nn.ModuleList()
        for e in range(p.workload.total_experts):
            expert = nn.Module()
            for name in Problem.PARAMETERS[1:]:
                expert.register_parameter(name, leaf(stacked[name][e]) if name in stacked else None)
            self.experts.append(expert)

    def forward(self, x: Tensor, losses: bool) -> tuple[Tensor, Tensor | None]:
        w = self.workload
        weights, experts, loss = route_blocks(x, self.gates, w, losses)
        y = x.new_zeros(x.shape[0], w.out_features)
        for e, expert in enumerate(self.experts):
            token, choice = torch.where(experts == e)
            if token.numel() == 0:
                continue
            h = activate(F.linear(x[token], expert.w1, expert.b1), w)
            z = F.linear(h, expert.w2, expert.b2)
            if expert.ln_weight is not None:
                z = F.layer_norm(z, (w.out_features,), expert.ln_weight, expert.ln_bias)
            y = y.index_add(0, token, (z * weights[token, choice, None]).to(y.dtype))
        return y, loss

    def stacked(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        R, X = self.workload.routers, self.workload.total_experts
        names = [n for n in Problem.PARAMETERS[1:] if f"experts.0.{n}" in grads]
        return {
            "gate_weight": torch.stack([grads[f"gates.{m}"] for m in range(R)]),
            **{n: torch.stack([grads[f"experts.{e}.{n}"] for e in range(X)]) for n in names},
        }


def reference(problem: Problem, with_dx: bool = False) -> Reference:
    """The problem's exact inputs through the eager loop in float64; with the gradient of x if `with_dx`."""
    exact = problem.to(torch.float64)
    return Reference(*gradients(EagerLoop(exact), exact, with_dx))


RIVAL = Rival("eager", "eager loop over experts", "peer", EagerLoop, modes=("eager", "compiled"))
