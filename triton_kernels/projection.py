"""The launch sequences, top to bottom: routing and expert projection, forward and backward.

    route_fwd               router_fwd            logits, gate weights, experts; choices and probabilities by block
                            schedule              order, inverse, offs; counts and both auxiliary losses
    expert_projection_fwd   grouped_gemm          h = act(x·W1ᵀ + b1), rows of x gathered in the load
                            grouped_gemm          z = h·W2ᵀ + b2
                            combine_fwd           y = Σ_k w_k · LayerNorm(z): 5 launches in all

    expert_projection_bwd   combine_bwd           dz, dweights; dγ, dβ and db2 by tile of rows
                            grouped_gemm          dh = (dz·W2) ⊙ act'; db1 by tile of rows
                            sum_partials          dγ, dβ, db2, db1
                            grouped_wgrad         dW2 = dzᵀ·h
                            grouped_wgrad         dW1 = dhᵀ·x, rows of x gathered in the load
    route_bwd               router_bwd            dlogits, the gate's gradient by split of tokens
                            sum_splits            dG, of several splits: 7 launches in all

With dx: grouped_gemm (dh·W1) and combine_fwd (the sum over a token's K rows) more; route_bwd writes its own dx in the
launches it makes. A saved tensor that was dropped costs the launch that made it; with h dropped dW2 comes before dh.
Nothing is read back on the host; so the launches of a call serve the next call of the same shapes (`replay`).
Every launch of an operator but its first may start while the one before it ends (`dependent_launch`).

Gated experts, h = act(x·Wgᵀ) ⊙ x·Wuᵀ, take the same launches: W1 holds Wg and Wu, and dh is of both. So do shared
experts: route_fwd places them among a token's choices.
Few tokens take the same launches: an expert without tokens is not read, and one with up to 64 rows is read once. While
a launch of few tokens waits for latencies, weights of a later one are brought into the L2 (`ahead`).
"""

from typing import Any

import torch
from torch import Tensor

from . import boxes as _boxes
from . import router as _router
from . import schedule as _schedule
from .ahead import ROWS_AN_EXPERT, worth_bringing
from .combine import combine_bwd, combine_fwd
from .configs import ROUTER_TOKENS, combine_rows, tile_by_boxes
from .grouped_gemm import gemm_tile_rows, grouped_gemm, keeps_pre
from .grouped_wgrad import grouped_wgrad
from .launch import Sequence, dot_precision, forget_plans, target_arch
from .partials import new_partials, sum_partials
from .replay import replayed
from .support import unsupported

__all__ = [
    "expert_projection_bwd",
    "expert_projection_fwd",
    "grouped_mm",
    "product_by_boxes",
    "refuse_boxes",
    "replayed",
    "route_bwd",
    "route_fwd",
    "schedule",
    "unsupported",
]


@replayed
def route_fwd(
    x: Tensor,
    gate_weight: Tensor,
    modality: Tensor | None,
    mask: Tensor | None,
    top_k: int,
    num_experts: int,
    shared_experts: int = 0,
    ahead: Tensor | None = None,
) -> tuple[Tensor, ...]:
    T, (R, E, _) = x.shape[0], gate_weight.shape
    blocks = _router.router_blocks(T)
    f32: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    i32: dict[str, Any] = {"dtype": torch.int32, "device": x.device}
    logits, weights = torch.empty((T, E), **f32), torch.empty((T, top_k), **f32)
    experts, counts = torch.empty((T, top_k), **i32), torch.empty((R, E), **i32)
    hist, stats = torch.empty((blocks, R * E), **i32), torch.empty((blocks, R * E + R), **f32)
    balance, z = torch.empty((), **f32), torch.empty((), **f32)
    shared: tuple[Tensor, ...] = ()
    if shared_experts:
        choices = T, top_k + shared_experts
        shared = torch.empty(choices, **f32), torch.empty(choices, **i32)
    chosen = shared[1] if shared else experts
    order, inverse, offs = _schedule.new_order(chosen, num_experts + shared_experts)

    all_weights, all_experts = shared or (None, None)
    # Of experts that each have a modality half may not be needed.
    needed = worth_bringing(ahead if num_experts == E else None, T * top_k, least_rows=ROWS_AN_EXPERT * E)

    run = Sequence()
    run(_router.router_fwd(
        x, gate_weight, modality, mask, logits, weights, experts, hist, stats, num_experts,
        all_weights, all_experts, needed,
    ))  # fmt: skip
    run(_schedule.schedule(
        chosen, hist, ROUTER_TOKENS * chosen.shape[1], num_experts, order, inverse, offs,
        stats=stats, counts=counts, balance=balance, z=z,
    ))  # fmt: skip
    return logits, weights, experts, counts, balance, z, order, inverse, offs, *shared


@replayed
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
    partials = _router.gate_partials(x, dgate)
    run = Sequence()
    run(_router.router_bwd(
        x, gate_weight, modality, mask, logits, weights, experts, counts, dlogits, dweights, dbalance, dz, dx, partials
    ))  # fmt: skip
    if partials.shape[0] > 1:
        run(_router.sum_splits(partials, dgate))
    return dx, dgate


