"""`smop::expert_projection`: every token through its K experts, LayerNorm, gate weight, sum; and `smop::schedule`.

Kept for backward: x, h (after the ReLU: it is the mask and the operand of dW2), z, mean and rstd, the routing and the
weights themselves; gelu, silu and gated experts also keep what came before the activation. `recompute` drops h or z and
pays one grouped GEMM in backward; the routing is never recomputed.

Gated experts are an activation of the first product's two halves: with "reglu", "geglu" and "swiglu" W1 is (X, 2·H, D),
gate rows first, as in transformers' `gate_up_proj`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llama_smop.ops import checks, dispatch
from llama_smop.ops.backend import Experts, Saved, Schedule, acc_dtype
from llama_smop.ops.operator import autocast_dtype, is_plain, operator


def _check_experts(experts, num_experts, backend) -> None:
    checks.tensors(("experts", experts, "TK"))


def _fake_schedule(experts, num_experts, backend) -> Schedule:
    T, K = experts.shape
    integer = {"dtype": torch.int32}
    return Schedule(
        order=experts.new_empty(T * K, **integer),
        inverse=experts.new_empty(T, K, **integer),
        offs=experts.new_empty(num_experts, **integer),
    )


@operator("smop::schedule", check=_check_experts, fake=_fake_schedule)
def schedule(experts: Tensor, num_experts: int, backend: str) -> Schedule:
    checks.integer("experts", experts)
    checks.in_range("experts (num_experts itself skips a choice)", experts, 0, num_experts)
    made = dispatch.module(backend).schedule(experts.to(torch.int32).contiguous(), num_experts)
    return Schedule(*made)


def check_parameters(x: Tensor, parameters: Experts, activation: str, recompute: str | int) -> None:
    """All that is known of the parameters without reading a value, except dtypes, which autocast may change yet."""
    w1, b1, w2, b2, ln_weight, ln_bias = parameters
    if (ln_weight is None) != (ln_bias is None):
        raise ValueError("ln_weight and ln_bias go together: pass both, or neither for no LayerNorm")
    gated = activation in checks.GATED
    sizes = checks.tensors(
        ("x", x, "TD"), ("w1", w1, "XFD" if gated else "XHD"), ("w2", w2, "XOH"),
        ("b1", b1, "XF" if gated else "XH"), ("b2", b2, "XO"),
        ("ln_weight", ln_weight, "XO"), ("ln_bias", ln_bias, "XO"),
    )  # fmt: skip
    if gated and sizes["F"] != 2 * sizes["H"]:
        raise ValueError(
            f"w1 of gated experts must hold gate and up rows, (X, 2·H, D) with H = {sizes['H']} as in w2, "
            f"got {tuple(w1.shape)}"
        )
    checks.options(checks.GATED.get(activation, activation), recompute)


def recomputed(recompute: str | int, x: Tensor, choices: int, w1: Tensor, w2: Tensor, activation: str) -> str:
    """The name of what backward computes again.

    A number is the bytes of h and z that may be kept: of the choices that keep no more, the one with least arithmetic.
    """
    if isinstance(recompute, str):
        return recompute
    (_, first, D), (_, O, H) = w1.shape, w2.shape
    row_bytes = choices * autocast_dtype(x).itemsize
    h, z = row_bytes * (H if activation == "relu" else H + first), row_bytes * O
    kept = {"none": h + z, "h": z, "z": h}
    # To compute h again takes D·H a row, twice that when gated; z takes H·O.
    for name in ("none", "h", "z") if D * first <= O * H else ("none", "z", "h"):
        if kept[name] <= recompute:
            return name
    return "hz"


def check_choices(x: Tensor, weights: Tensor, experts: Tensor) -> None:
    checks.tensors(("x", x, "TD"), ("weights", weights, "TK"), ("experts", experts, "TK"))
    checks.floating(weights=weights)
    checks.integer("experts", experts)


def check_schedule(experts: Tensor, num_experts: int, schedule: Schedule) -> None:
    order, inverse, offs = schedule
    checks.tensors(
        ("experts", experts, "TK"), ("order", order, (experts.numel(),)), ("inverse", inverse, "TK"),
        ("offs", offs, (num_experts,)),
    )  # fmt: skip
    for name, tensor in zip(Schedule._fields, schedule, strict=True):
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, as `route` returns it, got {tensor.dtype}")


def check_rows(schedule: Schedule) -> None:
    """Raise IndexError where a caller's schedule names rows that do not exist.

    On a GPU only under LLAMA_SMOP_DEBUG=1: without it kernels take each entry as clamped to what exists.
    """
    order, inverse, offs = schedule
    if not is_plain(schedule) or not checks.values_are_checked(offs.device):
        return
    rows = order.shape[0]
    checks.cumulative("offs", offs, rows)
    used = int(offs[-1]) if offs.numel() else 0
    checks.in_range("order", order[:used], 0, rows - 1)
    checks.in_range("inverse", inverse, -1, used - 1)


def _check(x, weights, experts, schedule, parameters, activation, eps, recompute, backend) -> None:
    check_parameters(x, parameters, activation, recompute)
    check_choices(x, weights, experts)
    check_schedule(experts, parameters.w1.shape[0], schedule)


def check_dtypes(x: Tensor, parameters: Experts) -> None:
    w1, b1, w2, b2, ln_weight, ln_bias = parameters
    checks.same_float("x", x, w1=w1, b1=b1, w2=w2, b2=b2)
    checks.floating(ln_weight=ln_weight, ln_bias=ln_bias)


def contiguous(tensors: Sequence) -> list:
    return [None if t is None else t.contiguous() for t in tensors]


def _fake(x, weights, experts, schedule, parameters, activation, eps, recompute, backend) -> tuple[Tensor, ...]:
    check_dtypes(x, parameters)
    (T, K), (_, O, H) = weights.shape, parameters.w2.shape
    stats = x.new_empty(0 if parameters.ln_weight is None else T * K, dtype=acc_dtype(x.dtype))
    return (
        x.new_empty(T, O),
        x.new_empty(T * K, H),
        x.new_empty((0,) if activation == "relu" else (T * K, parameters.w1.shape[1])),
        x.new_empty(T * K, O),
        stats,
        torch.empty_like(stats),
    )


def dropped(saved: Saved, recompute: str) -> Saved:
    """`saved` without what backward computes again."""
    if recompute == "none":
        return saved
    empty = saved.h.new_empty(0)
    if "h" in recompute:
        saved = saved._replace(h=empty, pre=empty)
    return saved._replace(z=empty) if "z" in recompute else saved


def _save(ctx, arguments, results) -> None:
    x, weights, experts, schedule, parameters, ctx.activation, ctx.eps, recompute, ctx.backend = arguments
    saved = Saved(*results[1:])
    ctx.mark_non_differentiable(*saved)
    ctx.save_for_backward(x, weights, experts, *schedule, *parameters, *dropped(saved, recompute))
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, *_) -> tuple:
    if dy is None:
        return (None,) * 9
    x, weights, experts, *rest = ctx.saved_tensors
    schedule, parameters, saved = Schedule(*rest[:3]), Experts(*rest[3:9]), Saved(*rest[9:])
    need_dx, need_dweights, *_ = ctx.needs_input_grad
    needed = ctx.needs_input_grad[6:12]  # of the parameters
    dx, dweights, *grads = expert_projection_bwd(
        dy, x, weights, experts, schedule, parameters, saved, ctx.activation, ctx.eps,
        need_dx, need_dweights, any(needed), ctx.backend,
    )  # fmt: skip
    dparams = tuple(g if wanted else None for g, wanted in zip(grads, needed, strict=True))
    dweights = dweights.to(weights.dtype) if need_dweights else None
    return dx if need_dx else None, dweights, None, None, dparams, None, None, None, None


@operator(
    "smop::expert_projection",
    check=_check,
    fake=_fake,
    gradient=(_save, _backward),
    lowered={"x", "w1", "b1", "w2", "b2"},
)
def expert_projection(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    schedule: Schedule,
    parameters: Experts,
    activation: str,
    eps: float,
    recompute: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """→ y, then the tensors of `Saved`; what has no use is empty."""
    check_dtypes(x, parameters)
    x, weights, experts = contiguous((x, weights.to(acc_dtype(x.dtype)), experts.to(torch.int32)))
    schedule, parameters = Schedule(*contiguous(schedule)), Experts(*contiguous(parameters))
    y, h, pre, z, mean, rstd = dispatch.module(backend).expert_projection_fwd(
        x, weights, experts, schedule, parameters, activation, eps
    )
    if pre is None:
        pre = x.new_empty(0)
    if mean is None or rstd is None:
        mean, rstd = weights.new_empty(0), weights.new_empty(0)
    return y, h, pre, z, mean, rstd


def _fake_bwd(
    dy, x, weights, experts, schedule, parameters, saved, activation, eps, need_dx, need_dweights, need_dparams, backend
) -> tuple[Tensor, ...]:
    def like(tensor, needed):
        return x.new_empty(0) if tensor is None or not needed else tensor.new_empty(tensor.shape)

    dweights = x.new_empty(weights.shape, dtype=acc_dtype(x.dtype)) if need_dweights else x.new_empty(0)
    return like(x, need_dx), dweights, *(like(p, need_dparams) for p in parameters)


class Gradients(NamedTuple):
    dx: Tensor
    dweights: Tensor
    dw1: Tensor
    db1: Tensor
    dw2: Tensor
    db2: Tensor
    dln_weight: Tensor
    dln_bias: Tensor


@operator("smop::expert_projection_bwd", fake=_fake_bwd, derivative_of="smop::expert_projection")
def expert_projection_bwd(
    dy: Tensor,
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    schedule: Schedule,
    parameters: Experts,
    saved: Saved,
    activation: str,
    eps: float,
    need_dx: bool,
    need_dweights: bool,
    need_dparams: bool,
    backend: str,
) -> Gradients:
    """What was not asked for is empty."""
    dy, x, weights, experts = contiguous((dy, x, weights.to(acc_dtype(x.dtype)), experts.to(torch.int32)))
    schedule, parameters = Schedule(*contiguous(schedule)), Experts(*contiguous(parameters))
    grads = dispatch.module(backend).expert_projection_bwd(
        dy, x, weights, experts, schedule, parameters, saved, activation, eps, need_dx, need_dweights, need_dparams
    )
    return Gradients(*(x.new_empty(0) if g is None else g for g in grads))
