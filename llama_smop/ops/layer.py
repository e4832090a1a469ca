"""Routing and expert projection as one autograd node, in plain eager mode.

A step of few tokens waits for the host. Two operators are two nodes, and look at the same tensors twice, forward and
backward. What watches or transforms (a compiler, a mode, a profile, a second derivative) sees the two operators.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llama_smop.ops import checks, dispatch
from llama_smop.ops.backend import Experts, Saved, Schedule
from llama_smop.ops.expert_projection import check_dtypes, contiguous, dropped, expert_projection_bwd
from llama_smop.ops.operator import autocast_is_on, is_plain, lowered, on_its_device, without_autocast
from llama_smop.ops.route import prepared, route_bwd, summed


class Options(NamedTuple):
    """The layer's arguments that have no gradient."""

    modality: Tensor | None
    mask: Tensor | None
    top_k: int
    num_experts: int
    shared_experts: int
    activation: str
    eps: float
    recompute: str
    backend: str


class Projected(NamedTuple):
    """y (T, O), and what `Routing` says of the others."""

    y: Tensor
    logits: Tensor
    weights: Tensor
    experts: Tensor
    counts: Tensor
    load_balancing_loss: Tensor
    router_z_loss: Tensor


class Kept(NamedTuple):
    """What backward needs: arguments and results of both halves."""

    x: Tensor
    gate_weight: Tensor
    modality: Tensor | None
    mask: Tensor | None
    logits: Tensor
    weights: Tensor
    experts: Tensor
    counts: Tensor
    all_weights: Tensor | None  # as in `Routed`; None without shared experts
    all_experts: Tensor | None
    schedule: Schedule
    parameters: Experts
    saved: Saved

    @classmethod
    def of(cls, tensors: Sequence) -> "Kept":
        """From what `flat` gives."""
        nested = Schedule(*tensors[10:13]), Experts(*tensors[13:19]), Saved(*tensors[19:])
        return cls._make((*tensors[:10], *nested))

    def flat(self) -> tuple[Tensor | None, ...]:
        return *self[:10], *self.schedule, *self.parameters, *self.saved


def in_one_node(x: Tensor, gate_weight: Tensor, parameters: Experts, options: Options) -> Projected | None:
    """The layer, or None where the two operators are due. Arguments are as theirs, checked but for dtypes."""
    leaves = x, gate_weight, *parameters
    if not is_plain((*leaves, options.modality, options.mask)):
        return None
    run = _forward
    if torch.is_grad_enabled():
        for tensor in leaves:
            if tensor is not None and tensor.requires_grad:
                run = _recorded
                break
    device_type = x.device.type
    if not autocast_is_on(device_type):
        return Projected(*run(*leaves, options)[:7])
    dtype = torch.get_autocast_dtype(device_type)
    if run is _recorded and x.requires_grad and x.dtype != dtype:
        return None  # its gradients from router and experts are added up in its own dtype
    with without_autocast(device_type):
        x, gate_weight, *products = [lowered(t, dtype) for t in leaves[:6]]
        return Projected(*run(x, gate_weight, *products, *leaves[6:], options)[:7])


def _forward(x: Tensor, gate_weight: Tensor, *parameters_and_options) -> tuple:
    """→ the tensors of `Projected`, `Schedule` and `Saved`, then all choices' weights and experts, None if not more."""
    *rest, o = parameters_and_options
    parameters = Experts(*rest)
    checks.same_float("x", x, gate_weight=gate_weight)
    check_dtypes(x, parameters)
    if o.modality is not None and gate_weight.shape[0] == 2:
        checks.in_range("modality", o.modality, 0, 1)
    return on_its_device(
        dispatch.module(o.backend).replayed(_route_and_project),
        *prepared(x, gate_weight, o.modality, o.mask), o.top_k, o.num_experts,
        o.shared_experts, Experts(*contiguous(parameters)), o.activation, o.eps, o.backend,
    )  # fmt: skip


