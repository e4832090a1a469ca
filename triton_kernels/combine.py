"""Combine: LayerNorm of each of a token's K rows, gate weight, sum over K; and its backward.

    y_t = Σ_k w_tk · (γ_e · (z_r − mean_r) · rstd_r + β_e)          r: the row of choice (t, k), e: its expert

Statistics are exact and two-pass, in float32, on the row held in registers. Backward walks rows in expert order, so the
sums for dγ, dβ and db2 stay in registers, one partial sum a tile, added up by `partials`.
"""

import triton
import triton.language as tl
from torch import Tensor

from .ahead import Ahead, bring_piece, program_ahead
from .configs import COMBINE_ELEMENTS, combine_bwd_warps, combine_fwd_warps, combine_rows
from .dependent_launch import wait_for_previous_launch
from .launch import Launch
from .segments import block_of, ceil_div, existing, max_tiles, tile_segment


@triton.jit(do_not_specialize=["rows", "num_experts", "eps"])
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
    rows,
    num_experts,
    O,
    eps,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,  # choices at once
    BLOCK_O: tl.constexpr,
):
    wait_for_previous_launch()
    token = tl.program_id(0)
    o = tl.arange(0, BLOCK_O)
    o_mask = o < O
    y = tl.zeros([BLOCK_O], tl.float32)
    for k0 in range(0, TOP_K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        choice = token.to(tl.int64) * TOP_K + k
        row = tl.minimum(tl.load(inverse_ptr + choice, mask=k < TOP_K, other=-1), rows - 1)
        routed = row >= 0
        mask = routed[:, None] & o_mask[None, :]
        z = tl.load(z_ptr + row.to(tl.int64)[:, None] * O + o[None, :], mask=mask, other=0.0).to(tl.float32)
        if gamma_ptr is not None:
            expert = existing(tl.load(experts_ptr + choice, mask=routed, other=0), num_experts - 1)
            parameter = expert.to(tl.int64)[:, None] * O + o[None, :]
            gamma = tl.load(gamma_ptr + parameter, mask=mask, other=0.0)
            beta = tl.load(beta_ptr + parameter, mask=mask, other=0.0)
            mean = tl.sum(z, 1) / O
            centred = tl.where(mask, z - mean[:, None], 0.0)
            rstd = tl.rsqrt(tl.sum(centred * centred, 1) / O + eps)
            tl.store(mean_ptr + row, mean, mask=routed)
            tl.store(rstd_ptr + row, rstd, mask=routed)
            z = centred * rstd[:, None] * gamma.to(tl.float32) + beta.to(tl.float32)
        if weights_ptr is not None:
            z *= tl.load(weights_ptr + choice, mask=routed, other=0.0)[:, None]
        y += tl.sum(z, 0)
    tl.store(y_ptr + token.to(tl.int64) * O + o, y, mask=o_mask)


@triton.jit
def add_three(a0, a1, a2, b0, b1, b2):
    """Three sums in one reduction, and one wait of the program's warps for each other."""
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit(do_not_specialize=["choices", "choices_per_program", "num_experts", "ROWS"])
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
    sums_ptr,  # (tiles, 3, O) float32: dγ, dβ, db2; or None
    ahead_ptr,  # (X, …): brought into the L2 by the last programs, of experts with rows; or None
    choices,
    choices_per_program,
    num_experts,
    O,
    ROWS,  # of a program's tile
    ahead_size,  # the bytes of an expert that are brought, or None
    ahead_stride,  # the bytes from expert to expert, or None
    TOP_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,  # rows in flight
):
    wait_for_previous_launch()
    tile = tl.program_id(0)
    if ahead_ptr is not None:
        number = program_ahead(ahead_size, num_experts)
        if number >= 0:
            bring_piece(ahead_ptr, ahead_size, ahead_stride, number, offs_ptr, choices)
            return
    if dweights_ptr is not None:  # choices that no row stands for
        first_choice = tile.to(tl.int64) * choices_per_program
        last_choice = tl.minimum(first_choice + choices_per_program, choices)
        for c0 in range(first_choice, last_choice, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            expert_of = tl.load(experts_ptr + c, mask=c < last_choice, other=0)
            skipped = (expert_of < 0) | (expert_of >= num_experts)
            tl.store(dweights_ptr + c, tl.zeros([BLOCK_C], tl.float32), mask=(c < last_choice) & skipped)

    expert, first, end = tile_segment(tile, offs_ptr, num_experts, choices, ROWS, False, BLOCK_X)
    if expert >= num_experts:
        return
    o = tl.arange(0, BLOCK_O)
    o_mask = o < O
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr + expert.to(tl.int64) * O + o, mask=o_mask, other=0.0).to(tl.float32)
        beta = tl.load(beta_ptr + expert.to(tl.int64) * O + o, mask=o_mask, other=0.0).to(tl.float32)
    dgamma = tl.zeros([BLOCK_O], tl.float32)
    dbeta = tl.zeros([BLOCK_O], tl.float32)
    db2 = tl.zeros([BLOCK_O], tl.float32)
    choice = tl.load(order_ptr + first)
    rows = tl.minimum(end - first, ROWS)
    for i in tl.range(rows, num_stages=STAGES):
        row = first + i
        own_choice = existing(choice, choices - 1)
        choice = tl.load(order_ptr + row + 1, mask=i + 1 < rows, other=0)  # a row ahead: dy's address waits for it
        weight = tl.load(weights_ptr + own_choice)
        z_offset = row.to(tl.int64) * O + o
        dy_offset = (own_choice // TOP_K).to(tl.int64) * O + o
        dy = tl.load(dy_ptr + dy_offset, mask=o_mask, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + z_offset, mask=o_mask, other=0.0).to(tl.float32)
        if gamma_ptr is not None:
            rstd = tl.load(rstd_ptr + row)
            normed = (z - tl.load(mean_ptr + row)) * rstd  # past O it meets dy = 0 in every sum
            dnormed = dy * gamma
            sum_d, sum_dn, shift = tl.reduce((dnormed, dnormed * normed, dy * beta), 0, add_three)
            dweight = sum_dn + shift
            dz = weight * rstd * (dnormed - sum_d / O - normed * (sum_dn / O))
            dgamma += weight * dy * normed
            dbeta += weight * dy
        else:
            dweight = tl.sum(dy * z, 0)
            dz = weight * dy
        db2 += dz
        if dweights_ptr is not None:
            tl.store(dweights_ptr + own_choice, dweight)
        tl.store(dz_ptr + z_offset, dz, mask=o_mask)
    if sums_ptr is not None:
        sums = sums_ptr + tile.to(tl.int64) * 3 * O + o
        tl.store(sums, dgamma, mask=o_mask)
        tl.store(sums + O, dbeta, mask=o_mask)
        tl.store(sums + 2 * O, db2, mask=o_mask)


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
    X = 0 if gamma is None else gamma.shape[0]
    block = block_of(O)
    at_once = max(1, min(block_of(K, least=1), COMBINE_ELEMENTS // block))
    return Launch(
        combine_fwd_kernel,
        (T,),
        (z, weights, experts, inverse, gamma, beta, y, mean, rstd, z.shape[0], X, O, eps),
        {"TOP_K": K, "BLOCK_K": at_once, "BLOCK_O": block},
        combine_fwd_warps(at_once * block),
    )


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
    sums: Tensor | None = None,
    ahead: Ahead | None = None,
) -> Launch:
    """One launch: dz (rows, O), dweights (T, K), and the sums (tiles, 3, O) of dγ, dβ and db2 by tile of rows.

    Tiles are of `combine_rows` rows. Without LayerNorm the first two sums are zero. `ahead` is brought into the L2
    meanwhile, of experts that have rows.
    """
    O, choices, X = dy.shape[1], weights.numel(), offs.shape[0]
    tile_rows, block = combine_rows(choices), block_of(O)
    tiles = max_tiles(choices, X, tile_rows)
    return Launch(
        combine_bwd_kernel,
        (tiles + (ahead.programs if ahead else 0),),
        (
            *(dy, z, weights, experts, order, offs, gamma, beta, mean, rstd, dz, dweights, sums),
            ahead and ahead.weights,
            *(choices, ceil_div(choices, max(tiles, 1)), X, O, tile_rows),
            *(ahead.numbers if ahead else (None, None)),
        ),
        {"TOP_K": weights.shape[1], "BLOCK_O": block, "BLOCK_X": block_of(X + 1), "BLOCK_C": 128, "STAGES": 3},
        combine_bwd_warps(block),
    )
