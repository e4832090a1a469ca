"""Gradients of biases and of LayerNorm's parameters: sums over each expert's rows, in two stages and a fixed order.

The kernels that hold the rows in registers add them up by tile of rows (combine's backward dγ, dβ and db2, the GEMM of
dh db1); one launch adds each expert's tiles. No atomics: the result is the same from run to run.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dependent_launch import wait_for_previous_launch
from .launch import Launch
from .segments import block_of, ceil_div, max_tiles, tiles_per_expert

BLOCK_TILES, BLOCK_COLUMNS = 32, 64


class Partials(NamedTuple):
    """Sums by tile of rows: what one kernel leaves for `sum_partials`."""

    sums: Tensor  # (tiles, sums, width) float32
    tile_rows: int


def new_partials(rows: Tensor, num_experts: int, tile_rows: int, sums: int) -> Partials:
    """Room for `sums` sums over the columns of `rows` (rows, width), by tiles of `tile_rows` rows."""
    tiles = max_tiles(rows.shape[0], num_experts, tile_rows)
    return Partials(rows.new_empty((tiles, sums, rows.shape[1]), dtype=torch.float32), tile_rows)


@triton.jit(do_not_specialize=["num_experts", "row_tile_rows", "dh_tile_rows"])
def sum_partials_kernel(
    row_sums_ptr,  # (tiles, 3, O) float32: dγ, dβ, db2; or None
    dh_sums_ptr,  # (tiles, 1, H) float32: db1; or None
    dgamma_ptr,  # (X, O) or None
    dbeta_ptr,  # (X, O) or None
    db2_ptr,  # (X, O) or None
    db1_ptr,  # (X, H) or None
    offs_ptr,  # (X,) int32
    num_experts,
    O,
    H,
    row_tile_rows,
    dh_tile_rows,
    BLOCK_TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    wait_for_previous_launch()
    expert = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    which = tl.program_id(2)
    _, _, tiles = tiles_per_expert(offs_ptr, num_experts, 0, row_tile_rows if which < 3 else dh_tile_rows, BLOCK_X)
    x = tl.arange(0, BLOCK_X)
    first = tl.sum(tl.where(x < expert, tiles, 0), 0)
    last = first + tl.sum(tl.where(x == expert, tiles, 0), 0)
    if which == 0:
        sum_tiles(row_sums_ptr, dgamma_ptr, 0, 3, expert, first, last, c, O, BLOCK_TILES, BLOCK)
    elif which == 1:
        sum_tiles(row_sums_ptr, dbeta_ptr, 1, 3, expert, first, last, c, O, BLOCK_TILES, BLOCK)
    elif which == 2:
        sum_tiles(row_sums_ptr, db2_ptr, 2, 3, expert, first, last, c, O, BLOCK_TILES, BLOCK)
    else:
        sum_tiles(dh_sums_ptr, db1_ptr, 0, 1, expert, first, last, c, H, BLOCK_TILES, BLOCK)


@triton.jit
def sum_tiles(
    sums_ptr, out_ptr, at, sums, expert, first, last, c, width, BLOCK_TILES: tl.constexpr, BLOCK: tl.constexpr
):
    """out[expert, c] = Σ sums[t, at, c] over tiles t from first to last."""
    if out_ptr is not None:
        total = tl.zeros([BLOCK], tl.float32)
        for t0 in range(first, last, BLOCK_TILES):
            t = (t0 + tl.arange(0, BLOCK_TILES))[:, None]
            offset = (t.to(tl.int64) * sums + at) * width + c[None, :]
            total += tl.sum(tl.load(sums_ptr + offset, mask=(t < last) & (c < width)[None, :], other=0.0), 0)
        tl.store(out_ptr + expert.to(tl.int64) * width + c, total, mask=c < width)


def sum_partials(
    offs: Tensor,
    row_sums: Partials | None,
    dh_sums: Partials | None,
    dgamma: Tensor | None,
    dbeta: Tensor | None,
    db2: Tensor | None,
    db1: Tensor | None,
) -> Launch:
    """One launch: dγ, dβ and db2 (X, O) and db1 (X, H), those that are given; zeros for an expert without rows."""
    X = offs.shape[0]
    none = Partials(None, 1)
    rows, dh = row_sums or none, dh_sums or none
    O, H = (0 if p.sums is None else p.sums.shape[2] for p in (rows, dh))
    return Launch(
        sum_partials_kernel,
        (X, ceil_div(max(O, H), BLOCK_COLUMNS), 3 if db1 is None else 4),
        (rows.sums, dh.sums, dgamma, dbeta, db2, db1, offs, X, O, H, rows.tile_rows, dh.tile_rows),
        {"BLOCK_TILES": BLOCK_TILES, "BLOCK": BLOCK_COLUMNS, "BLOCK_X": block_of(X + 1)},
        num_warps=4,
    )