def schedule(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    order, inverse, offs = _schedule.new_order(experts, num_experts)
    blocks = _schedule.histogram_blocks(experts.numel())
    hist = torch.empty((blocks, num_experts), dtype=torch.int32, device=experts.device)
    run = Sequence()
    run(_schedule.histogram(experts, hist))
    run(_schedule.schedule(experts, hist, _schedule.schedule_items(), num_experts, order, inverse, offs))
    return order, inverse, offs


@replayed
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
    run = Sequence()
    h, pre = _hidden(run, x, w1, b1, activation, order, offs, weights.shape[1], w2)
    z = _output(run, h, w2, b2, offs)
    y = x.new_empty((x.shape[0], w2.shape[1]))
    mean = rstd = None
    if ln_weight is not None:
        mean, rstd = (torch.empty(h.shape[0], dtype=torch.float32, device=x.device) for _ in range(2))
    run(combine_fwd(z, weights, experts, inverse, y, gamma=ln_weight, beta=ln_bias, mean=mean, rstd=rstd, eps=eps))
    return y, h, pre, z, mean, rstd


@replayed
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
    K, (X, _, H) = weights.shape[1], w2.shape
    run = Sequence()
    # What is computed again belongs to this call: dz is written over z, and dh over h once dW2 has read it.
    own_h, own_z = h.numel() == 0, z.numel() == 0
    if own_h:
        h, pre = _hidden(run, x, w1, b1, activation, order, offs, K, w2)
    if own_z:
        z = _output(run, h, w2, b2, offs)
    kept = pre if keeps_pre(activation) else h

    def gradient(parameter: Tensor | None) -> Tensor | None:
        return torch.empty_like(parameter) if need_dparams and parameter is not None else None

    dw1, db1, dw2, db2, dgamma, dbeta = (gradient(p) for p in (w1, b1, w2, b2, ln_weight, ln_bias))
    dz, dh = z if own_z else torch.empty_like(z), kept if own_h else torch.empty_like(kept)
    dweights = torch.empty_like(weights) if need_dweights else None
    z_sums = dh_sums = None
    if dgamma is not None or db2 is not None:
        z_sums = new_partials(z, X, combine_rows(z.shape[0]), sums=3)
    if db1 is not None:
        dh_sums = new_partials(dh, X, gemm_tile_rows(dh, X, H, z.shape[1]), sums=1)
    if ln_weight is None:
        mean = rstd = None

    run(combine_bwd(
        dy, z, weights, experts, order, offs, dz,
        gamma=ln_weight, beta=ln_bias, mean=mean, rstd=rstd, dweights=dweights, sums=z_sums and z_sums.sums,
        ahead=worth_bringing(w2 if need_dx or need_dparams else None, h.shape[0]),
    ))  # fmt: skip
    dx = None
    if need_dparams and own_h:
        run(grouped_wgrad(dz, h, offs, dw2))
    if need_dparams or need_dx:
        run(grouped_gemm(
            dz, w2, offs, dh, pre=kept, sums=dh_sums and dh_sums.sums, gradient=True, activation=activation
        ))  # fmt: skip
    if z_sums or dh_sums:
        run(sum_partials(offs, h.shape[0], z_sums, dh_sums, dgamma, dbeta, db2, db1))
    if need_dparams and not own_h:
        run(grouped_wgrad(dz, h, offs, dw2))
    if need_dparams:
        run(grouped_wgrad(dh, x, offs, dw1, gather=True, order=order, top_k=K))
    if need_dx:
        dx_rows, dx = x.new_empty((h.shape[0], x.shape[1])), torch.empty_like(x)
        run(grouped_gemm(dh, w1, offs, dx_rows))
        run(combine_fwd(dx_rows, None, None, inverse, dx))
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


def product_by_boxes(a: Tensor, b: Tensor, offs: Tensor) -> Tensor | None:
    """a · B_e as a large product computes it, whatever the size; None where large ones are computed as small ones are.

    Sizes and strides must be multiples of 16 bytes.
    """
    tile = tile_by_boxes(target_arch(), a.dtype, dot_precision(a.dtype))
    if tile is None:
        return None
    out = a.new_empty((a.shape[0], b.shape[2]))
    grouped_gemm(a, b, offs, out, zero_tail=True, config=tile, by_tma=True).run()
    return out


def refuse_boxes(dtype: torch.dtype, device: torch.device) -> None:
    """Large products of this dtype on this device are computed as small ones are from now on."""
    _boxes.refused.add((dtype, device))
    forget_plans()


def _hidden(run, x, w1, b1, activation, order, offs, top_k, w2) -> tuple[Tensor, Tensor | None]:
    """h = act(x·W1ᵀ + b1) in expert order, and the pre-activation (gated: gate, up) where the derivative needs it."""
    h = x.new_empty((order.shape[0], w2.shape[2]))
    pre = x.new_empty((order.shape[0], w1.shape[1])) if keeps_pre(activation) else None
    run(grouped_gemm(
        x, w1.transpose(1, 2), offs, h,
        bias=b1, activation=activation, pre=pre, gather=True, order=order, top_k=top_k,
        ahead=worth_bringing(w2, order.shape[0]),
    ))  # fmt: skip
    return h, pre


def _output(run, h, w2, b2, offs) -> Tensor:
    """z = h·W2ᵀ + b2, rows as in h."""
    z = h.new_empty((h.shape[0], w2.shape[1]))
    run(grouped_gemm(h, w2.transpose(1, 2), offs, z, bias=b2))
    return z
