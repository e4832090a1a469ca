"""`smop::grouped_mm`: one matrix product a group, groups given by cumulative row ends, as torch's grouped_mm."""

import torch
from torch import Tensor

from llama_smop.ops import checks, dispatch
from llama_smop.ops.operator import operator


def check(a: Tensor, b: Tensor, offs: Tensor, bias: Tensor | None, activation: str | None, *_) -> None:
    """Everything that can be known without reading a value, except dtypes, which autocast may change yet."""
    if b.dim() not in (2, 3):
        checks.tensors(("a", a, "MK"))
        raise ValueError(f"b must be (G, K, N) or (K, N), got {tuple(b.shape)}")
    if b.dim() == 2 and (bias is not None or activation is not None):
        raise ValueError("bias and activation belong to the 2d x 3d form; a 2d x 2d product takes neither")
    checks.tensors(("a", a, "MK"), ("offs", offs, "G"), ("b", b, "GKN" if b.dim() == 3 else "KN"), ("bias", bias, "GN"))
    if offs.dtype != torch.int32:
        raise TypeError(f"offs must be int32 cumulative ends, got {offs.dtype}")
    if activation is not None:
        checks.options(activation, "none")


def _fake(a, b, offs, bias, activation, backend) -> tuple[Tensor, Tensor]:
    checks.same_float("a", a, b=b, bias=bias)
    if b.dim() == 2:
        return a.new_empty(offs.shape[0], a.shape[0], b.shape[1]), a.new_empty(0)
    out = a.new_empty(a.shape[0], b.shape[2])
    return out, a.new_empty((0,) if activation in (None, "relu") else out.shape)


def _save(ctx, arguments, results) -> None:
    a, b, offs, bias, ctx.activation, ctx.backend = arguments
    out, pre = results
    ctx.mark_non_differentiable(pre)
    ctx.save_for_backward(a, b, offs, bias, out if ctx.activation == "relu" else pre)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _) -> tuple:
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
        return grouped_mm(p, q, offs, None, None, ctx.backend)[0]

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


@operator("smop::grouped_mm", check=check, fake=_fake, gradient=(_save, _backward), lowered={"a", "b", "bias"})
def grouped_mm(
    a: Tensor, b: Tensor, offs: Tensor, bias: Tensor | None, activation: str | None, backend: str
) -> tuple[Tensor, Tensor]:
    """→ the product, and the pre-activation that a backward needs (else empty)."""
    checks.same_float("a", a, b=b, bias=bias)
    checks.cumulative("offs", offs, a.shape[0] if b.dim() == 3 else a.shape[1])
    if not offs.numel():
        out, pre = _fake(a, b, offs, bias, activation, backend)
        return out.zero_(), pre.zero_()
    if 1 not in b.stride()[-2:]:
        b = b.contiguous()
    if b.dim() == 3 or 1 not in a.stride():
        a = a.contiguous()
    bias = None if bias is None else bias.contiguous()
    return dispatch.module(backend).grouped_mm(a, b, offs.contiguous(), bias, activation)
