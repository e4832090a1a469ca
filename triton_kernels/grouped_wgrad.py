"""Weight gradients of a grouped GEMM: dB_e = Σ over the expert's rows of a_rᵀ · b_r.

One program owns one tile of one expert's gradient and walks all of that expert's rows, so an expert without rows gets
zeros, and nothing is summed across programs: the result is the same from run to run.
"""

import triton
import triton.language as tl
from torch import Tensor

from .configs import wgrad_config
from .dependent_launch import wait_for_previous_launch
from .launch import Launch, dot_precision, target_arch
from .segments import ceil_div, existing, expert_segment
from .tiles import TileConfig


@triton.jit(do_not_specialize=["rows", "b_rows"])
def grouped_wgrad_kernel(
    a_ptr,  # (rows, M), any strides
    b_ptr,  # (rows, N), any strides; gathered: (T, N)
    out_ptr,  # (X, M, N)
    order_ptr,  # (rows,) int32 or None
    offs_ptr,  # (X,) int32
    rows,
    b_rows,
    M,
    N,
    stride_ar,
    stride_am,
    stride_br,
    stride_bn,
    TOP_K: tl.constexpr,
    GATHER: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,  # M and N are multiples of the tile: no masks for columns, which take registers
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    wait_for_previous_launch()
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    expert = tl.program_id(0) // (tiles_m * tiles_n)
    pid = tl.program_id(0) % (tiles_m * tiles_n)
    group = pid // (GROUP_M * tiles_n)
    group_size = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    tile_m = group * GROUP_M + within % group_size
    tile_n = within // group_size

    begin, end = expert_segment(expert, offs_ptr, rows)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    a_cols = a_ptr + m.to(tl.int64) * stride_am
    b_cols = b_ptr + n.to(tl.int64)[None, :] * stride_bn

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    r = begin + tl.arange(0, BLOCK_R)
    b_row = source_row(r, end, b_rows, order_ptr, TOP_K, GATHER)
    r_mask = r < end
    for _ in range(begin, end, BLOCK_R):
        a_mask = r_mask[None, :] if EVEN else r_mask[None, :] & (m < M)[:, None]
        b_mask = r_mask[:, None] if EVEN else r_mask[:, None] & (n < N)[None, :]
        a = tl.load(a_cols[:, None] + r.to(tl.int64)[None, :] * stride_ar, mask=a_mask, other=0.0)
        b = tl.load(b_cols + b_row.to(tl.int64)[:, None] * stride_br, mask=b_mask, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        r += BLOCK_R
        # One block ahead: were what a copy waits for loaded where it starts, copies would be pipelined half as deep.
        b_row = source_row(r, end, b_rows, order_ptr, TOP_K, GATHER)
        r_mask = r < end

    out_offset = (expert.to(tl.int64) * M + m[:, None]) * N + n[None, :]
    tl.store(out_ptr + out_offset, acc, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def source_row(r, end, b_rows, order_ptr, TOP_K: tl.constexpr, GATHER: tl.constexpr):
    """The row of b that stands for row r: itself, or the token it is a choice of."""
    if GATHER:
        r = existing(tl.load(order_ptr + r, mask=r < end, other=0) // TOP_K, b_rows - 1)
    return r


def grouped_wgrad(
    a: Tensor,
    b: Tensor,
    offs: Tensor,
    out: Tensor,
    *,
    gather: bool = False,
    order: Tensor | None = None,
    top_k: int = 1,
    config: TileConfig | None = None,
) -> Launch:
    """One launch of out[e] = Σ_r a[r]ᵀ · b[r] over the rows of expert e; zeros for an expert without rows.

    Args:
        a: (rows, M), any strides.  b: (rows, N), any strides; with `gather`, (T, N), read through `order`.
        offs: (X,) int32 cumulative ends.
        out: (X, M, N), contiguous.
    """
    X, M, N = out.shape
    cfg = config or wgrad_config(target_arch(), a.dtype, dot_precision(a.dtype), a.shape[0], X, M, N)
    return Launch(
        grouped_wgrad_kernel,
        (X * ceil_div(M, cfg.block_m) * ceil_div(N, cfg.block_n),),
        (a, b, out, order, offs, a.shape[0], b.shape[0], M, N, *a.stride(), *b.stride()),
        {
            "TOP_K": top_k,
            "GATHER": gather,
            "PRECISION": dot_precision(a.dtype),
            "EVEN": M % cfg.block_m == 0 and N % cfg.block_n == 0,
            "BLOCK_M": cfg.block_m,
            "BLOCK_N": cfg.block_n,
            "BLOCK_R": cfg.block_k,
            "GROUP_M": cfg.group_m,
        },
        cfg.num_warps,
        cfg.num_stages,
        cfg.max_registers,
    )
