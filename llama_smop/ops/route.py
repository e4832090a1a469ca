"""`smop::route`: from tokens to experts, gate weights, both auxiliary losses and the rows in expert order."""

from typing import NamedTuple

import torch
from torch import Tensor

from llama_smop.ops import checks, dispatch
from llama_smop.ops.backend import acc_dtype
from llama_smop.ops.operator import operator


class Routing(NamedTuple):
    """What a router decided. T tokens, E experts a router, K active, R routers, X experts in all."""

    logits: Tensor  # (T, E) float32; row 0 for masked tokens
    weights: Tensor  # (T, K) float32, rows sum to 1 (0 for masked tokens)
    experts: Tensor  # (T, K) int32; X for masked tokens
    counts: Tensor  # (R, E) int32 choices of each expert, by router
    load_balancing_loss: Tensor  # ()
    router_z_loss: Tensor  # ()
    order: Tensor  # (T·K,) int32; row r in expert order is choice order[r] = t·K + k
    inverse: Tensor  # (T, K) int32, the row of each choice; −1 for masked tokens
    offs: Tensor  # (X,) int32 cumulative ends of the experts' rows


def check(
    x: Tensor, gate_weight: Tensor, modality: Tensor | None, mask: Tensor | None, top_k: int, num_experts: int, *_
) -> None:
    sizes = checks.tensors(
        ("x", x, "TD"), ("gate_weight", gate_weight, "RED"), ("modality", modality, "T"), ("mask", mask, "T")
    )
    R, E = sizes["R"], sizes["E"]
    if not 1 <= top_k <= E:
        raise ValueError(f"top_k must lie in [1, num_experts] = [1, {E}], got {top_k}")
    if num_experts not in (E, R * E):
        raise ValueError(
            f"num_experts must be {E} or {R * E} for gate_weight {tuple(gate_weight.shape)}, got {num_experts}"
        )
    if R not in (1, 2):
        raise ValueError(f"gate_weight must hold 1 router or 2 (audio, video), got {R}")
    if R == 2 and modality is None:
        raise ValueError("modality is required with two routers: a (T,) integer tensor, 0 audio, 1 video")
    checks.token_ids(modality, mask)


def prepared(
    x: Tensor, gate_weight: Tensor, modality: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """As a backend takes them. One router needs no modality."""
    modality = None if modality is None or gate_weight.shape[0] == 1 else modality.to(torch.int32).contiguous()
    mask = None if mask is None else mask.contiguous()
    return x.contiguous(), gate_weight.contiguous(), modality, mask


def _fake(x, gate_weight, modality, mask, top_k, num_experts, backend) -> Routing:
    checks.same_float("x", x, gate_weight=gate_weight)
    T, (R, E, _) = x.shape[0], gate_weight.shape
    acc, integer = {"dtype": acc_dtype(x.dtype)}, {"dtype": torch.int32}
    return Routing(
        logits=x.new_empty(T, E, **acc),
        weights=x.new_empty(T, top_k, **acc),
        experts=x.new_empty(T, top_k, **integer),
        counts=x.new_empty(R, E, **integer),
        load_balancing_loss=x.new_empty((), **acc),
        router_z_loss=x.new_empty((), **acc),
        order=x.new_empty(T * top_k, **integer),
        inverse=x.new_empty(T, top_k, **integer),
        offs=x.new_empty(num_experts, **integer),
    )


def _save(ctx, arguments, results) -> None:
    x, gate_weight, modality, mask, _, _, ctx.backend = arguments
    r = Routing(*results)
    ctx.save_for_backward(x, gate_weight, modality, mask, r.logits, r.weights, r.experts, r.counts)
    ctx.mark_non_differentiable(r.experts, r.counts, r.order, r.inverse, r.offs)
    ctx.set_materialize_grads(False)


def _backward(ctx, dlogits, dweights, _experts, _counts, dbalance, dz, *_schedule) -> tuple:
    dx = dgate = None
    if not all(g is None for g in (dlogits, dweights, dbalance, dz)):
        need_dx, need_dgate, *_ = ctx.needs_input_grad
        dx, dgate = route_bwd(*ctx.saved_tensors, dlogits, dweights, dbalance, dz, need_dx, ctx.backend)
        dx, dgate = dx if need_dx else None, dgate if need_dgate else None
    return dx, dgate, None, None, None, None, None


@operator("smop::route", check=check, fake=_fake, gradient=(_save, _backward), lowered={"x", "gate_weight"})
def route(
    x: Tensor,
    gate_weight: Tensor,
    modality: Tensor | None,
    mask: Tensor | None,
    top_k: int,
    num_experts: int,
    backend: str,
) -> Routing:
    checks.same_float("x", x, gate_weight=gate_weight)
    if modality is not None and gate_weight.shape[0] == 2:
        checks.in_range("modality", modality, 0, 1)
    routed = dispatch.module(backend).route_fwd(*prepared(x, gate_weight, modality, mask), top_k, num_experts)
    return Routing(*routed)


def _fake_bwd(x, gate_weight, modality, mask, logits, weights, experts, counts, dlogits, dweights, db, dz, need_dx, _):
    return x.new_empty(x.shape if need_dx else (0,)), gate_weight.new_empty(gate_weight.shape)


@operator("smop::route_bwd", fake=_fake_bwd, derivative_of="smop::route")
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
    backend: str,
) -> tuple[Tensor, Tensor]:
    dlogits = None if dlogits is None else dlogits.contiguous()
    dweights = None if dweights is None else dweights.contiguous()
    dx, dgate = dispatch.module(backend).route_bwd(
        *prepared(x, gate_weight, modality, mask), logits, weights, experts, counts,
        dlogits, dweights, dbalance, dz, need_dx,
    )  # fmt: skip
    return x.new_empty(0) if dx is None else dx, dgate
