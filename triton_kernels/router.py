"""The router: gate product, softmax, top-K, and the sums over blocks of tokens that schedule and losses are made of.

R routers of E experts make C = R·E columns, column r·E + e. A token's softmax and top-K see the columns of its own
modality's router alone, so two modalities cost one launch and no sort.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ahead import Ahead, bring_piece, program_ahead
from .configs import ROUTER_TOKENS, router_bwd_config, router_config, router_splits
from .dependent_launch import wait_for_previous_launch
from .launch import Launch
from .segments import block_of, ceil_div

LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def token_columns(t, tokens, c, modality_ptr, mask_ptr, E: tl.constexpr, C: tl.constexpr):
    """→ each token's router, whether it is real, and which columns (tokens, columns) are its router's."""
    real = t < tokens
    router = tl.zeros_like(t)
    if modality_ptr is not None:
        router = tl.load(modality_ptr + t, mask=real, other=0)
    if mask_ptr is not None:
        real = tl.load(mask_ptr + t, mask=real, other=0).to(tl.int1)
    own = (c[None, :] // E == router[:, None]) & (c < C)[None, :]
    return router, real, own


@triton.jit
def softmax(logits, own):
    """→ (probabilities, log-sum-exp) over a token's own columns."""
    top = tl.max(tl.where(own, logits, float("-inf")), 1)
    exp = tl.where(own, tl.exp(logits - top[:, None]), 0.0)
    total = tl.sum(exp, 1)
    return exp / total[:, None], top + tl.log(total)


@triton.jit(do_not_specialize=["tokens"])
def router_fwd_kernel(
    x_ptr,  # (T, D)
    gate_ptr,  # (C, D)
    modality_ptr,  # (T,) int32 or None
    mask_ptr,  # (T,) bool, True = real, or None
    logits_ptr,  # (T, E) float32
    weights_ptr,  # (T, TOP_K) float32
    experts_ptr,  # (T, TOP_K) int32
    hist_ptr,  # (blocks, C) int32: choices of each column in the block
    stats_ptr,  # (blocks, C + R) float32: Σ p by column, then Σ logsumexp² by router
    all_weights_ptr,  # (T, TOP_K + SHARED) float32, or None without shared experts
    all_experts_ptr,  # (T, TOP_K + SHARED) int32, or None
    ahead_ptr,  # (X + SHARED, …): brought into the L2 by the last programs; or None
    tokens,
    D,
    ahead_size,  # the bytes of an expert that are brought, or None
    ahead_stride,  # the bytes from expert to expert, or None
    E: tl.constexpr,
    ROUTERS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_TOPK: tl.constexpr,
):
    wait_for_previous_launch()
    C: tl.constexpr = ROUTERS * E
    block = tl.program_id(0)
    if ahead_ptr is not None:
        number = program_ahead(ahead_size, NUM_EXPERTS + SHARED)
        if number >= 0:
            bring_piece(ahead_ptr, ahead_size, ahead_stride, number, None, None)
            return
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_C)
    d = tl.arange(0, BLOCK_D)
    router, real, own = token_columns(t, tokens, c, modality_ptr, mask_ptr, E, C)

    logits = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    x_ptrs = x_ptr + t.to(tl.int64)[:, None] * D + d[None, :]
    gate_ptrs = gate_ptr + c[None, :] * D + d[:, None]
    for d0 in range(0, D, BLOCK_D):
        d_mask = d < D - d0
        x = tl.load(x_ptrs + d0, mask=real[:, None] & d_mask[None, :], other=0.0)
        gate = tl.load(gate_ptrs + d0, mask=(c < C)[None, :] & d_mask[:, None], other=0.0)
        logits = tl.dot(x, gate, logits, input_precision=PRECISION)

    in_range = (t < tokens)[:, None] & own
    column_in_router = c[None, :] - router[:, None] * E
    tl.store(logits_ptr + t.to(tl.int64)[:, None] * E + column_in_router, logits, mask=in_range)
    p, lse = softmax(logits, own)

    # Top-K by repeated maximum; ties go to the lower column. A NaN counts as the lowest, so ids are always in range.
    rest = tl.where(own, tl.where(logits > LOWEST, logits, LOWEST), float("-inf"))
    k = tl.arange(0, BLOCK_TOPK)
    weights = tl.zeros([BLOCK_T, BLOCK_TOPK], tl.float32)
    experts = tl.zeros([BLOCK_T, BLOCK_TOPK], tl.int32)
    for choice in range(TOP_K):
        best = tl.max(rest, 1)
        column = tl.min(tl.where(rest == best[:, None], c[None, :], BLOCK_C), 1)
        chosen = c[None, :] == column[:, None]
        rest = tl.where(chosen, float("-inf"), rest)
        mine = (k == choice)[None, :]
        weights = tl.where(mine, tl.sum(tl.where(chosen, p, 0.0), 1)[:, None], weights)
        experts = tl.where(mine, column[:, None], experts)
    weights = tl.where(real[:, None], weights / tl.sum(weights, 1)[:, None], 0.0)
    if NUM_EXPERTS == E:
        experts = experts - router[:, None] * E
    experts = tl.where(real[:, None], experts, NUM_EXPERTS)
    offset = t.to(tl.int64)[:, None] * TOP_K + k[None, :]
    k_mask = (t < tokens)[:, None] & (k < TOP_K)[None, :]
    tl.store(weights_ptr + offset, weights, mask=k_mask)
    tl.store(experts_ptr + offset, experts, mask=k_mask)
    if all_experts_ptr is not None:  # every real token goes through the shared experts too, with weight 1
        is_shared = (k >= TOP_K)[None, :]
        all_weights = tl.where(is_shared, real[:, None].to(tl.float32), weights)
        all_experts = tl.where(is_shared, NUM_EXPERTS + k[None, :] - TOP_K, experts)
        all_experts = tl.where(real[:, None], all_experts, NUM_EXPERTS + SHARED)
        offset = t.to(tl.int64)[:, None] * (TOP_K + SHARED) + k[None, :]
        k_mask = (t < tokens)[:, None] & (k < TOP_K + SHARED)[None, :]
        tl.store(all_weights_ptr + offset, all_weights, mask=k_mask)
        tl.store(all_experts_ptr + offset, all_experts, mask=k_mask)

    counted = own & real[:, None]
    hist = tl.sum((counted & (rest == float("-inf"))).to(tl.int32), 0)
    tl.store(hist_ptr + block * C + c, hist, mask=c < C)
    stats_row = stats_ptr + block * (C + ROUTERS)
    tl.store(stats_row + c, tl.sum(tl.where(counted, p, 0.0), 0), mask=c < C)
    for r in tl.static_range(ROUTERS):
        tl.store(stats_row + C + r, tl.sum(tl.where(real & (router == r), lse * lse, 0.0), 0))


