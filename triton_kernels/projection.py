"""The launch sequences, top to bottom: routing and expert projection, forward and backward.

    route_fwd               router_fwd            logits, gate weights, experts; choices and probabilities by block
                            schedule              order, inverse, offs; counts and both auxiliary losses
    expert_projection_fwd   grouped_gemm          h = act(x·W1ᵀ + b1), rows of x gathered in the load
                            grouped_gemm          z = h·W2ᵀ + b2
                            combine_fwd           y = Σ_k w_k · LayerNorm(z): 5 launches in all

    expert_projection_bwd   combine_bwd           dz, dweights, partial sums of dγ and dβ
                            layer_norm_grad       dγ, dβ
                            grouped_gemm          dh = (dz·W2) ⊙ act'
                            grouped_wgrad         dW2 = dzᵀ·h, db2
                            grouped_wgrad         dW1 = dhᵀ·x, db1, rows of x gathered in the load
    route_bwd               router_bwd            dlogits, the gate's gradient by split of tokens
                            sum_splits            dG: 7 launches in all

With dx: grouped_gemm (dh·W1) and combine_fwd (the sum over a token's K rows) more; route_bwd writes its own dx in the
launches it makes. A saved tensor that was dropped costs the launch that made it. Nothing is read back on the host.

Few tokens take the same launches: an expert without tokens is not read, and one with up to 64 rows is read once.
"""

from typing import Any

import torch
from torch import Tensor

from . import router as _router
from . import schedule as _schedule
from .combine import combine_bwd, combine_fwd, layer_norm_grad, new_partials
from .configs import ROUTER_TOKENS
from .grouped_gemm import grouped_gemm, keeps_pre
from .grouped_wgrad import grouped_wgrad
from .support import unsupported

__all__ = [
    "expert_projection_bwd",
    "expert_projection_fwd",
    "grouped_mm",
    "route_bwd",
    "route_fwd",
    "schedule",
    "unsupported",
]


def route_fwd(
    x: Tensor, gate_weight: Tensor, modality: Tensor | None, mask: Tensor | None, top_k: int, num_experts: int
) -> tuple[Tensor, ...]:
    T, (R, E, _) = x.shape[0], gate_weight.shape
    blocks = _router.router_blocks(T)
    f32: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    i32: dict[str, Any] = {"dtype": torch.int32, "device": x.device}
    logits, weights = torch.empty((T, E), **f32), torch.empty((T, top_k), **f32)
    experts, counts = torch.empty((T, top_k), **i32), torch.empty((R, E), **i32)
    hist, stats = torch.empty((blocks, R * E), **i32), torch.empty((blocks, R * E + R), **f32)
    balance, z = torch.empty((), **f32), torch.empty((), **f32)
    order, inverse, offs = _schedule.new_order(experts, num_experts)

    _router.router_fwd(x, gate_weight, modality, mask, logits, weights, experts, hist, stats, num_experts).run()
    _schedule.schedule(
        experts, hist, ROUTER_TOKENS * top_k, num_experts, order, inverse, offs,
        stats=stats, counts=counts, balance=balance, z=z,
    ).run()  # fmt: skip
    return logits, weights, experts, counts, balance, z, order, inverse, offs


def route_bwd(
    x: Tensor,
    gate_weight: Tensor,
    modality: Tensor | None,
    mask: Tensor | None,
    logits: Tensor,
    weights: Tensor,
    experts: Tensor,
    counts: Tensor,
    dlogits: Tensor | None,
    dweights: Tensor | None,
    dbalance: Tensor | None,
    dz: Tensor | None,
    need_dx: bool,
) -> tuple[Tensor | None, Tensor]:
    dx = torch.empty_like(x) if need_dx else None
    dgate = torch.empty_like(gate_weight)
    partials = _router.gate_partials(x, gate_weight)
    _router.router_bwd(
        x, gate_weight, modality, mask, logits, weights, experts, counts, dlogits, dweights, dbalance, dz, dx, partials
    ).run()
    _router.sum_splits(partials, dgate).run()
    return dx, dgate


