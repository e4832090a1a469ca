"""Common to all rivals: the interface, router and auxiliary losses in plain PyTorch, and the output check."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.floors import Work, smop_work
from benchmarks.workloads import Problem, Workload

BALANCE_COEF, Z_COEF = 0.01, 0.001  # a training pass includes both auxiliary losses

# Allowed ‖out − ref‖ / ‖ref‖ of y against float64: a few times the rounding error, far below that of a wrong formula.
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 3e-3, "bfloat16": 2e-2}
# Gradients may have more: PyTorch's LayerNorm backward on a CPU sums dγ and dβ in bfloat16 (3.4e-2 at 1500 tokens).
GRADIENT_SLACK = 5


class Layer(nn.Module):
    """A rival built for a problem: a layer with copies of the problem's parameters.

    `forward(x, losses)` returns y (T, O) and, with `losses`, the weighted sum of the auxiliary losses (else None).
    """

    def forward(self, x: Tensor, losses: bool) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

    def stacked(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradients of `named_parameters()` under the names and in the layout of `Problem`."""
        return grads


@dataclass(frozen=True)
class Rival:
    """An implementation that can be timed.

    family: "ours", "peer" (computes the same function) or "dense" (another, cheaper or costlier, projector).
    modes: how it runs: "eager", "graph" (a captured CUDA graph), "compiled" (torch.compile).
    exact: it computes the workload's function, so it is checked against float64 before it is timed.
    why_not: returns why it cannot run a workload on a device, or None.
    work: useful work of a pass; by default the sparse layer's.
    """

    name: str
    label: str
    family: str
    build: Callable[[Problem], Layer]
    why_not: Callable[[Workload, torch.device], str | None] = lambda w, device: None
    modes: tuple[str, ...] = ("eager",)
    exact: bool = True
    work: Callable[[Workload, str], Work] = field(default=smop_work)


def leaf(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor.detach().clone())


def router(x: Tensor, gate: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """logits (T, E), weights (T, K), experts (T, K) of one router with gate (E, D); float32 softmax."""
    logits = x @ gate.t()
    logits = logits if logits.dtype == torch.float64 else logits.float()
    top, experts = logits.softmax(-1).topk(top_k)
    return logits, top / top.sum(-1, keepdim=True), experts


def router_losses(logits: Tensor, experts: Tensor) -> Tensor:
    """Load balancing and router z-loss of one router, weighted as in training."""
    T, E = logits.shape
    share = (experts[..., None] == torch.arange(E, device=experts.device)).sum((0, 1)) / T
    balance = E * (share * logits.softmax(-1).mean(0)).sum()
    return BALANCE_COEF * balance + Z_COEF * logits.logsumexp(-1).square().mean()


def route_blocks(x: Tensor, gate: Tensor, w: Workload, losses: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """weights (T, K), experts (T, K) in [0, X) and the losses, each modality through its own router."""
    weights, experts, total = [], [], []
    for m, start, stop in w.blocks():
        logits, p, e = router(x[start:stop], gate[m], w.top_k)
        weights.append(p)
        experts.append(e + (m * w.num_experts if w.sharing == "DEDR" else 0))
        if losses:
            total.append(router_losses(logits, e))
    return torch.cat(weights), torch.cat(experts), sum(total) / len(total) if losses else None


def activate(h: Tensor, w: Workload) -> Tensor:
    """ReLU, or SiLU(gate) · up for the gated expert."""
    if w.expert != "swiglu":
        return h.relu()
    gate, up = h.chunk(2, -1)
    return F.silu(gate) * up


# ------------------------------------------------------------------------------------------------------- the check


class Mismatch(Exception):
    """A rival does not compute the workload's function."""


@dataclass
class Reference:
    """The expected output and gradients, in float64."""

    y: Tensor
    grads: dict[str, Tensor]


def roots_and_grads(y: Tensor, loss: Tensor | None, dy: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The roots of a training pass's backward and their gradients: y with dy, and the auxiliary losses."""
    return ([y], [dy]) if loss is None else ([y, loss], [dy, torch.ones_like(loss)])


def gradients(layer: Layer, problem: Problem, with_dx: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """y and the gradients of every parameter (and of x), in the problem's layout; 0 for experts without tokens."""
    x = problem.x.detach().requires_grad_(with_dx)
    y, loss = layer(x, True)
    named = dict(layer.named_parameters())
    roots, grads = roots_and_grads(y, loss, problem.dy)
    wanted = [*named.values(), x] if with_dx else list(named.values())
    found = torch.autograd.grad(roots, wanted, grads, allow_unused=True)
    dense = [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]
    stacked = layer.stacked(dict(zip(named, dense, strict=False)))
    return y.detach(), {**stacked, "x": dense[-1]} if with_dx else stacked


def error(out: Tensor, reference: Tensor) -> float:
    """‖out − ref‖ / ‖ref‖ in float64; infinite when anything is not finite."""
    out = out.detach().double()
    if out.shape != reference.shape or not bool(torch.isfinite(out).all()):
        return float("inf")
    return float((out - reference).norm() / reference.norm().clamp(min=1e-30))


def errors(layer: Layer, problem: Problem, reference: Reference) -> dict[str, float]:
    """Error of y and of each gradient against the reference, by name."""
    y, grads = gradients(layer, problem, "x" in reference.grads)
    found = {"y": error(y, reference.y)}
    for name, expected in reference.grads.items():
        if float(expected.norm()) > 0:
            found[name] = error(grads[name], expected)
    return found


def check(layer: Layer, problem: Problem, reference: Reference) -> float:
    """The largest error of `errors`. Raises Mismatch: one exceeds the dtype's tolerance."""
    found = errors(layer, problem, reference)
    for name, off in found.items():
        allowed = TOLERANCE[problem.workload.dtype] * (1 if name == "y" else GRADIENT_SLACK)
        if not off <= allowed:
            raise Mismatch(f"{name} is off by {off:.1e} against float64 (at most {allowed:.0e})")
    return max(found.values())
