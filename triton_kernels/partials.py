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


@triton.jit(do_not_specialize=["rows", "num_experts", "z_tile_rows", "dh_tile_rows"])
def sum_partials_kernel(
    z_sums_ptr,  # (tiles, 3, O) float32: dγ, dβ, db2
    dh_sums_ptr,  # (tiles, 1, H) float32: db1
    dgamma_ptr,  # (X, O) or None
    dbeta_ptr,  # (X, O) or None
    db2_ptr,  # (X, O) or None
    db1_ptr,  # (X, H) or None
    offs_ptr,  # (X,) int32
    rows,
    num_experts,
    O,
    H,
    z_tile_rows,
    dh_tile_rows,
    BLOCK_TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    wait_for_previous_launch()
    expert = tl.program_id(0)
    which = tl.program_id(2)
    if which < 3:
        sums_ptr, stride, width, tile_rows = z_sums_ptr + which * O, 3 * O, O, z_tile_rows
    else:
        sums_ptr, stride, width, tile_rows = dh_sums_ptr, H, H, dh_tile_rows
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    _, _, tiles = tiles_per_expert(offs_ptr, num_experts, rows, tile_rows, False, BLOCK_X)
    x = tl.arange(0, BLOCK_X)
    first = tl.sum(tl.where(x < expert, tiles, 0), 0)
    last = first + tl.sum(tl.where(x == expert, tiles, 0), 0)
    # A caller's `offs` that falls counts rows twice: no more than `max_tiles` tiles are there.
    last = tl.minimum(last, tl.minimum(rows, (rows + num_experts * (tile_rows - 1)) // tile_rows))

    total = tl.zeros([BLOCK], tl.float32)
    for t0 in range(first, last, BLOCK_TILES):
        t = (t0 + tl.arange(0, BLOCK_TILES))[:, None]
        mask = (t < last) & (c < width)[None, :]
        total += tl.sum(tl.load(sums_ptr + t.to(tl.int64) * stride + c[None, :], mask=mask, other=0.0), 0)
    offset, inside = expert.to(tl.int64) * width + c, c < width
    if dgamma_ptr is not None:
        tl.store(dgamma_ptr + offset, total, mask=inside & (which == 0))
    if dbeta_ptr is not None:
        tl.store(dbeta_ptr + offset, total, mask=inside & (which == 1))
    if db2_ptr is not None:
        tl.store(db2_ptr + offset, total, mask=inside & (which == 2))
    if db1_ptr is not None:
        tl.store(db1_ptr + offset, total, mask=inside & (which == 3))


def sum_partials(
    offs: Tensor,
    rows: int,
    z_sums: Partials | None,
    dh_sums: Partials | None,
    dgamma: Tensor | None,
    dbeta: Tensor | None,
    db2: Tensor | None,
    db1: Tensor | None,
) -> Launch:
    """One launch: dγ, dβ and db2 (X, O) and db1 (X, H), those that are given; zeros for an expert without rows."""
    X = offs.shape[0]
    z, dh = z_sums or dh_sums, dh_sums or z_sums
    assert z is not None and dh is not None, "one of the sums is given"
    O, H = 0 if z_sums is None else z.sums.shape[2], 0 if dh_sums is None else dh.sums.shape[2]  # of 0: not read
    return Launch(
        sum_partials_kernel,
        (X, ceil_div(max(O, H), BLOCK_COLUMNS), 4),
        (z.sums, dh.sums, dgamma, dbeta, db2, db1, offs, rows, X, O, H, z.tile_rows, dh.tile_rows),
        {"BLOCK_TILES": BLOCK_TILES, "BLOCK": BLOCK_COLUMNS, "BLOCK_X": block_of(X + 1)},
        num_warps=4,
    )
