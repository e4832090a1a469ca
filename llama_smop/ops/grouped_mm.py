"""`smop::grouped_mm`: one matrix product a group, groups given by cumulative row ends, as torch's grouped_mm."""

from itertools import pairwise

import torch
from torch import Tensor

from llama_smop.ops import direct, dispatch, refusals
from llama_smop.ops.autocast import Autocast


def check(a: Tensor, b: Tensor, offs: Tensor, bias: Tensor | None, activation: str | None) -> None:
    """Everything that can be known without reading a value, except dtypes, which autocast may change yet."""
    dispatch.check_shape("a", a, ("M", "K"))
    dispatch.check_shape("offs", offs, ("G",))
    if offs.dtype != torch.int32:
        raise TypeError(f"offs must be int32 cumulative ends, got {offs.dtype}")
    G = offs.shape[0]
    if b.dim() == 3:
        dispatch.check_shape("b", b, (G, a.shape[1], "N"))
        if bias is not None:
            dispatch.check_shape("bias", bias, (G, b.shape[2]))
    elif b.dim() == 2:
        dispatch.check_shape("b", b, (a.shape[1], "N"))
        if bias is not None or activation is not None:
            raise ValueError("bias and activation belong to the 2d x 3d form; a 2d x 2d product takes neither")
    else:
        raise ValueError(f"b must be (G, K, N) or (K, N), got {tuple(b.shape)}")
    dispatch.check_device("a", a, b=b, bias=bias, offs=offs)
    if activation is not None:
        dispatch.check_activation(activation)


def check_dtypes(a: Tensor, b: Tensor, bias: Tensor | None) -> None:
    dispatch.check_float("a", a)
    dispatch.check_like("a", a, b=b, bias=bias)


def check_offsets(offs: Tensor, rows: int) -> None:
    if offs.numel() and dispatch.values_are_checked(offs.device):
        ends = offs.tolist()
        if ends[0] < 0 or ends[-1] > rows or any(p > q for p, q in pairwise(ends)):
            raise IndexError(f"offs must rise from 0 to at most {rows}, got {ends[:8]}{'…' if len(ends) > 8 else ''}")


@torch.library.custom_op("smop::grouped_mm", mutates_args=())
def grouped_mm(
    a: Tensor, b: Tensor, offs: Tensor, bias: Tensor | None, activation: str | None, backend: str
) -> tuple[Tensor, Tensor]:
    check(a, b, offs, bias, activation)
    return _grouped_mm(a, b, offs, bias, activation, backend)


def _grouped_mm(a, b, offs, bias, activation, backend) -> tuple[Tensor, Tensor]:
    check_dtypes(a, b, bias)
    check_offsets(offs, a.shape[0] if b.dim() == 3 else a.shape[1])
    if 1 not in b.stride()[-2:]:
        b = b.contiguous()
    if b.dim() == 2 and 1 not in a.stride():
        a = a.contiguous()
    a = a if b.dim() == 2 else a.contiguous()
    return dispatch.module(backend).grouped_mm(a, b, offs.contiguous(), bias, activation)


@grouped_mm.register_fake
def _(a, b, offs, bias, activation, backend):
    check(a, b, offs, bias, activation)
    check_dtypes(a, b, bias)
    if b.dim() == 2:
        return a.new_empty(offs.shape[0], a.shape[0], b.shape[1]), a.new_empty(0)
    out = a.new_empty(a.shape[0], b.shape[2])
    return out, a.new_empty((0,) if activation in (None, "relu") else out.shape)


def _setup_context(ctx, inputs, output):
    a, b, offs, bias, ctx.activation, ctx.backend = inputs
    out, pre = output
    ctx.mark_non_differentiable(pre)
    ctx.save_for_backward(a, b, offs, bias, out if ctx.activation == "relu" else pre)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 6
    if torch.is_grad_enabled() and ctx.activation in ("gelu", "silu"):  # the kept pre-activation carries no graph
        raise RuntimeError(
            f'smop::grouped_mm with activation="{ctx.activation}" cannot be differentiated twice: '
            "apply the activation outside, or do not ask for create_graph"
        )
    a, b, offs, _, kept = ctx.saved_tensors
    need_a, need_b, _, need_bias, *_ = ctx.needs_input_grad

    def product(p, q):
        return run(p, q, offs, None, None, ctx.backend)[0]

    if b.dim() == 2:  # out[g] = a[:, g] · b[g, :]; rows past the last offset take no part, so their gradient is 0
        da = product(b, grad.transpose(1, 2)).t() if need_a else None
        db = product(a.t(), grad) if need_b else None
        return da, db, None, None, None, None
    if ctx.activation == "relu":
        grad = torch.ops.aten.threshold_backward(grad, kept, 0)
    elif ctx.activation == "gelu":
        grad = torch.ops.aten.gelu_backward(grad, kept)
    elif ctx.activation == "silu":
        grad = torch.ops.aten.silu_backward(grad, kept)
    da = product(grad, b.transpose(1, 2)) if need_a else None
    db = product(a.t(), grad) if need_b else None
    dbias = None
    if need_bias:  # a row of ones times each group's rows: the sum over a group, without a sort or an atomic
        dbias = product(grad.new_ones(1, grad.shape[0]), grad)[:, 0]
    return da, db, None, dbias, None, None


grouped_mm.register_autograd(_backward, setup_context=_setup_context)
refusals.refuse_vmap(grouped_mm)
# For arguments that `check` has seen.
run = direct.call(grouped_mm, _grouped_mm, _setup_context, _backward, autocast=Autocast(grouped_mm, {"a", "b", "bias"}))
