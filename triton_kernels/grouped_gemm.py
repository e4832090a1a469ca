"""Grouped GEMM: every expert's rows times that expert's matrix, one launch, epilogue in float32.

forward    out = act(A · B_e + bias_e)                 A's rows may be gathered from the tokens in the load
gradient   out = (A · B_e) ⊙ act'(saved)               saved: the ReLU's output, or gelu's and silu's pre-activation

Gated experts have two such products, of the gate g and of what it opens for, u; B's columns are g's, then u's:

forward    out = act(g) ⊙ u                            a tile holds the same columns of both: half of it g, half u
gradient   out = (d ⊙ u ⊙ act'(g), d ⊙ act(g))         d = A · B_e, saved: g and u; out has their columns
"""

import triton
import triton.language as tl
from torch import Tensor

from .activations import GATED, activate, activation_gradient
from .ahead import Ahead, bring, expert_weights, is_brought_in_loops, part_of
from .boxes import operand_boxes, refused
from .configs import by_boxes, gemm_config
from .dependent_launch import wait_for_previous_launch
from .launch import Launch, dot_precision, target_arch
from .segments import block_of, ceil_div, existing, expert_segment, max_tiles, tile_segment
from .tiles import TileConfig


@triton.jit(do_not_specialize=["rows", "a_rows", "num_experts"])
def grouped_gemm_kernel(
    a_ptr,  # (rows, K), gathered (T, K); or boxes of it
    b_ptr,  # (X, K, N), any strides; or boxes of it
    bias_ptr,  # (X, N) or None
    out_ptr,  # (rows, N); gated (rows, N / 2), its gradient (rows, 2·N)
    pre_ptr,  # (rows, N): pre-activation, written forward; `saved`, read for the gradient (gated: 2·N); or None
    sums_ptr,  # (tiles of rows, 1, width of out) float32: sums of out over each tile's rows; or None
    order_ptr,  # (rows,) int32, choice t·TOP_K + k of each row, or None
    offs_ptr,  # (X,) int32
    ahead_ptr,  # (X, …): brought into the L2 by the programs of an expert's first rows; or None
    rows,
    a_rows,
    num_experts,
    N,
    K,
    ahead_size,  # the bytes of an expert that are brought, or None
    ahead_stride,  # the bytes from expert to expert, or None
    stride_am,
    stride_ak,
    stride_bx,
    stride_bk,
    stride_bn,
    TOP_K: tl.constexpr,
    GATHER: tl.constexpr,
    ZERO_TAIL: tl.constexpr,  # write zeros to the rows past the last offset
    ACTIVATION: tl.constexpr,
    GRADIENT: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    BOXES: tl.constexpr,  # how b lies where both are descriptors: "XNK", "XKN"; or None
    EVEN_N: tl.constexpr,  # tiles divide N
    EVEN_K: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    AHEAD_LINES: tl.constexpr,  # that a program brings in a step of k
):
    wait_for_previous_launch()
    # GROUP_M tiles of rows go through all columns together: an expert's weights stay in L2 while they do.
    pid = tl.program_id(0)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_m = tl.num_programs(0) // tiles_n
    group = pid // (GROUP_M * tiles_n)
    group_size = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    tile_m = group * GROUP_M + within % group_size
    tile_n = within // group_size

    expert, first, end = tile_segment(tile_m, offs_ptr, num_experts, rows, BLOCK_M, ZERO_TAIL, BLOCK_X)
    if expert > num_experts:
        return
    m = first + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if expert == num_experts:
        if ZERO_TAIL:
            zeros, mask = tl.zeros([BLOCK_M, BLOCK_N], tl.float32), tile_mask(m, n, end, N, EVEN_N)
            epilogue(zeros, None, mask, m, n, expert, tile_m, N, None, pre_ptr, None, out_ptr, None, False)
        return

    IN_PIECES: tl.constexpr = GATED or ACTIVATION == "gelu" or ACTIVATION == "silu"
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if BOXES is not None:
        acc = product_of_boxes(a_ptr, b_ptr, acc, first, expert, tile_n * BLOCK_N, K, BOXES, BLOCK_K)
    else:
        # A row past the end repeats the last one: what it computes is not stored, and A's loads need no row mask.
        row = tl.minimum(m, end - 1)
        if GATHER:
            row = existing(tl.load(order_ptr + row) // TOP_K, a_rows - 1)
        k = tl.arange(0, BLOCK_K)
        a_ptrs = a_ptr + row.to(tl.int64)[:, None] * stride_am + k[None, :] * stride_ak
        b_ptrs = b_ptr + expert.to(tl.int64) * stride_bx
        if GATED and not GRADIENT:  # the same columns of gate and up
            in_half = tl.arange(0, BLOCK_N) % (BLOCK_N // 2) + tile_n * (BLOCK_N // 2)
            column = tl.where(tl.arange(0, BLOCK_N) < BLOCK_N // 2, in_half, in_half + N // 2)
            b_ptrs += k.to(tl.int64)[:, None] * stride_bk + column.to(tl.int64)[None, :] * stride_bn
            n_mask = (in_half < N // 2)[None, :]
        else:
            b_ptrs += k.to(tl.int64)[:, None] * stride_bk + n.to(tl.int64)[None, :] * stride_bn
            n_mask = (n < N)[None, :]

        if ahead_ptr is not None:  # each column of tiles brings a part, some lines with each step of its own loads
            ahead_ptr = expert_weights(ahead_ptr, expert, ahead_stride)
            ahead_at, ahead_end = part_of(ahead_size, tile_n, tiles_n)
            first_of_expert, _ = expert_segment(expert, offs_ptr, rows)
            ahead_end = tl.where(first == first_of_expert, ahead_end, ahead_at)

        # Around this loop Triton 3.6 puts code that sets accumulators, if the epilogue loads what was saved, and ptxas
        # then lets each wgmma wait for the one before. So such a loop is entered: of K 0 masks make zeros.
        end_k = tl.maximum(K, 1) if IN_PIECES and GRADIENT else K
        for k0 in range(0, end_k, BLOCK_K):
            if EVEN_K:
                a = tl.load(a_ptrs)
                b = tl.load(b_ptrs) if EVEN_N else tl.load(b_ptrs, mask=n_mask, other=0.0)
            else:
                a = tl.load(a_ptrs, mask=(k < K - k0)[None, :], other=0.0)
                b = tl.load(b_ptrs, mask=(k < K - k0)[:, None] & n_mask, other=0.0)
            if ahead_ptr is not None:
                bring(ahead_ptr, ahead_at, ahead_end, AHEAD_LINES)
                ahead_at += AHEAD_LINES * 128
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
            a_ptrs += BLOCK_K * stride_ak
            b_ptrs += BLOCK_K * stride_bk

    # `saved` is on its way while accumulators change their layout. A wide tile takes its epilogue in two halves.
    if GATED:
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        if GRADIENT:
            n0 = tile_n * BLOCK_N
            gated_gradient(left, m, n0, end, tile_m, N, pre_ptr, sums_ptr, out_ptr, ACTIVATION, EVEN_N)
            n0 += BLOCK_N // 2
            gated_gradient(right, m, n0, end, tile_m, N, pre_ptr, sums_ptr, out_ptr, ACTIVATION, EVEN_N)
        else:
            n0 = tile_n * (BLOCK_N // 2)
            gated_forward(left, right, m, n0, end, expert, N // 2, bias_ptr, pre_ptr, out_ptr, ACTIVATION, EVEN_N)
    elif IN_PIECES:
        n0 = tile_n * BLOCK_N
        epilogue_in_pieces(
            acc, m, n0, end, expert, tile_m, N, bias_ptr, pre_ptr, sums_ptr, out_ptr, ACTIVATION, GRADIENT, EVEN_N
        )
    elif BLOCK_N <= 128:
        mask = tile_mask(m, n, end, N, EVEN_N)
        saved = load_saved(pre_ptr, mask, m, n, N, GRADIENT)
        epilogue(acc, saved, mask, m, n, expert, tile_m, N, bias_ptr, pre_ptr, sums_ptr, out_ptr, ACTIVATION, GRADIENT)
    else:
        HALF: tl.constexpr = BLOCK_N // 2
        n0 = tile_n * BLOCK_N + tl.arange(0, HALF)
        n1 = n0 + HALF
        mask0, mask1 = tile_mask(m, n0, end, N, EVEN_N), tile_mask(m, n1, end, N, EVEN_N)
        s0 = load_saved(pre_ptr, mask0, m, n0, N, GRADIENT)
        s1 = load_saved(pre_ptr, mask1, m, n1, N, GRADIENT)
        left, right = acc.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
        epilogue(left, s0, mask0, m, n0, expert, tile_m, N, bias_ptr, pre_ptr, sums_ptr, out_ptr, ACTIVATION, GRADIENT)
        epilogue(right, s1, mask1, m, n1, expert, tile_m, N, bias_ptr, pre_ptr, sums_ptr, out_ptr, ACTIVATION, GRADIENT)


@triton.jit
def product_of_boxes(a, b, acc, row, expert, column, K, LIES: tl.constexpr, BLOCK_K: tl.constexpr):
    """acc + A's rows from `row` on times B_e's columns from `column` on. Rows of the next expert may be among them."""
    BLOCK_N: tl.constexpr = acc.shape[1]
    for k in range(0, K, BLOCK_K):
        rows = a.load([row, k])  # both at once: then one barrier tells that both have come
        if LIES == "XNK":
            columns = b.load([expert, column, k]).reshape(BLOCK_N, BLOCK_K).T
        else:
            columns = b.load([expert, k, column]).reshape(BLOCK_K, BLOCK_N)
        acc = tl.dot(rows, columns, acc)
    return acc


@triton.jit
def tile_mask(m, n, end, N, EVEN_N: tl.constexpr):
    """Which of (m, n) are the tile's own: all columns where tiles divide them, as masks for columns take registers."""
    return (m < end)[:, None] if EVEN_N else (m < end)[:, None] & (n < N)[None, :]


@triton.jit
def load_saved(pre_ptr, mask, m, n, N, GRADIENT: tl.constexpr):
    saved = None
    if GRADIENT:
        saved = tl.load(pre_ptr + m.to(tl.int64)[:, None] * N + n[None, :], mask=mask, other=0.0)
    return saved


@triton.jit
def epilogue(
    acc, saved, mask, m, n, expert, tile_m, N, bias_ptr, pre_ptr, sums_ptr, out_ptr,
    ACTIVATION: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Bias and activation, or the activation's derivative; what `mask` shows is stored, and summed over rows."""
    offset = m.to(tl.int64)[:, None] * N + n[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + expert.to(tl.int64) * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if GRADIENT:
        acc = activation_gradient(acc, saved.to(tl.float32), ACTIVATION)
    else:
        if pre_ptr is not None:
            tl.store(pre_ptr + offset, acc, mask=mask)
        acc = activate(acc, ACTIVATION)
    tl.store(out_ptr + offset, acc, mask=mask)
    if sums_ptr is not None:
        sums = tl.sum(tl.where(mask, acc, 0.0), 0)
        tl.store(sums_ptr + tile_m.to(tl.int64) * N + n, sums, mask=n < N)


@triton.jit
def epilogue_in_pieces(
    acc, m, n0, end, expert, tile_m, N, bias_ptr, pre_ptr, sums_ptr, out_ptr,
    ACTIVATION: tl.constexpr, GRADIENT: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """Of 64 columns at a time, from n0 on, or 32: for more these activations take more registers than there are."""
    ROWS: tl.constexpr = acc.shape[0]
    COLUMNS: tl.constexpr = acc.shape[1]
    WIDEST: tl.constexpr = 32 if GRADIENT and ACTIVATION == "gelu" else 64
    if COLUMNS > WIDEST:
        left, right = halves(acc, ROWS, COLUMNS)
        epilogue_in_pieces(
            left, m, n0, end, expert, tile_m, N, bias_ptr, pre_ptr, sums_ptr, out_ptr, ACTIVATION, GRADIENT, EVEN_N
        )
        n0 += COLUMNS // 2
        epilogue_in_pieces(
            right, m, n0, end, expert, tile_m, N, bias_ptr, pre_ptr, sums_ptr, out_ptr, ACTIVATION, GRADIENT, EVEN_N
        )
        return
    n = n0 + tl.arange(0, COLUMNS)
    mask = tile_mask(m, n, end, N, EVEN_N)
    saved = load_saved(pre_ptr, mask, m, n, N, GRADIENT)
    if GRADIENT:
        tl.debug_barrier()  # out may be pre, and a thread may load what another one stores
    epilogue(acc, saved, mask, m, n, expert, tile_m, N, bias_ptr, pre_ptr, sums_ptr, out_ptr, ACTIVATION, GRADIENT)


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tile.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()


@triton.jit
def gated_forward(
    gate, up, m, n0, end, expert, H, bias_ptr, pre_ptr, out_ptr, ACTIVATION: tl.constexpr, EVEN_N: tl.constexpr
):
    """Columns of the H of `out` from n0 on: biases, both pre-activations stored, act(gate) ⊙ up stored."""
    ROWS: tl.constexpr = gate.shape[0]
    COLUMNS: tl.constexpr = gate.shape[1]
    if COLUMNS > 64:  # more at once takes more registers than there are
        g0, g1 = halves(gate, ROWS, COLUMNS)
        u0, u1 = halves(up, ROWS, COLUMNS)
        gated_forward(g0, u0, m, n0, end, expert, H, bias_ptr, pre_ptr, out_ptr, ACTIVATION, EVEN_N)
        n0 += COLUMNS // 2
        gated_forward(g1, u1, m, n0, end, expert, H, bias_ptr, pre_ptr, out_ptr, ACTIVATION, EVEN_N)
        return
    n = n0 + tl.arange(0, COLUMNS)
    mask, row = tile_mask(m, n, end, H, EVEN_N), m.to(tl.int64)[:, None]
    if bias_ptr is not None:
        bias = bias_ptr + expert.to(tl.int64) * (2 * H) + n
        gate += tl.load(bias, mask=n < H, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias + H, mask=n < H, other=0.0).to(tl.float32)[None, :]
    tl.store(pre_ptr + row * (2 * H) + n[None, :], gate, mask=mask)
    tl.store(pre_ptr + row * (2 * H) + (n + H)[None, :], up, mask=mask)
    tl.store(out_ptr + row * H + n[None, :], activate(gate, ACTIVATION) * up, mask=mask)


@triton.jit
def gated_gradient(
    grad, m, n0, end, tile_m, H, pre_ptr, sums_ptr, out_ptr, ACTIVATION: tl.constexpr, EVEN_N: tl.constexpr
):
    """Columns n0 and H + n0 of `out` and on, the gradients of gate and up, from that of act(gate) ⊙ up."""
    ROWS: tl.constexpr = grad.shape[0]
    COLUMNS: tl.constexpr = grad.shape[1]
    if COLUMNS > 64:
        left, right = halves(grad, ROWS, COLUMNS)
        gated_gradient(left, m, n0, end, tile_m, H, pre_ptr, sums_ptr, out_ptr, ACTIVATION, EVEN_N)
        n0 += COLUMNS // 2
        gated_gradient(right, m, n0, end, tile_m, H, pre_ptr, sums_ptr, out_ptr, ACTIVATION, EVEN_N)
        return
    n = n0 + tl.arange(0, COLUMNS)
    mask = tile_mask(m, n, end, H, EVEN_N)
    offset = m.to(tl.int64)[:, None] * (2 * H) + n[None, :]
    gate = tl.load(pre_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(pre_ptr + offset + H, mask=mask, other=0.0).to(tl.float32)
    tl.debug_barrier()  # out may be pre, and a thread may load what another one stores
    dgate, dup = activation_gradient(grad * up, gate, ACTIVATION), grad * activate(gate, ACTIVATION)
    tl.store(out_ptr + offset, dgate, mask=mask)
    tl.store(out_ptr + offset + H, dup, mask=mask)
    if sums_ptr is not None:
        sums = sums_ptr + tile_m.to(tl.int64) * (2 * H) + n
        tl.store(sums, tl.sum(tl.where(mask, dgate, 0.0), 0), mask=n < H)
        tl.store(sums + H, tl.sum(tl.where(mask, dup, 0.0), 0), mask=n < H)


def grouped_gemm(
    a: Tensor,
    b: Tensor,
    offs: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    pre: Tensor | None = None,
    sums: Tensor | None = None,
    gradient: bool = False,
    gather: bool = False,
    order: Tensor | None = None,
    top_k: int = 1,
    zero_tail: bool = False,
    ahead: Ahead | None = None,
    config: TileConfig | None = None,
    by_tma: bool | None = None,
) -> Launch:
    """One launch of out = epilogue(A · B_e). A gated `activation` splits B's columns in two, or out's for the gradient.

    Args:
        a: (rows, K); with `gather`, (T, K), read through `order`.
        b: (X, K, N), any strides.
        offs: (X,) int32 cumulative ends.
        out: (rows, N), contiguous; gated (rows, N / 2), its gradient (rows, 2·N).
        pre: (rows, N): where the pre-activation goes; with `gradient`, the saved tensor act' is taken from, of out's
            shape.
        sums: (tiles, 1, width of out) float32: where the sums of out over each tile's rows go, tiles of
            `gemm_tile_rows` rows.
        ahead: brought into the L2 meanwhile, of experts that have rows; with `gather` alone.
        by_tma: whether operands come as boxes, if TMA can read them; None: those of large products, where it is right.
    """
    rows, (X, K, N) = out.shape[0], b.shape
    through_gate = None if activation is None else GATED.get(activation)
    cfg = config or _config(out, X, N, K)
    tiles_m, tiles_n = max_tiles(rows, X + zero_tail, cfg.block_m), ceil_div(N, cfg.block_n)
    if not is_brought_in_loops(target_arch()):
        ahead = None
    operands, boxes = (a, b), None
    if not gather and (through_gate is None or gradient):
        if by_tma is None:
            by_tma = by_boxes(target_arch(), a.dtype, cfg, rows * N * K) and (a.dtype, a.device) not in refused
        if by_tma:
            operands, boxes = operand_boxes(a, b, cfg)
    sizes = rows, a.shape[0], X, N, K, *(ahead.numbers if ahead else (None, None))
    return Launch(
        grouped_gemm_kernel,
        (tiles_m * tiles_n,),
        (*operands, bias, out, pre, sums, order, offs, ahead and ahead.weights, *sizes, *a.stride(), *b.stride()),
        {
            "TOP_K": top_k,
            "GATHER": gather,
            "ZERO_TAIL": zero_tail,
            "ACTIVATION": through_gate or activation,
            "GRADIENT": gradient,
            "GATED": through_gate is not None,
            "PRECISION": dot_precision(a.dtype),
            "BOXES": boxes,
            "EVEN_N": N % cfg.block_n == 0,
            "EVEN_K": K % cfg.block_k == 0 and K > 0,
            "BLOCK_X": block_of(X + 1),
            "BLOCK_M": cfg.block_m,
            "BLOCK_N": cfg.block_n,
            "BLOCK_K": cfg.block_k,
            "GROUP_M": cfg.group_m,
            "AHEAD_LINES": ahead.lines_a_step(tiles_n, ceil_div(K, cfg.block_k), 32 * cfg.num_warps) if ahead else 0,
        },
        cfg.num_warps,
        cfg.num_stages,
        cfg.max_registers,
    )


def gemm_tile_rows(out: Tensor, num_experts: int, n: int, k: int) -> int:
    """Rows of the tiles in which `grouped_gemm` computes `out` from n columns of B, summing over k."""
    return _config(out, num_experts, n, k).block_m


def _config(out: Tensor, num_experts: int, n: int, k: int) -> TileConfig:
    return gemm_config(target_arch(), out.dtype, dot_precision(out.dtype), out.shape[0], num_experts, n, k)


def keeps_pre(activation: str | None) -> bool:
    """Whether act' needs the pre-activation; the ReLU's own output tells its derivative."""
    return activation in ("gelu", "silu", *GATED)