def _route_and_project(
    x, gate_weight, modality, mask, top_k, num_experts, shared_experts, parameters, activation, eps, backend
) -> tuple:
    module = dispatch.module(backend)
    routed = module.route_fwd(x, gate_weight, modality, mask, top_k, num_experts, shared_experts, parameters.w1)
    weights, experts = routed[9:] if shared_experts else routed[1:3]
    rows = Schedule(*routed[6:9])
    y, *saved = module.expert_projection_fwd(x, weights, experts, rows, parameters, activation, eps)
    return y, *routed[:9], *saved, *(routed[9:] or (None, None))


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *leaves_and_options):
        x, gate_weight, *parameters, o = leaves_and_options
        found = _forward(*leaves_and_options)
        _, logits, weights, experts, counts, balance, z_loss, *schedule = found[:10]
        saved, (all_weights, all_experts) = dropped(Saved(*found[10:15]), o.recompute), found[15:]
        ctx.save_for_backward(*Kept(
            x, gate_weight, o.modality, o.mask, logits, weights, experts, counts, all_weights, all_experts,
            Schedule(*schedule), Experts(*parameters), saved,
        ).flat())  # fmt: skip
        if x.requires_grad or gate_weight.requires_grad:
            ctx.mark_non_differentiable(experts, counts)
        else:
            ctx.mark_non_differentiable(logits, weights, experts, counts, balance, z_loss)
        ctx.set_materialize_grads(False)
        ctx.options = o
        return found[:7]

    @staticmethod
    def backward(ctx, dy, dlogits, dweights, _experts, _counts, dbalance, dz):
        need_dx, need_dgate, *needed = ctx.needs_input_grad[:8]
        tensors, grads = ctx.saved_tensors, (dy, dlogits, dweights, dbalance, dz)
        plain = dy is not None and dweights is None and not torch.is_grad_enabled() and is_plain((*grads, *tensors))
        gradients = _at_once if plain else _by_operators
        dx, dx_route, dgate, *dparams = gradients(
            grads, Kept.of(tensors), ctx.options, need_dx, need_dx or need_dgate, any(needed)
        )
        if not need_dx:
            dx = None
        elif dx is None or dx_route is None:
            dx = dx_route if dx is None else dx
        else:
            dx = dx + dx_route
        dparams = [g if wanted else None for g, wanted in zip(dparams, needed, strict=True)]
        return dx, dgate if need_dgate else None, *dparams, None


# `apply` without what it does for transforms, of which `is_plain` has seen none.
_recorded = super(torch.autograd.Function, _Node).apply


def _at_once(grads, k: Kept, o: Options, need_dx: bool, need_routing: bool, need_dparams: bool) -> tuple:
    dy, dlogits, _, dbalance, dz = grads
    arguments = (
        *prepared(k.x, k.gate_weight, k.modality, k.mask), k.logits, k.weights, k.experts, k.counts,
        k.all_weights, k.all_experts, *contiguous((dlogits, dbalance, dz)),
        k.schedule, Experts(*contiguous(k.parameters)), k.saved, o.activation, o.eps,
        need_dx, need_routing, need_dparams, o.backend,
    )  # fmt: skip
    sequence = dispatch.module(o.backend).replayed(_gradients)
    if autocast_is_on(k.x.device.type):  # around backward: what it is given has the dtypes of its forward
        with without_autocast(k.x.device.type):
            return on_its_device(sequence, dy.contiguous(), *arguments)
    return on_its_device(sequence, dy.contiguous(), *arguments)


def _gradients(
    dy, x, gate_weight, modality, mask, logits, weights, experts, counts, all_weights, all_experts,
    dlogits, dbalance, dz, schedule, parameters, saved, activation, eps, need_dx, need_routing, need_dparams, backend,
) -> tuple:  # fmt: skip
    module = dispatch.module(backend)
    choices = (weights, experts) if all_weights is None else (all_weights, all_experts)
    dx, dweights, *dparams = module.expert_projection_bwd(
        dy, x, *choices, schedule, parameters, saved, activation, eps, need_dx, need_routing, need_dparams
    )
    dx_route = dgate = None
    if need_routing:
        dx_route, dgate = module.route_bwd(
            x, gate_weight, modality, mask, logits, weights, experts, counts,
            dlogits, dweights, dbalance, dz, need_dx,
        )  # fmt: skip
    return dx, dx_route, dgate, *dparams


def _by_operators(grads, k: Kept, o: Options, need_dx: bool, need_routing: bool, need_dparams: bool) -> tuple:
    """What the two operators' own backward would do, for gradients of any kind."""
    dy, dlogits, dweights, dbalance, dz = grads
    dx = dx_route = dgate = None
    dparams: list = [None] * 6
    if dy is not None:
        choices = (k.weights, k.experts) if k.all_weights is None else (k.all_weights, k.all_experts)
        saved = Saved(*(k.x.new_empty(0) if t is None else t for t in k.saved))
        dx, dw, *dparams = expert_projection_bwd(
            dy, k.x, *choices, k.schedule, k.parameters, saved, o.activation, o.eps,
            need_dx, need_routing, need_dparams, o.backend,
        )  # fmt: skip
        if need_routing:
            dweights = summed(dweights, dw)
    if need_routing and not (dlogits is None and dweights is None and dbalance is None and dz is None):
        dx_route, dgate = route_bwd(
            k.x, k.gate_weight, k.modality, k.mask, k.logits, k.weights, k.experts, k.counts,
            dlogits, dweights, dbalance, dz, need_dx, o.backend,
        )  # fmt: skip
    return dx, dx_route, dgate, *dparams