@triton.jit(do_not_specialize=["tokens", "tokens_per_split"])
def router_bwd_kernel(
    x_ptr,  # (T, D)
    gate_ptr,  # (C, D)
    modality_ptr,  # (T,) int32 or None
    mask_ptr,  # (T,) bool or None
    logits_ptr,  # (T, E) float32
    weights_ptr,  # (T, TOP_K) float32
    experts_ptr,  # (T, TOP_K) int32
    counts_ptr,  # (C,) int32
    dlogits_ptr,  # (T, E) float32 or None
    dweights_ptr,  # (T, DWEIGHTS) float32, of which the first TOP_K columns are read, or None
    dbalance_ptr,  # () float32 or None
    dz_ptr,  # () float32 or None
    dx_ptr,  # (T, D) or None
    partials_ptr,  # (splits, C, D) float32; for one split (C, D) in the gate's dtype
    tokens,
    tokens_per_split,
    D,
    E: tl.constexpr,
    ROUTERS: tl.constexpr,
    TOP_K: tl.constexpr,
    DWEIGHTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_TOPK: tl.constexpr,
):
    wait_for_previous_launch()
    C: tl.constexpr = ROUTERS * E
    split = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    d_mask = (d < D)[None, :]
    k = tl.arange(0, BLOCK_TOPK)

    # n: real tokens of the column's router; active: routers that have any.
    counts = tl.load(counts_ptr + c, mask=c < C, other=0).to(tl.float32)
    n = tl.zeros([BLOCK_C], tl.float32)
    active = 0.0
    for r in tl.static_range(ROUTERS):
        mine = c // E == r
        n_r = tl.sum(tl.where(mine, counts, 0.0), 0) / TOP_K
        n = tl.where(mine, n_r, n)
        active += tl.where(n_r > 0.0, 1.0, 0.0)
    n = tl.maximum(n, 1.0)
    active = tl.maximum(active, 1.0)

    gate = tl.load(gate_ptr + c[:, None] * D + d[None, :], mask=(c < C)[:, None] & d_mask, other=0.0).to(tl.float32)
    dgate = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    end = tl.minimum((split + 1) * tokens_per_split, tokens)
    for t0 in range(split * tokens_per_split, end, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        router, real, own = token_columns(t, end, c, modality_ptr, mask_ptr, E, C)
        own = own & real[:, None]
        logit_offset = t.to(tl.int64)[:, None] * E + c[None, :] - router[:, None] * E
        grad = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        if dlogits_ptr is not None:
            grad += tl.load(dlogits_ptr + logit_offset, mask=own, other=0.0)
        if dweights_ptr is not None:
            # The renormalised top-K weights are a softmax over the chosen logits alone.
            offset = t.to(tl.int64)[:, None] * TOP_K + k[None, :]
            k_mask = real[:, None] & (k < TOP_K)[None, :]
            w = tl.load(weights_ptr + offset, mask=k_mask, other=0.0)
            dw_offset = t.to(tl.int64)[:, None] * DWEIGHTS + k[None, :]
            dw = tl.load(dweights_ptr + dw_offset, mask=k_mask, other=0.0)
            inner = tl.sum(w * dw, 1)
            for choice in range(TOP_K):
                item = t.to(tl.int64) * TOP_K + choice
                column = router * E + tl.load(experts_ptr + item, mask=real, other=0) % E
                w_k = tl.load(weights_ptr + item, mask=real, other=0.0)
                dw_k = tl.load(dweights_ptr + t.to(tl.int64) * DWEIGHTS + choice, mask=real, other=0.0)
                grad += tl.where(c[None, :] == column[:, None], (w_k * (dw_k - inner))[:, None], 0.0)
        if dbalance_ptr is not None or dz_ptr is not None:
            p, lse = softmax(tl.load(logits_ptr + logit_offset, mask=own, other=0.0), own)
            p = tl.where(own, p, 0.0)  # a masked token owns no column: its softmax is 0/0
            if dbalance_ptr is not None:
                dp = (tl.load(dbalance_ptr) * E / active * counts / n / n)[None, :]
                grad += p * (dp - tl.sum(p * dp, 1)[:, None])
            if dz_ptr is not None:
                lse = tl.where(real, lse, 0.0)
                grad += p * (tl.load(dz_ptr) * 2.0 / active * lse[:, None] / n[None, :])
        grad = tl.where(own, grad, 0.0)

        x_offset = t.to(tl.int64)[:, None] * D + d[None, :]
        x = tl.load(x_ptr + x_offset, mask=real[:, None] & d_mask, other=0.0).to(tl.float32)
        dgate = tl.dot(tl.trans(grad), x, dgate, input_precision=PRECISION)
        if dx_ptr is not None:
            dx = tl.dot(grad, gate, input_precision=PRECISION)
            tl.store(dx_ptr + x_offset, dx, mask=(t < end)[:, None] & d_mask)

    partial_offset = (split * C + c[:, None]) * D + d[None, :]
    tl.store(partials_ptr + partial_offset, dgate, mask=(c < C)[:, None] & d_mask)


@triton.jit(do_not_specialize=["splits"])
def sum_splits_kernel(
    partials_ptr,  # (splits, size) float32
    out_ptr,  # (size,)
    splits,
    size,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_previous_launch()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for s0 in range(0, splits, BLOCK_S):
        split = (s0 + tl.arange(0, BLOCK_S))[:, None]
        mask = (split < splits) & (i < size)[None, :]
        total += tl.sum(tl.load(partials_ptr + split * size + i[None, :], mask=mask, other=0.0), 0)
    tl.store(out_ptr + i, total, mask=i < size)


def router_blocks(tokens: int) -> int:
    """Blocks of tokens the router works in: the rows of its histogram. At least one, so that it is always written."""
    return max(1, ceil_div(tokens, ROUTER_TOKENS))


def router_fwd(
    x: Tensor,
    gate_weight: Tensor,
    modality: Tensor | None,
    mask: Tensor | None,
    logits: Tensor,
    weights: Tensor,
    experts: Tensor,
    hist: Tensor,
    stats: Tensor,
    num_experts: int,
    all_weights: Tensor | None = None,
    all_experts: Tensor | None = None,
    ahead: Ahead | None = None,
) -> Launch:
    """One launch: logits, weights and experts of every token; hist (blocks, C) and stats (blocks, C + R) by block.

    With S shared experts also all_weights and all_experts (T, K + S): the routed choices, then the shared.
    `ahead`, of all experts, is brought into the L2 meanwhile.

    Float32 gate products are always full float32: a routing must not turn on the low bits of TF32.
    """
    (T, D), (R, E, _), K = x.shape, gate_weight.shape, weights.shape[1]
    shared = 0 if all_experts is None else all_experts.shape[1] - K
    columns = block_of(R * E)
    cfg = router_config(columns, x.element_size())
    return Launch(
        router_fwd_kernel,
        (hist.shape[0] + (ahead.programs if ahead else 0),),
        (
            *(x, gate_weight, modality, mask, logits, weights, experts, hist, stats, all_weights, all_experts),
            *(ahead and ahead.weights, T, D, *(ahead.numbers if ahead else (None, None))),
        ),
        {
            "E": E,
            "ROUTERS": R,
            "NUM_EXPERTS": num_experts,
            "TOP_K": K,
            "SHARED": shared,
            "PRECISION": _precision(x),
            "BLOCK_T": cfg.block_t,
            "BLOCK_D": cfg.block_d,
            "BLOCK_C": columns,
            "BLOCK_TOPK": block_of(K + shared, least=1),
        },
        cfg.num_warps,
        cfg.num_stages,
    )


def router_bwd(
    x: Tensor,
    gate_weight: Tensor,
    modality: Tensor | None,
    mask: Tensor | None,
    logits: Tensor,
    weights: Tensor,
    experts: Tensor,
    counts: Tensor,
    dlogits: Tensor | None,
    dweights: Tensor | None,
    dbalance: Tensor | None,
    dz: Tensor | None,
    dx: Tensor | None,
    partials: Tensor,
) -> Launch:
    """One launch: dlogits of every token from the gradients given, dx, and the gate's gradient by split of tokens.

    dweights may have further columns, of shared experts, whose weight is no choice of the router's.

    Products are float32 (for 16-bit x three TF32 products): the balance loss's gradient would vanish in float16.
    """
    (T, D), (R, E, _), K = x.shape, gate_weight.shape, weights.shape[1]
    columns = block_of(R * E)
    cfg = router_bwd_config(columns)
    return Launch(
        router_bwd_kernel,
        (partials.shape[0], ceil_div(D, cfg.block_d)),
        (
            *(x, gate_weight, modality, mask, logits, weights, experts, counts, dlogits, dweights, dbalance, dz, dx),
            *(partials, T, ceil_div(T, partials.shape[0]), D),
        ),
        {
            "E": E,
            "ROUTERS": R,
            "TOP_K": K,
            "DWEIGHTS": K if dweights is None else dweights.shape[1],
            "PRECISION": _precision(x),
            "BLOCK_T": cfg.block_t,
            "BLOCK_D": cfg.block_d,
            "BLOCK_C": columns,
            "BLOCK_TOPK": block_of(K, least=1),
        },
        cfg.num_warps,
        cfg.num_stages,
    )


def sum_splits(partials: Tensor, out: Tensor) -> Launch:
    """One launch: out = Σ over the first dimension of partials, in a fixed order."""
    size = out.numel()
    return Launch(
        sum_splits_kernel,
        (ceil_div(size, 128),),
        (partials, out, partials.shape[0], size),
        {"BLOCK_S": 32, "BLOCK": 128},
        num_warps=4,
    )


def gate_partials(x: Tensor, dgate: Tensor) -> Tensor:
    """Where the gate's gradient goes by split of tokens: (splits, R·E, D) float32, or `dgate` itself for one split."""
    splits, (R, E, D) = router_splits(x.shape[0]), dgate.shape
    return dgate.view(1, R * E, D) if splits == 1 else x.new_empty((splits, R * E, D), dtype=torch.float32)


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32x3"
