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


class Routed(NamedTuple):
    """`Routing`, and with S shared experts all choices of a token, of which order, inverse and offs then are."""

    logits: Tensor
    weights: Tensor
    experts: Tensor
    counts: Tensor
    load_balancing_loss: Tensor
    router_z_loss: Tensor
    order: Tensor
    inverse: Tensor
    offs: Tensor
    all_weights: Tensor  # (T, K + S), 1 for a shared expert, 0 for masked tokens; empty without shared experts
    all_experts: Tensor  # (T, K + S) int32, X to X + S − 1 the shared ones, X + S for masked tokens; or empty


def check(
    x: Tensor, gate_weight: Tensor, modality: Tensor | None, mask: Tensor | None, top_k: int, num_experts: int, *_
) -> None:
    sizes = checks.tensors(
        ("x", x, "TD"), ("gate_weight", gate_weight, "RED"), ("modality", modality, "T"), ("mask", mask, "T")
    )
    R, E = sizes["R"], sizes["E"]
    if type(top_k) is not int or not 1 <= top_k <= E:
        checks.active_experts(top_k, E)
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


def _fake(x, gate_weight, modality, mask, top_k, num_experts, shared_experts, backend) -> Routed:
    checks.same_float("x", x, gate_weight=gate_weight)
    T, (R, E, _) = x.shape[0], gate_weight.shape
    acc, integer = {"dtype": acc_dtype(x.dtype)}, {"dtype": torch.int32}
    choices = top_k + shared_experts
    shape = (T, choices) if shared_experts else (0,)
    return Routed(
        logits=x.new_empty(T, E, **acc),
        weights=x.new_empty(T, top_k, **acc),
        experts=x.new_empty(T, top_k, **integer),
        counts=x.new_empty(R, E, **integer),
        load_balancing_loss=x.new_empty((), **acc),
        router_z_loss=x.new_empty((), **acc),
        order=x.new_empty(T * choices, **integer),
        inverse=x.new_empty(T, choices, **integer),
        offs=x.new_empty(num_experts + shared_experts, **integer),
        all_weights=x.new_empty(shape, **acc),
        all_experts=x.new_empty(shape, **integer),
    )


def _save(ctx, arguments, results) -> None:
    x, gate_weight, modality, mask, _, _, shared_experts, ctx.backend = arguments
    r = Routed(*results)
    ctx.save_for_backward(x, gate_weight, modality, mask, r.logits, r.weights, r.experts, r.counts)
    without = () if shared_experts else (r.all_weights,)
    ctx.mark_non_differentiable(r.experts, r.counts, r.order, r.inverse, r.offs, r.all_experts, *without)
    ctx.set_materialize_grads(False)


def _backward(ctx, dlogits, dweights, _experts, _counts, dbalance, dz, _order, _inverse, _offs, dall, _) -> tuple:
    dx = dgate = None
    dweights = summed(dweights, dall)
    if not all(g is None for g in (dlogits, dweights, dbalance, dz)):
        need_dx, need_dgate, *_ = ctx.needs_input_grad
        dx, dgate = route_bwd(*ctx.saved_tensors, dlogits, dweights, dbalance, dz, need_dx, ctx.backend)
        dx, dgate = dx if need_dx else None, dgate if need_dgate else None
    return dx, dgate, None, None, None, None, None, None


def summed(dweights: Tensor | None, dall: Tensor | None) -> Tensor | None:
    """The gradient of the routed choices' weights, from their own and that of all choices' weights."""
    if dweights is None or dall is None:
        return dall if dweights is None else dweights
    return dweights + dall[:, : dweights.shape[1]]


@operator("smop::route", check=check, fake=_fake, gradient=(_save, _backward), lowered={"x", "gate_weight"})
def route(
    x: Tensor,
    gate_weight: Tensor,
    modality: Tensor | None,
    mask: Tensor | None,
    top_k: int,
    num_experts: int,
    shared_experts: int,
    backend: str,
) -> Routed:
    checks.same_float("x", x, gate_weight=gate_weight)
    if modality is not None and gate_weight.shape[0] == 2:
        checks.in_range("modality", modality, 0, 1)
    routed = dispatch.module(backend).route_fwd(
        *prepared(x, gate_weight, modality, mask), top_k, num_experts, shared_experts
    )
    none_more = () if shared_experts else (routed[1].new_empty(0), routed[2].new_empty(0))
    return Routed._make((*routed, *none_more))


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
