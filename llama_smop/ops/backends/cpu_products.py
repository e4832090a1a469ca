"""Matrix products of the PyTorch backend, in the dtype in which the machine multiplies fast.

A CPU without AVX512 or its like has no bfloat16 and float16 products: PyTorch's then run up to a hundred times slower
than float32 ones. There the operands are brought to float32, the product is float32's, and its result is rounded once.
Weights are brought to float32, and their gradients rounded, in blocks that stay in cache, so that half the bytes come
from memory and at few rows the product is quicker than that of float32 weights. Everywhere else these are `mm` and
`addmm`, in float32 at few rows on a part of the weight at a time.
"""

from functools import cache

import torch
from torch import Tensor

from llama_smop.ops.backends import cpu_memory

BLOCK_BYTES = 1 << 20  # of a weight in float32, a thread, at few rows: about a core's L2 cache
# A float32 product of MKL with at most so many rows, in `linear` and in `outer`, is up to a quarter quicker on a part
# of the weight at a time. Measured with AVX2 (Zen 3, weights of 2048 by 1024 and 2048); other CPUs take it whole.
FEW_ROWS_LINEAR, FEW_ROWS_OUTER, PART_ROWS = 128, 16, 512


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


@cache
def _cpu_is_avx2() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def product_dtype(like: Tensor) -> torch.dtype:
    """The dtype that operands of products are brought to: `like`'s own, or float32."""
    return torch.float32 if like.device.type == "cpu" and not _cpu_multiplies(like.dtype) else like.dtype


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """rows · weightᵀ + bias: (M, K), (N, K), (N,) → (M, N), rounded into `out`, else in the dtype of the product."""
    dtype = product_dtype(weight)
    (N, K), M = weight.shape, rows.shape[0]
    rows = rows.to(dtype)
    if dtype == weight.dtype:
        result = rows.new_empty(M, N) if out is None else out
        few = M <= FEW_ROWS_LINEAR and weight.stride(1) == 1
        for part in _parts(N, _part_rows(weight, few)):
            _mm(rows, weight[part].t(), None if bias is None else bias[part], result[:, part])
        return result
    if weight.stride(1) == 1:  # a block of weight rows gives columns of the product
        result = rows.new_empty(M, N)
        block = _block(N, K, M, weight)
        for part in _parts(N, block.shape[0]):
            w = block[: part.stop - part.start].copy_(weight[part])
            _mm(rows, w.t(), None if bias is None else bias[part].to(dtype), result[:, part])
    else:  # a block of weight columns, contiguous in memory, gives a part of every sum
        result = rows.new_zeros(M, N) if bias is None else bias.to(dtype).expand(M, N).contiguous()
        block = _block(K, N, M, weight)
        for part in _parts(K, block.shape[0]):
            result.addmm_(rows[:, part], block[: part.stop - part.start].copy_(weight[:, part].t()))
    return result if out is None else out.copy_(result)


def outer(a: Tensor, b: Tensor, out: Tensor) -> None:
    """aᵀ · b into `out`, the gradient of a weight: (R, M), (R, N) → (M, N)."""
    dtype = product_dtype(out)
    (M, N), R = out.shape, a.shape[0]
    a, b = a.to(dtype), b.to(dtype)
    if dtype == out.dtype:
        for part in _parts(M, _part_rows(out, R <= FEW_ROWS_OUTER)):
            torch.mm(a[:, part].t(), b, out=out[part])
        return
    block = _block(M, N, R, out)
    for part in _parts(M, block.shape[0]):
        out[part] = torch.mm(a[:, part].t(), b, out=block[: part.stop - part.start])


def _mm(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)


def _part_rows(weight: Tensor, few: bool) -> int:
    """How many rows of a weight to multiply at once, all of them or `PART_ROWS`."""
    split = few and weight.dtype == torch.float32 and weight.device.type == "cpu" and _cpu_is_avx2()
    return PART_ROWS if split else weight.shape[0]


def _block(length: int, width: int, rows: int, like: Tensor) -> Tensor:
    """A float32 block for a part of a weight of `length` by `width`.

    Every block packs the `rows` of the other operand anew: where these are many, larger blocks are quicker.
    """
    height = max(32, BLOCK_BYTES * torch.get_num_threads() // (4 * max(width, 1)), rows // 2)
    return cpu_memory.empty((min(length, height), width), like.new_empty(0, dtype=torch.float32))


def _parts(length: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, length)) for i in range(0, length, max(step, 1))]
