"""`smop::route`: from tokens to experts, gate weights, both auxiliary losses and the rows in expert order."""

from typing import NamedTuple

import torch
from torch import Tensor

from llama_smop.ops import direct, dispatch, refusals
from llama_smop.ops.autocast import Autocast
from llama_smop.ops.backends.torch import acc_dtype


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


def check(x: Tensor, gate_weight: Tensor, modality: Tensor | None, mask: Tensor | None, top_k: int, X: int) -> None:
    """Everything that can be known without reading a value, except dtypes, which autocast may change yet."""
    dispatch.check_shape("x", x, ("T", "D"))
    dispatch.check_shape("gate_weight", gate_weight, ("R", "E", x.shape[1]))
    R, E, _ = gate_weight.shape
    if not 1 <= top_k <= E:
        raise ValueError(f"top_k must lie in [1, num_experts] = [1, {E}], got {top_k}")
    if X not in (E, R * E):
        raise ValueError(f"num_experts must be {E} or {R * E} for gate_weight {tuple(gate_weight.shape)}, got {X}")
    if R not in (1, 2):
        raise ValueError(f"gate_weight must hold 1 router or 2 (audio, video), got {R}")
    if R == 2 and modality is None:
        raise ValueError("modality is required with two routers: a (T,) integer tensor, 0 audio, 1 video")
    if modality is not None:
        dispatch.check_shape("modality", modality, (x.shape[0],))
        dispatch.check_integer("modality", modality)
    if mask is not None:
        dispatch.check_shape("mask", mask, (x.shape[0],))
        dispatch.check_mask(mask)
    dispatch.check_device("x", x, gate_weight=gate_weight, modality=modality, mask=mask)


def check_dtypes(x: Tensor, gate_weight: Tensor) -> None:
    dispatch.check_float("x", x)
    dispatch.check_like("x", x, gate_weight=gate_weight)


@torch.library.custom_op("smop::route", mutates_args=())
def route(
    x: Tensor,
    gate_weight: Tensor,
    modality: Tensor | None,
    mask: Tensor | None,
    top_k: int,
    num_experts: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check(x, gate_weight, modality, mask, top_k, num_experts)
    return _route(x, gate_weight, modality, mask, top_k, num_experts, backend)


def _route(x, gate_weight, modality, mask, top_k, num_experts, backend) -> tuple[Tensor, ...]:
    check_dtypes(x, gate_weight)
    if modality is not None:
        dispatch.check_in_range("modality", modality, 0, 1)
    return dispatch.module(backend).route_fwd(
        x.contiguous(), gate_weight.contiguous(), *_tokens(gate_weight, modality, mask), top_k, num_experts
    )


def _tokens(gate_weight: Tensor, modality: Tensor | None, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """modality and mask as backends take them."""
    modality = None if gate_weight.shape[0] == 1 or modality is None else modality.to(torch.int32).contiguous()
    return modality, None if mask is None else mask.contiguous()


@route.register_fake
def _(x, gate_weight, modality, mask, top_k, num_experts, backend):
    check(x, gate_weight, modality, mask, top_k, num_experts)
    check_dtypes(x, gate_weight)
    T, (R, E, _) = x.shape[0], gate_weight.shape
    acc = acc_dtype(x.dtype)
    integer = {"dtype": torch.int32}
    return (
        x.new_empty(T, E, dtype=acc),
        x.new_empty(T, top_k, dtype=acc),
        x.new_empty(T, top_k, **integer),
        x.new_empty(R, E, **integer),
        x.new_empty((), dtype=acc),
        x.new_empty((), dtype=acc),
        x.new_empty(T * top_k, **integer),
        x.new_empty(T, top_k, **integer),
        x.new_empty(num_experts, **integer),
    )


@torch.library.custom_op("smop::route_bwd", mutates_args=())
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
    return _route_bwd(
        x, gate_weight, modality, mask, logits, weights, experts, counts,
        dlogits, dweights, dbalance, dz, need_dx, backend,
    )  # fmt: skip


def _route_bwd(
    x, gate_weight, modality, mask, logits, weights, experts, counts, dlogits, dweights, dbalance, dz, need_dx, backend
) -> tuple[Tensor, Tensor]:
    dlogits = None if dlogits is None else dlogits.contiguous()
    dweights = None if dweights is None else dweights.contiguous()
    dx, dgate = dispatch.module(backend).route_bwd(
        x.contiguous(),
        gate_weight.contiguous(),
        *_tokens(gate_weight, modality, mask),
        logits,
        weights,
        experts,
        counts,
        dlogits,
        dweights,
        dbalance,
        dz,
        need_dx,
    )
    return x.new_empty(0) if dx is None else dx, dgate


@route_bwd.register_fake
def _(x, gate_weight, modality, mask, logits, weights, experts, counts, dlogits, dweights, dbalance, dz, need_dx, b):
    return x.new_empty(x.shape if need_dx else (0,)), torch.empty_like(
        gate_weight, memory_format=torch.contiguous_format
    )


def _setup_context(ctx, inputs, output):
    x, gate_weight, modality, mask, _, _, backend = inputs
    logits, weights, experts, counts, _, _, order, inverse, offs = output
    ctx.save_for_backward(x, gate_weight, modality, mask, logits, weights, experts, counts)
    ctx.backend = backend
    ctx.mark_non_differentiable(experts, counts, order, inverse, offs)
    ctx.set_materialize_grads(False)


def _backward(ctx, dlogits, dweights, _experts, _counts, dbalance, dz, *_schedule):
    if all(g is None for g in (dlogits, dweights, dbalance, dz)):
        return (None,) * 7
    need_dx = ctx.needs_input_grad[0]
    dx, dgate = run_bwd(*ctx.saved_tensors, dlogits, dweights, dbalance, dz, need_dx, ctx.backend)
    return dx if need_dx else None, dgate if ctx.needs_input_grad[1] else None, None, None, None, None, None


route.register_autograd(_backward, setup_context=_setup_context)
refusals.refuse_double_backward(route_bwd)
refusals.refuse_vmap(route)
# `run` is for arguments that `check` has seen.
run = direct.call(route, _route, _setup_context, _backward, autocast=Autocast(route, {"x", "gate_weight"}))
run_bwd = direct.call(route_bwd, _route_bwd, autocast=Autocast(route_bwd))
