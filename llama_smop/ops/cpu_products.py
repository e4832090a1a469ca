"""Matrix products of the PyTorch backend, in the dtype in which the machine multiplies fast.

A CPU without AVX512 or its like has no bfloat16 and float16 products: PyTorch's then run up to a hundred times slower
than float32 ones. There the operands are brought to float32, the product is float32's, and its result is rounded once.
Weights are read, and their gradients written, in blocks that stay in cache, so no whole weight exists in float32, and
at few rows the product of half as many bytes is quicker than float32's own. Everywhere else these are `mm` and `addmm`.
"""

from functools import cache

import torch
from torch import Tensor

from llama_smop.ops import cpu_memory

BLOCK_BYTES = 1 << 20  # of a weight in float32, at few rows: about a core's L2 cache


@cache
def _cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has fast products of `dtype`; what PyTorch itself asks before it hands them to oneDNN."""
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    if name is None:
        return True
    try:
        return bool(getattr(torch.ops.mkldnn, name)())
    except (AttributeError, RuntimeError):  # a PyTorch without oneDNN
        return False


def product_dtype(like: Tensor) -> torch.dtype:
    """The dtype that operands of products are brought to: `like`'s own, or float32."""
    return torch.float32 if like.device.type == "cpu" and not _cpu_multiplies(like.dtype) else like.dtype


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """rows · weightᵀ + bias: (M, K), (N, K), (N,) → (M, N), rounded into `out`, else in the dtype of the product."""
    dtype = product_dtype(weight)
    if dtype == weight.dtype:
        rows = rows.to(dtype)
        return torch.mm(rows, weight.t(), out=out) if bias is None else torch.addmm(bias, rows, weight.t(), out=out)
    rows = rows.to(dtype)
    (N, K), M = weight.shape, rows.shape[0]
    if weight.stride(1) == 1:  # a block of weight rows gives columns of the product
        result = rows.new_empty(M, N)
        block, parts = _blocks(N, K, M, weight)
        for part in parts:
            w = block[: part.stop - part.start].copy_(weight[part])
            if bias is None:
                torch.mm(rows, w.t(), out=result[:, part])
            else:
                torch.addmm(bias[part].to(dtype), rows, w.t(), out=result[:, part])
    else:  # a block of weight columns, contiguous in memory, gives a part of every sum
        result = rows.new_zeros(M, N) if bias is None else bias.to(dtype).expand(M, N).contiguous()
        block, parts = _blocks(K, N, M, weight)
        for part in parts:
            w = block[: part.stop - part.start].copy_(weight[:, part].t())
            result.addmm_(rows[:, part], w)
    return result if out is None else out.copy_(result)


def outer(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """aᵀ · b into `out`, the gradient of a weight: (R, M), (R, N) → (M, N)."""
    dtype = product_dtype(out)
    a, b = a.to(dtype), b.to(dtype)
    if dtype == out.dtype:
        return torch.mm(a.t(), b, out=out)
    block, parts = _blocks(*out.shape, a.shape[0], out)
    for part in parts:
        out[part] = torch.mm(a[:, part].t(), b, out=block[: part.stop - part.start])
    return out


def _blocks(length: int, width: int, rows: int, like: Tensor) -> tuple[Tensor, list[slice]]:
    """A float32 block of a weight of `length` by `width`, and the slices of `length` it serves in turn.

    Every block packs the `rows` of the other operand anew: where these are many, larger blocks are quicker.
    """
    step = min(length, max(32, BLOCK_BYTES // (4 * max(width, 1)), rows // 2))
    block = cpu_memory.empty((step, width), like.new_empty(0, dtype=torch.float32))
    return block, [slice(i, min(i + step, length)) for i in range(0, length, step)] if step else []
