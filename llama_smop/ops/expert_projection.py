"""`smop::expert_projection`: every token through its K experts, LayerNorm, gate weight, sum; and `smop::schedule`.

Kept for backward: x, h (after the ReLU: it is the mask and the operand of dW2), z, mean and rstd, the routing and the
weights themselves. `recompute` drops h or z and pays one grouped GEMM in backward; the routing is never recomputed.
"""

import torch
from torch import Tensor

from llama_smop.ops import direct, dispatch, refusals
from llama_smop.ops.autocast import Autocast
from llama_smop.ops.backends.torch import acc_dtype

RECOMPUTE = ("none", "h", "z", "hz")


@torch.library.custom_op("smop::schedule", mutates_args=())
def schedule(experts: Tensor, num_experts: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    dispatch.check_shape("experts", experts, ("T", "K"))
    return _schedule(experts, num_experts, backend)


def _schedule(experts, num_experts, backend) -> tuple[Tensor, Tensor, Tensor]:
    dispatch.check_integer("experts", experts)
    dispatch.check_in_range("experts (num_experts itself skips a choice)", experts, 0, num_experts)
    return dispatch.module(backend).schedule(experts.to(torch.int32).contiguous(), num_experts)


@schedule.register_fake
def _(experts, num_experts, backend):
    T, K = experts.shape
    integer = {"dtype": torch.int32}
    return (
        experts.new_empty(T * K, **integer),
        experts.new_empty(T, K, **integer),
        experts.new_empty(num_experts, **integer),
    )


def check_parameters(x, w1, b1, w2, b2, ln_weight, ln_bias, activation: str, recompute: str) -> None:
    """All that is known of the parameters without reading a value, except dtypes, which autocast may change yet."""
    dispatch.check_shape("x", x, ("T", "D"))
    dispatch.check_shape("w1", w1, ("X", "H", x.shape[1]))
    X, H, _ = w1.shape
    dispatch.check_shape("w2", w2, (X, "O", H))
    O = w2.shape[1]
    if (ln_weight is None) != (ln_bias is None):
        raise ValueError("ln_weight and ln_bias go together: pass both, or neither for no LayerNorm")
    for name, tensor, width in (("b1", b1, H), ("b2", b2, O), ("ln_weight", ln_weight, O), ("ln_bias", ln_bias, O)):
        if tensor is not None:
            dispatch.check_shape(name, tensor, (X, width))
    dispatch.check_device("x", x, w1=w1, b1=b1, w2=w2, b2=b2, ln_weight=ln_weight, ln_bias=ln_bias)
    dispatch.check_activation(activation)
    check_recompute(recompute)


def check_recompute(recompute: str) -> None:
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute must be one of {RECOMPUTE}, got {recompute!r}")


def check_choices(x: Tensor, weights: Tensor, experts: Tensor) -> None:
    dispatch.check_shape("weights", weights, (x.shape[0], "K"))
    dispatch.check_float("weights", weights)
    dispatch.check_shape("experts", experts, tuple(weights.shape))
    dispatch.check_integer("experts", experts)
    dispatch.check_device("x", x, weights=weights, experts=experts)


def check_dtypes(x: Tensor, w1, b1, w2, b2, ln_weight, ln_bias) -> None:
    dispatch.check_float("x", x)
    dispatch.check_like("x", x, w1=w1, b1=b1, w2=w2, b2=b2)
    for name, tensor in (("ln_weight", ln_weight), ("ln_bias", ln_bias)):
        if tensor is not None:
            dispatch.check_float(name, tensor)


def check_schedule(experts: Tensor, num_experts: int, order: Tensor, inverse: Tensor, offs: Tensor) -> None:
    for name, tensor, shape in (
        ("order", order, (experts.numel(),)),
        ("inverse", inverse, tuple(experts.shape)),
        ("offs", offs, (num_experts,)),
    ):
        dispatch.check_shape(name, tensor, shape)
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, as `route` returns it, got {tensor.dtype}")
        dispatch.check_device("experts", experts, **{name: tensor})


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


@torch.library.custom_op("smop::expert_projection", mutates_args=())
def expert_projection(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    order: Tensor,
    inverse: Tensor,
    offs: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    activation: str,
    eps: float,
    recompute: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_parameters(x, w1, b1, w2, b2, ln_weight, ln_bias, activation, recompute)
    check_choices(x, weights, experts)
    check_schedule(experts, w1.shape[0], order, inverse, offs)
    return _expert_projection(
        x, weights, experts, order, inverse, offs, w1, b1, w2, b2, ln_weight, ln_bias,
        activation, eps, recompute, backend,
    )  # fmt: skip


def _expert_projection(
    x, weights, experts, order, inverse, offs, w1, b1, w2, b2, ln_weight, ln_bias, activation, eps, recompute, backend
) -> tuple[Tensor, ...]:
    check_dtypes(x, w1, b1, w2, b2, ln_weight, ln_bias)
    weights = weights.to(acc_dtype(x.dtype))
    tensors = _contiguous(x, weights, experts, order, inverse, offs, w1, b1, w2, b2, ln_weight, ln_bias)
    return dispatch.module(backend).expert_projection_fwd(*tensors, activation, eps)


@expert_projection.register_fake
def _(
    x, weights, experts, order, inverse, offs, w1, b1, w2, b2, ln_weight, ln_bias, activation, eps, recompute, backend
):
    check_parameters(x, w1, b1, w2, b2, ln_weight, ln_bias, activation, recompute)
    check_choices(x, weights, experts)
    check_dtypes(x, w1, b1, w2, b2, ln_weight, ln_bias)
    check_schedule(experts, w1.shape[0], order, inverse, offs)
    (T, K), (X, H, _), O = weights.shape, w1.shape, w2.shape[1]
    M = dispatch.module(backend).intermediate_rows(T, K, X)
    stats = (M if ln_weight is not None else 0,)
    acc = acc_dtype(x.dtype)
    return (
        x.new_empty(T, O),
        x.new_empty(M, H),
        x.new_empty((0,) if activation == "relu" else (M, H)),
        x.new_empty(M, O),
        x.new_empty(stats, dtype=acc),
        x.new_empty(stats, dtype=acc),
    )


@torch.library.custom_op("smop::expert_projection_bwd", mutates_args=())
def expert_projection_bwd(
    dy: Tensor,
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    order: Tensor,
    inverse: Tensor,
    offs: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    h: Tensor,
    pre: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    activation: str,
    eps: float,
    need_dx: bool,
    need_dweights: bool,
    need_dparams: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _expert_projection_bwd(dy, x, weights, experts, order, inverse, offs, w1, b1, w2, b2, ln_weight, ln_bias, h, pre, z, mean, rstd, activation, eps, need_dx, need_dweights, need_dparams, backend)  # fmt: skip  # noqa: E501


def _expert_projection_bwd(dy, x, weights, experts, order, inverse, offs, w1, b1, w2, b2, ln_weight, ln_bias, h, pre, z, mean, rstd, activation, eps, need_dx, need_dweights, need_dparams, backend) -> tuple[Tensor, ...]:  # fmt: skip  # noqa: E501
    weights = weights.to(acc_dtype(x.dtype))
    tensors = _contiguous(dy, x, weights, experts, order, inverse, offs, w1, b1, w2, b2, ln_weight, ln_bias)
    grads = dispatch.module(backend).expert_projection_bwd(
        *tensors, h, pre, z, mean, rstd, activation, eps, need_dx, need_dweights, need_dparams
    )
    return tuple(x.new_empty(0) if g is None else g for g in grads)


@expert_projection_bwd.register_fake
def _(dy, x, weights, experts, order, inverse, offs, w1, b1, w2, b2, ln_weight, ln_bias, h, pre, z, mean, rstd, activation, eps, need_dx, need_dweights, need_dparams, backend):  # fmt: skip  # noqa: E501
    def like(tensor, needed):
        if tensor is None or not needed:
            return x.new_empty(0)
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)

    dweights = x.new_empty(
        weights.shape if need_dweights else (0,), dtype=acc_dtype(x.dtype) if need_dweights else None
    )
    params = (like(p, need_dparams) for p in (w1, b1, w2, b2, ln_weight, ln_bias))
    return (like(x, need_dx), dweights, *params)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.activation, ctx.eps, recompute, ctx.backend = inputs
    _, h, pre, z, mean, rstd = output
    ctx.mark_non_differentiable(h, pre, z, mean, rstd)
    if "h" in recompute:
        h = pre = h.new_empty(0)
    if "z" in recompute:
        z = z.new_empty(0)
    ctx.save_for_backward(*tensors, h, pre, z, mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, *_):
    if dy is None:
        return (None,) * 16
    x, weights, experts, order, inverse, offs, w1, b1, w2, b2, ln_weight, ln_bias, *saved = ctx.saved_tensors
    needs = ctx.needs_input_grad
    params = (w1, b1, w2, b2, ln_weight, ln_bias)
    need_dparams = any(needs[6:12])
    dx, dweights, *dparams = run_bwd(
        dy, x, weights, experts, order, inverse, offs, *params, *saved,
        ctx.activation, ctx.eps, needs[0], needs[1], need_dparams, ctx.backend,
    )  # fmt: skip
    dparams = [g if needed else None for g, needed in zip(dparams, needs[6:12], strict=True)]
    dweights = dweights.to(weights.dtype) if needs[1] else None
    return (dx if needs[0] else None, dweights, None, None, None, None, *dparams, None, None, None, None)


expert_projection.register_autograd(_backward, setup_context=_setup_context)
refusals.refuse_double_backward(expert_projection_bwd)
refusals.refuse_vmap(expert_projection)
refusals.refuse_vmap(schedule)
# `run` and `run_schedule` are for arguments that the checks above have seen.
run_schedule = direct.call(schedule, _schedule)
_AUTOCAST = Autocast(expert_projection, {"x", "w1", "b1", "w2", "b2"})
run = direct.call(expert_projection, _expert_projection, _setup_context, _backward, autocast=_AUTOCAST)
run_bwd = direct.call(expert_projection_bwd, _expert_projection_bwd, autocast=Autocast(expert_projection_bwd))
