"""The schedule: where each choice of an expert goes when the T·K choices are brought into expert order.

A stable counting sort without atomics: blocks of choices have been counted (by the router, or here for a caller's own
routing), so each program knows where the experts' rows begin for its choices, and places them in order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import schedule_items
from .dependent_launch import wait_for_previous_launch
from .launch import Launch
from .segments import block_of, ceil_div


@triton.jit
def count_choices(
    hist_ptr, blocks, before_block, NUM_EXPERTS: tl.constexpr, SHARED: tl.constexpr, TOP_K: tl.constexpr,
    FOLD: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """→ choices of each expert in all, and in the blocks before `before_block`: two (BLOCK_X,) int32.

    The histogram is of the routed choices; every token that is routed goes through each shared expert once.
    """
    x = tl.arange(0, BLOCK_X)
    total = tl.zeros([BLOCK_X], tl.int32)
    before = tl.zeros([BLOCK_X], tl.int32)
    for b0 in range(0, blocks, BLOCK_B):
        b = (b0 + tl.arange(0, BLOCK_B))[:, None]
        for fold in tl.static_range(FOLD):  # routers that share their experts: one column a router
            column = fold * NUM_EXPERTS + x[None, :]
            mask = (b < blocks) & (x < NUM_EXPERTS)[None, :]
            h = tl.load(hist_ptr + b * (FOLD * NUM_EXPERTS) + column, mask=mask, other=0)
            total += tl.sum(h, 0)
            before += tl.sum(tl.where(b < before_block, h, 0), 0)
    if SHARED > 0:
        is_shared = (x >= NUM_EXPERTS) & (x < NUM_EXPERTS + SHARED)
        total = tl.where(is_shared, tl.sum(total, 0) // TOP_K, total)
        before = tl.where(is_shared, tl.sum(before, 0) // TOP_K, before)
    return total, before


@triton.jit
def write_losses(
    hist_ptr, stats_ptr, counts_ptr, balance_ptr, z_ptr, blocks, E: tl.constexpr, ROUTERS: tl.constexpr,
    TOP_K: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """counts by router and expert, and both auxiliary losses: each a mean over the routers that have tokens."""
    C: tl.constexpr = ROUTERS * E
    s = tl.arange(0, BLOCK_S)
    counts = tl.zeros([BLOCK_S], tl.int32)
    stats = tl.zeros([BLOCK_S], tl.float32)
    for b0 in range(0, blocks, BLOCK_B):
        b = (b0 + tl.arange(0, BLOCK_B))[:, None]
        counts += tl.sum(tl.load(hist_ptr + b * C + s[None, :], mask=(b < blocks) & (s < C)[None, :], other=0), 0)
        stats_mask = (b < blocks) & (s < C + ROUTERS)[None, :]
        stats += tl.sum(tl.load(stats_ptr + b * (C + ROUTERS) + s[None, :], mask=stats_mask, other=0.0), 0)
    tl.store(counts_ptr + s, counts, mask=s < C)

    f = counts.to(tl.float32)
    balance = 0.0
    z = 0.0
    active = 0.0
    for r in tl.static_range(ROUTERS):
        mine = (s // E == r) & (s < C)
        n = tl.sum(tl.where(mine, f, 0.0), 0) / TOP_K
        share = tl.maximum(n, 1.0)
        balance += E * tl.sum(tl.where(mine, (f / share) * (stats / share), 0.0), 0)
        z += tl.sum(tl.where(s == C + r, stats, 0.0), 0) / share
        active += tl.where(n > 0.0, 1.0, 0.0)
    active = tl.maximum(active, 1.0)
    tl.store(balance_ptr, balance / active)
    tl.store(z_ptr, z / active)


@triton.jit(do_not_specialize=["items", "blocks", "blocks_per_program"])
def schedule_kernel(
    experts_ptr,  # (items,) int32, the T·(TOP_K + SHARED) choices
    hist_ptr,  # (blocks, FOLD · NUM_EXPERTS) int32, of the routed choices
    stats_ptr,  # (blocks, C + R) float32, or None without losses
    order_ptr,  # (items,) int32
    inverse_ptr,  # (items,) int32
    offs_ptr,  # (NUM_EXPERTS + SHARED,) int32
    counts_ptr,  # (C,) int32 or None
    balance_ptr,  # () float32 or None
    z_ptr,  # () float32 or None
    items,
    blocks,
    blocks_per_program,
    ITEMS_PER_BLOCK: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    SHARED: tl.constexpr,
    E: tl.constexpr,
    ROUTERS: tl.constexpr,
    TOP_K: tl.constexpr,
    FOLD: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    wait_for_previous_launch()
    x = tl.arange(0, BLOCK_X)
    program = tl.program_id(0) - 1
    first_block = program * blocks_per_program
    total, before = count_choices(
        hist_ptr, blocks, first_block, NUM_EXPERTS, SHARED, TOP_K, FOLD, BLOCK_B, BLOCK_X
    )  # fmt: skip
    ends = tl.cumsum(total, 0)
    if program < 0:  # the first program sums up, the others place
        tl.store(offs_ptr + x, ends, mask=x < NUM_EXPERTS + SHARED)
        if stats_ptr is not None:
            write_losses(
                hist_ptr, stats_ptr, counts_ptr, balance_ptr, z_ptr, blocks, E, ROUTERS, TOP_K, BLOCK_B, BLOCK_S
            )
    else:
        next_row = ends - total + before
        first = first_block * ITEMS_PER_BLOCK
        last = tl.minimum(first + blocks_per_program * ITEMS_PER_BLOCK, items)
        for i0 in range(first, last, BLOCK_N):
            i = i0 + tl.arange(0, BLOCK_N)
            expert = tl.load(experts_ptr + i, mask=i < last, other=-1)
            chosen = ((expert[:, None] == x[None, :]) & (x < NUM_EXPERTS + SHARED)[None, :]).to(tl.int32)
            rank = tl.cumsum(chosen, 0)
            row = tl.sum(chosen * (next_row[None, :] + rank), 1) - 1  # −1 where no expert was chosen
            tl.store(inverse_ptr + i, row, mask=i < last)
            tl.store(order_ptr + row, i, mask=row >= 0)
            next_row += tl.sum(chosen, 0)


@triton.jit(do_not_specialize=["items"])
def histogram_kernel(
    experts_ptr,  # (items,) int32
    hist_ptr,  # (blocks, X) int32
    items,
    ITEMS_PER_BLOCK: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    wait_for_previous_launch()
    x = tl.arange(0, BLOCK_X)
    first = tl.program_id(0) * ITEMS_PER_BLOCK
    last = tl.minimum(first + ITEMS_PER_BLOCK, items)
    count = tl.zeros([BLOCK_X], tl.int32)
    for i0 in range(first, last, BLOCK_N):
        i = i0 + tl.arange(0, BLOCK_N)
        expert = tl.load(experts_ptr + i, mask=i < last, other=-1)
        count += tl.sum((expert[:, None] == x[None, :]).to(tl.int32), 0)
    tl.store(hist_ptr + tl.program_id(0) * NUM_EXPERTS + x, count, mask=x < NUM_EXPERTS)


def histogram_blocks(items: int) -> int:
    return max(1, ceil_div(items, schedule_items()))


def histogram(experts: Tensor, hist: Tensor) -> Launch:
    """One launch: choices of each expert by block of `schedule_items()` choices, hist (blocks, X)."""
    blocks, X = hist.shape
    return Launch(
        histogram_kernel,
        (blocks,),
        (experts, hist, experts.numel()),
        {"ITEMS_PER_BLOCK": schedule_items(), "NUM_EXPERTS": X, "BLOCK_N": _choices_at_once(X), "BLOCK_X": _block_x(X)},
        num_warps=4,
    )


def schedule(
    experts: Tensor,
    hist: Tensor,
    items_per_block: int,
    num_experts: int,
    order: Tensor,
    inverse: Tensor,
    offs: Tensor,
    *,
    stats: Tensor | None = None,
    counts: Tensor | None = None,
    balance: Tensor | None = None,
    z: Tensor | None = None,
) -> Launch:
    """One launch: order, inverse and offs of the choices `experts`; with the router's stats, the losses too.

    Experts past `num_experts` up to the length of `offs` are shared: the last choices of every token that is routed,
    which `hist` does not count.
    """
    items, blocks, total = experts.numel(), hist.shape[0], offs.shape[0]
    R, E = (1, num_experts) if counts is None else counts.shape
    per_program = ceil_div(schedule_items(), items_per_block)
    return Launch(
        schedule_kernel,
        (1 + ceil_div(blocks, per_program),),
        (experts, hist, stats, order, inverse, offs, counts, balance, z, items, blocks, per_program),
        {
            "ITEMS_PER_BLOCK": items_per_block,
            "NUM_EXPERTS": num_experts,
            "SHARED": total - num_experts,
            "E": E,
            "ROUTERS": R,
            "TOP_K": experts.shape[1] - (total - num_experts),
            "FOLD": hist.shape[1] // num_experts,
            "BLOCK_B": _choices_at_once(total),
            "BLOCK_N": _choices_at_once(total),
            "BLOCK_X": _block_x(total),
            "BLOCK_S": block_of(R * E + R, least=4),
        },
        num_warps=4,
    )


def new_order(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for (order, inverse, offs)."""
    integer: dict[str, Any] = {"dtype": torch.int32, "device": experts.device}
    return (
        torch.empty(experts.numel(), **integer),
        torch.empty(experts.shape, **integer),
        torch.empty(num_experts, **integer),
    )


def _choices_at_once(num_experts: int) -> int:
    """Rows of a (choices, experts) block: few elements a thread, as every step waits for its sums and scans."""
    return max(32, min(256, 2048 // _block_x(num_experts)))


def _block_x(num_experts: int) -> int:
    return block_of(num_experts, least=4)