def schedule(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    order, inverse, offs = _schedule.new_order(experts, num_experts)
    blocks = _schedule.histogram_blocks(experts.numel())
    hist = torch.empty((blocks, num_experts), dtype=torch.int32, device=experts.device)
    _schedule.histogram(experts, hist).run()
    _schedule.schedule(experts, hist, _schedule.schedule_items(), num_experts, order, inverse, offs).run()
    return order, inverse, offs


def expert_projection_fwd(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    schedule: tuple[Tensor, Tensor, Tensor],  # order, inverse, offs
    parameters: tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None],  # w1, b1, … ln_bias
    activation: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:
    (order, inverse, offs), (w1, b1, w2, b2, ln_weight, ln_bias) = schedule, parameters
    (T, K), (X, O, _) = weights.shape, w2.shape
    h, pre = _hidden(x, w1, b1, activation, order, offs, K)
    z = _output(h, w2, b2, offs, T)
    y = x.new_empty((T, O))
    mean = rstd = None
    if ln_weight is not None:
        mean, rstd = (torch.empty(h.shape[0], dtype=torch.float32, device=x.device) for _ in range(2))
    combine_fwd(
        z, weights, experts, inverse, y, X, K, gamma=ln_weight, beta=ln_bias, mean=mean, rstd=rstd, eps=eps
    ).run()
    return y, h, pre, z, mean, rstd


def expert_projection_bwd(
    dy: Tensor,
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    schedule: tuple[Tensor, Tensor, Tensor],  # order, inverse, offs
    parameters: tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None],  # w1, b1, … ln_bias
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],  # h, pre, z, mean, rstd
    activation: str,
    eps: float,
    need_dx: bool,
    need_dweights: bool,
    need_dparams: bool,
) -> tuple[Tensor | None, ...]:
    (order, inverse, offs), (w1, b1, w2, b2, ln_weight, ln_bias) = schedule, parameters
    h, pre, z, mean, rstd = saved
    (T, K), X, D = weights.shape, w2.shape[0], x.shape[1]
    if h.numel() == 0:
        h, pre = _hidden(x, w1, b1, activation, order, offs, K)
    if z.numel() == 0:
        z = _output(h, w2, b2, offs, T)

    def gradient(parameter: Tensor | None) -> Tensor | None:
        return torch.empty_like(parameter) if need_dparams and parameter is not None else None

    dw1, db1, dw2, db2, dgamma, dbeta = (gradient(p) for p in (w1, b1, w2, b2, ln_weight, ln_bias))
    dz = torch.empty_like(z)
    dweights = torch.empty_like(weights) if need_dweights else None
    partials = None if dgamma is None else new_partials(z, T, X, False)
    if ln_weight is None:
        mean = rstd = None
    combine_bwd(
        dy, z, weights, experts, order, offs, dz, X,
        gamma=ln_weight, beta=ln_bias, mean=mean, rstd=rstd, dweights=dweights, partials=partials,
    ).run()  # fmt: skip
    if dgamma is not None:
        layer_norm_grad(partials, offs, dgamma, dbeta, z.shape[0], T).run()
    dx = None
    if need_dparams or need_dx:
        dh = torch.empty_like(h)
        kept = pre if keeps_pre(activation) else h
        grouped_gemm(dz, w2, offs, dh, pre=kept, gradient=True, activation=activation, tokens=T).run()
    if need_dparams:
        routing: dict[str, Any] = {"order": order, "experts": experts, "top_k": K, "tokens": T}
        grouped_wgrad(dz, h, offs, dw2, bias_grad=db2, **routing).run()
        grouped_wgrad(dh, x, offs, dw1, bias_grad=db1, gather=True, **routing).run()
    if need_dx:
        dx_rows, dx = x.new_empty((h.shape[0], D)), torch.empty_like(x)
        grouped_gemm(dh, w1, offs, dx_rows, tokens=T).run()
        combine_fwd(dx_rows, None, experts, inverse, dx, X, K).run()
    return dx, dweights, dw1, db1, dw2, db2, dgamma, dbeta


def grouped_mm(
    a: Tensor, b: Tensor, offs: Tensor, bias: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor]:
    if b.dim() == 2:
        out = a.new_empty((offs.shape[0], a.shape[0], b.shape[1]))
        grouped_wgrad(a.t(), b, offs, out).run()
        return out, a.new_empty(0)
    out = a.new_empty((a.shape[0], b.shape[2]))
    pre = torch.empty_like(out) if keeps_pre(activation) else None
    grouped_gemm(a, b, offs, out, bias=bias, activation=activation, pre=pre, zero_tail=True).run()
    return out, a.new_empty(0) if pre is None else pre


def _hidden(x, w1, b1, activation, order, offs, top_k) -> tuple[Tensor, Tensor | None]:
    """h = act(x·W1ᵀ + b1) in expert order, and the pre-activation where the derivative needs it."""
    T, (X, H, _) = x.shape[0], w1.shape
    h = x.new_empty((X * T if offs is None else order.shape[0], H))
    pre = torch.empty_like(h) if keeps_pre(activation) else None
    grouped_gemm(
        x, w1.transpose(1, 2), offs, h,
        bias=b1, activation=activation, pre=pre, gather=True, order=order, top_k=top_k, tokens=T,
    ).run()  # fmt: skip
    return h, pre


def _output(h, w2, b2, offs, tokens) -> Tensor:
    """z = h·W2ᵀ + b2, rows as in h."""
    z = h.new_empty((h.shape[0], w2.shape[1]))
    grouped_gemm(h, w2.transpose(1, 2), offs, z, bias=b2, tokens=tokens).run()
    return z
