"""Combine: LayerNorm of each of a token's K rows, gate weight, sum over K; and its backward.

    y_t = Σ_k w_tk · (γ_e · (z_r − mean_r) · rstd_r + β_e)          r: the row of choice (t, k), e: its expert

Statistics are exact and two-pass, in float32, on the row held in registers. Backward walks rows in expert order, so the
sums for dγ and dβ stay in registers, one partial a tile, reduced in a fixed order by a second launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import combine_rows, row_warps
from .launch import Launch
from .segments import block_of, ceil_div, max_tiles, tile_segment, tiles_per_expert


@triton.jit(do_not_specialize=["eps"])
def combine_fwd_kernel(
    z_ptr,  # (rows, O)
    weights_ptr,  # (T, TOP_K) float32, or None: plain sum
    experts_ptr,  # (T, TOP_K) int32; unread without LayerNorm, and may be None
    inverse_ptr,  # (T, TOP_K) int32: the row of each choice, -1 for none
    gamma_ptr,  # (X, O) or None: no LayerNorm
    beta_ptr,  # (X, O) or None
    y_ptr,  # (T, O)
    mean_ptr,  # (rows,) float32 or None
    rstd_ptr,  # (rows,) float32 or None
    O,
    eps,
    TOP_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    token = tl.program_id(0)
    o = tl.arange(0, BLOCK_O)
    o_mask = o < O
    y = tl.zeros([BLOCK_O], tl.float32)
    for k in range(TOP_K):
        choice = token.to(tl.int64) * TOP_K + k
        row = tl.load(inverse_ptr + choice)
        if row >= 0:
            z = tl.load(z_ptr + row.to(tl.int64) * O + o, mask=o_mask, other=0.0).to(tl.float32)
            if gamma_ptr is not None:
                mean = tl.sum(z, 0) / O
                centred = tl.where(o_mask, z - mean, 0.0)
                rstd = tl.rsqrt(tl.sum(centred * centred, 0) / O + eps)
                tl.store(mean_ptr + row, mean)
                tl.store(rstd_ptr + row, rstd)
                expert = tl.load(experts_ptr + choice)
                gamma = tl.load(gamma_ptr + expert.to(tl.int64) * O + o, mask=o_mask, other=0.0).to(tl.float32)
                beta = tl.load(beta_ptr + expert.to(tl.int64) * O + o, mask=o_mask, other=0.0).to(tl.float32)
                z = centred * rstd * gamma + beta
            if weights_ptr is not None:
                z = z * tl.load(weights_ptr + choice)
            y += z
    tl.store(y_ptr + token.to(tl.int64) * O + o, y, mask=o_mask)


@triton.jit
def add_three(a0, a1, a2, b0, b1, b2):
    """Three sums in one reduction, and one wait of the program's warps for each other."""
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit(do_not_specialize=["choices", "choices_per_program", "num_experts"])
def combine_bwd_kernel(
    dy_ptr,  # (T, O)
    z_ptr,  # (rows, O)
    weights_ptr,  # (T, TOP_K) float32
    experts_ptr,  # (T, TOP_K) int32
    order_ptr,  # (rows,) int32
    offs_ptr,  # (X,) int32
    gamma_ptr,  # (X, O) or None: no LayerNorm
    beta_ptr,  # (X, O) or None
    mean_ptr,  # (rows,) float32 or None
    rstd_ptr,  # (rows,) float32 or None
    dz_ptr,  # (rows, O)
    dweights_ptr,  # (T, TOP_K) float32 or None
    partials_ptr,  # (tiles, 2, O) float32: dγ, dβ; or None
    choices,
    choices_per_program,
    num_experts,
    O,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,  # rows in flight
):
    tile = tl.program_id(0)
    if dweights_ptr is not None:  # choices that no row stands for
        first_choice = tile.to(tl.int64) * choices_per_program
        last_choice = tl.minimum(first_choice + choices_per_program, choices)
        for c0 in range(first_choice, last_choice, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            expert_of = tl.load(experts_ptr + c, mask=c < last_choice, other=0)
            skipped = (expert_of < 0) | (expert_of >= num_experts)
            tl.store(dweights_ptr + c, tl.zeros([BLOCK_C], tl.float32), mask=(c < last_choice) & skipped)

    expert, first, end = tile_segment(tile, offs_ptr, num_experts, 0, ROWS, BLOCK_X)
    if expert >= num_experts:
        return
    o = tl.arange(0, BLOCK_O)
    o_mask = o < O
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr + expert.to(tl.int64) * O + o, mask=o_mask, other=0.0).to(tl.float32)
        beta = tl.load(beta_ptr + expert.to(tl.int64) * O + o, mask=o_mask, other=0.0).to(tl.float32)
    dgamma = tl.zeros([BLOCK_O], tl.float32)
    dbeta = tl.zeros([BLOCK_O], tl.float32)
    choice = tl.load(order_ptr + first)
    rows = tl.minimum(end - first, ROWS)
    for i in tl.range(rows, num_stages=STAGES):
        row = first + i
        own_choice = choice
        choice = tl.load(order_ptr + row + 1, mask=i + 1 < rows, other=0)  # a row ahead: dy's address waits for it
        weight = tl.load(weights_ptr + own_choice)
        z_offset = row.to(tl.int64) * O + o
        dy_offset = (own_choice // TOP_K).to(tl.int64) * O + o
        dy = tl.load(dy_ptr + dy_offset, mask=o_mask, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + z_offset, mask=o_mask, other=0.0).to(tl.float32)
        if gamma_ptr is not None:
            rstd = tl.load(rstd_ptr + row)
            normed = tl.where(o_mask, (z - tl.load(mean_ptr + row)) * rstd, 0.0)
            dnormed = dy * gamma
            sum_d, sum_dn, shift = tl.reduce((dnormed, dnormed * normed, dy * beta), 0, add_three)
            dweight = sum_dn + shift
            dz = weight * rstd * (dnormed - sum_d / O - normed * (sum_dn / O))
            dgamma += weight * dy * normed
            dbeta += weight * dy
        else:
            dweight = tl.sum(dy * z, 0)
            dz = weight * dy
        if dweights_ptr is not None:
            tl.store(dweights_ptr + own_choice, dweight)
        tl.store(dz_ptr + z_offset, dz, mask=o_mask)
    if partials_ptr is not None:
        partial = partials_ptr + tile.to(tl.int64) * 2 * O + o
        tl.store(partial, dgamma, mask=o_mask)
        tl.store(partial + O, dbeta, mask=o_mask)


@triton.jit(do_not_specialize=["num_experts"])
def layer_norm_grad_kernel(
    partials_ptr,  # (tiles, 2, O) float32
    offs_ptr,  # (X,) int32
    dgamma_ptr,  # (X, O)
    dbeta_ptr,  # (X, O)
    num_experts,
    O,
    ROWS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    expert = tl.program_id(0)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    _, _, tiles = tiles_per_expert(offs_ptr, num_experts, 0, ROWS, BLOCK_X)
    x = tl.arange(0, BLOCK_X)
    first = tl.sum(tl.where(x < expert, tiles, 0), 0)
    last = tl.sum(tl.where(x <= expert, tiles, 0), 0)
    dgamma = tl.zeros([BLOCK_O], tl.float32)
    dbeta = tl.zeros([BLOCK_O], tl.float32)
    for t0 in range(first, last, BLOCK_TILES):
        t = (t0 + tl.arange(0, BLOCK_TILES))[:, None]
        partial = partials_ptr + t.to(tl.int64) * 2 * O + o[None, :]
        mask = (t < last) & (o < O)[None, :]
        dgamma += tl.sum(tl.load(partial, mask=mask, other=0.0), 0)
        dbeta += tl.sum(tl.load(partial + O, mask=mask, other=0.0), 0)
    tl.store(dgamma_ptr + expert.to(tl.int64) * O + o, dgamma, mask=o < O)
    tl.store(dbeta_ptr + expert.to(tl.int64) * O + o, dbeta, mask=o < O)


def combine_fwd(
    z: Tensor,
    weights: Tensor | None,
    experts: Tensor | None,
    inverse: Tensor,
    y: Tensor,
    *,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    eps: float = 0.0,
) -> Launch:
    """One launch: y (T, O) from z (rows, O), every element written; mean and rstd (rows,) of the rows that are used.

    `weights` None: the plain sum over the rows a token was routed to.
    """
    (T, K), O = inverse.shape, y.shape[1]
    block = block_of(O)
    return Launch(
        combine_fwd_kernel,
        (T,),
        (z, weights, experts, inverse, gamma, beta, y, mean, rstd, O, eps),
        {"TOP_K": K, "BLOCK_O": block},
        row_warps(block),
    )


def combine_tiles(rows: int, num_experts: int) -> int:
    """Programs of `combine_bwd`, that is rows of its partial sums."""
    return max_tiles(rows, num_experts, combine_rows(rows))


def combine_bwd(
    dy: Tensor,
    z: Tensor,
    weights: Tensor,
    experts: Tensor,
    order: Tensor,
    offs: Tensor,
    dz: Tensor,
    *,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    dweights: Tensor | None = None,
    partials: Tensor | None = None,
) -> Launch:
    """One launch: dz (rows, O), dweights (T, K), and the partial sums (tiles, 2, O) of dγ and dβ."""
    (T, O), K, rows, X = dy.shape, weights.shape[1], z.shape[0], offs.shape[0]
    tiles, block = combine_tiles(rows, X), block_of(O)
    return Launch(
        combine_bwd_kernel,
        (tiles,),
        (
            *(dy, z, weights, experts, order, offs, gamma, beta, mean, rstd, dz, dweights, partials),
            *(T * K, ceil_div(T * K, max(tiles, 1)), X, O),
        ),
        {
            "TOP_K": K,
            "ROWS": combine_rows(rows),
            "BLOCK_O": block,
            "BLOCK_X": block_of(X + 1),
            "BLOCK_C": 128,
            "STAGES": 3,
        },
        row_warps(block),
    )


def layer_norm_grad(partials: Tensor, offs: Tensor, dgamma: Tensor, dbeta: Tensor, rows: int) -> Launch:
    """One launch: dγ and dβ (X, O) from the partial sums, in a fixed order; zeros for an expert without rows."""
    X, O = dgamma.shape
    return Launch(
        layer_norm_grad_kernel,
        (X, ceil_div(O, 64)),
        (partials, offs, dgamma, dbeta, X, O),
        {
            "ROWS": combine_rows(rows),
            "BLOCK_TILES": 32,
            "BLOCK_O": 64,
            "BLOCK_X": block_of(X + 1),
        },
        num_warps=4,
    )


def new_partials(z: Tensor, num_experts: int) -> Tensor:
    tiles = combine_tiles(z.shape[0], num_experts)
    return z.new_empty((tiles, 2, z.shape[1]), dtype=torch.float32)
