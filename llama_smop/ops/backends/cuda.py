"""The operators on the CUDA C++ extension `llama_smop._C` (sources and build: csrc/README.md).

Forward, 5 launches: router; schedule; GEMM1 (rows of x gathered, + b1, activation); GEMM2 (+ b2); combine (LayerNorm,
gate weights, sum over K).
Backward: combine_bwd (dz, dweights, partial sums of db2 and the LayerNorm gradients); dh = (dz·W2) ⊙ act' and partial
sums of db1; dW2; dW1 (x gathered); the partial sums added up; with dx also dh·W1 and its sum over K; router backward.
No host synchronisation, no float atomics: gradients are bitwise the same from run to run. A call of shapes that came
before is replayed (cuda_replay.py): its launches are one call into the extension.

bfloat16 and float16 with float32 accumulation; other dtypes are for the Triton backend.
"""

from functools import cache

import torch
from torch import Tensor

from llama_smop.ops.backend import Experts, Saved, Schedule
from llama_smop.ops.backends.cuda_extension import DTYPES, LN_DTYPES, extension, unsupported
from llama_smop.ops.backends.cuda_replay import address as _ptr
from llama_smop.ops.backends.cuda_replay import launches, replayed

__all__ = [
    "expert_projection_bwd",
    "expert_projection_fwd",
    "grouped_mm",
    "replayed",
    "route_bwd",
    "route_fwd",
    "schedule",
    "unsupported",
]

FEW_ROWS = 1024  # up to here reading the weights is most of a product's time, and they are brought into the L2 ahead
ROWS_AN_EXPERT = 4  # on average, and even routing leaves an expert without rows once in 50 times
SMALLEST_L2 = 50 << 20  # of a GPU that is not there: an H100's
CHOSEN = 0, 0  # the columns of a tile and the blocks of a cluster that the extension picks


def _check_sizes(num_experts: int, top_k: int, tokens: int) -> None:
    limit = extension().MAX_EXPERTS
    if not 1 <= num_experts <= limit:
        raise ValueError(f"the CUDA backend takes 1 to {limit} experts, got {num_experts}")
    if not 1 <= top_k <= limit:
        raise ValueError(f"the CUDA backend takes 1 to {limit} choices a token, got {top_k}")
    if tokens * top_k >= 2**31:
        raise ValueError(f"tokens × top_k must stay under 2^31, got {tokens} × {top_k}")


def worth_bringing(weights: Tensor | None, rows: int, least_rows: int = 1) -> Tensor | None:
    """`weights` (X, …) if a launch that reads them for `rows` choices of tokens is to find some in the L2, else None.

    `least_rows`: for a launch that does not know which experts have rows; with fewer many would have none.
    """
    if weights is None or weights.numel() == 0 or not least_rows <= rows <= FEW_ROWS or not weights.is_contiguous():
        return None
    return weights


def _brought(weights: Tensor | None) -> dict[str, int]:
    """The first bytes of each expert, as arguments of the extension."""
    if weights is None:
        return {"ahead": 0, "ahead_bytes": 0, "ahead_stride": 0}
    X = weights.shape[0]
    each = weights.nbytes // X
    size = min(each, _room(weights.device) // X // 128 * 128)
    return {"ahead": _ptr(weights), "ahead_bytes": size, "ahead_stride": each}


@cache
def _room(device: torch.device) -> int:
    """Bytes that are brought: they stay in the L2 beside all else that is read, and DRAM brings no more in the time."""
    of_gpu = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else SMALLEST_L2
    return of_gpu // 3


# ---------------------------------------------------------------------------------------------------------- router


@replayed
def route_fwd(
    x: Tensor,
    gate_weight: Tensor,
    modality: Tensor | None,
    mask: Tensor | None,
    top_k: int,
    num_experts: int,
    shared_experts: int = 0,
    ahead: Tensor | None = None,
) -> tuple[Tensor, ...]:
    T, (R, E, _), K, X, S = x.shape[0], gate_weight.shape, top_k, num_experts, shared_experts
    _check_sizes(X + S, K + S, T)
    ext = extension()
    blocks = ext.route_blocks(T)
    f32, i32 = _like(x, torch.float32), _like(x, torch.int32)
    logits, weights, experts, counts = f32(T, E), f32(T, K), i32(T, K), i32(R, E)
    balance, z_loss = f32(), f32()
    order, inverse, offs = i32(T * (K + S)), i32(T, K + S), i32(X + S)
    shared = (f32(T, K + S), i32(T, K + S)) if S else ()
    all_weights, all_chosen = shared or (None, None)
    block_counts, block_probs, block_z = i32(blocks, R, E), f32(blocks, R, E), f32(blocks, R)
    # Of experts that each have a modality half may not be needed.
    ahead = worth_bringing(ahead if X == E else None, T * K, least_rows=ROWS_AN_EXPERT * X)
    with launches(x) as stream:
        ext.route_fwd(
            **_route_sizes(ext, x, gate_weight, K), experts=X, shared=S,
            x=_ptr(x), gate_weight=_ptr(gate_weight), modality=_ptr(modality), mask=_ptr(mask),
            logits=_ptr(logits), weights=_ptr(weights), chosen=_ptr(experts),
            all_weights=_ptr(all_weights), all_chosen=_ptr(all_chosen), counts=_ptr(counts),
            balance_loss=_ptr(balance), z_loss=_ptr(z_loss), order=_ptr(order), inverse=_ptr(inverse), offs=_ptr(offs),
            block_counts=_ptr(block_counts), block_probs=_ptr(block_probs), block_z=_ptr(block_z), **_brought(ahead),
            stream=stream,
        )  # fmt: skip
    return logits, weights, experts, counts, balance, z_loss, order, inverse, offs, *shared


@replayed
def route_bwd(
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
    need_dx: bool,
) -> tuple[Tensor | None, Tensor]:
    (T, D), (R, E, _), K = x.shape, gate_weight.shape, weights.shape[1]
    ext = extension()
    total = torch.empty_like(logits)
    partial = logits.new_empty(ext.gate_splits(T), R, E, D)
    dgate = torch.empty_like(gate_weight)
    dx = torch.empty_like(x) if need_dx else None
    with launches(x) as stream:
        ext.route_bwd(
            **_route_sizes(ext, x, gate_weight, K),
            x=_ptr(x), gate_weight=_ptr(gate_weight), modality=_ptr(modality), mask=_ptr(mask),
            logits=_ptr(logits), weights=_ptr(weights), chosen=_ptr(experts), counts=_ptr(counts),
            dlogits=_ptr(dlogits), dweights=_ptr(dweights),
            dweights_columns=K if dweights is None else dweights.shape[1], dbalance=_ptr(dbalance), dz=_ptr(dz),
            dlogits_total=_ptr(total), dgate_partial=_ptr(partial), dgate=_ptr(dgate), dx=_ptr(dx), stream=stream,
        )  # fmt: skip
    return dx, dgate


def schedule(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    T, K = experts.shape
    _check_sizes(num_experts, K, T)
    ext = extension()
    i32 = _like(experts, torch.int32)
    order, inverse, offs = i32(T * K), i32(T, K), i32(num_experts)
    block_counts = i32(ext.route_blocks(T), num_experts)
    with launches(experts) as stream:
        ext.schedule(
            tokens=T, experts=num_experts, top_k=K, chosen=_ptr(experts), order=_ptr(order), inverse=_ptr(inverse),
            offs=_ptr(offs), block_counts=_ptr(block_counts), stream=stream,
        )  # fmt: skip
    return order, inverse, offs


def _route_sizes(ext, x: Tensor, gate_weight: Tensor, top_k: int) -> dict:
    (T, D), (R, E, _) = x.shape, gate_weight.shape
    dtype = ext.DTYPES[DTYPES[x.dtype]]
    return {"dtype": dtype, "tokens": T, "dim": D, "routers": R, "gates": E, "top_k": top_k}


def _like(tensor: Tensor, dtype: torch.dtype):
    """Makes tensors of that dtype on that device. Sizes one by one: told a tuple, PyTorch takes half as long again."""
    return lambda *sizes: tensor.new_empty(*sizes or ((),), dtype=dtype)


# ------------------------------------------------------------------------------------------------ matrix products


def gemm(
    stream, a, b, offs, rows, *,
    order=None, top_k=1, bias=None, aux=None, epilogue="identity", pre=None, sums=None, out=None, ahead=None,
    cut=CHOSEN, first=False,
) -> Tensor:  # fmt: skip
    """epilogue(a[row(r)] · b[e] + bias[e]) for every row r of expert e; b is (X, K, N) with a unit stride along K or N.

    With `order`, row r of the product takes row order[r] // top_k of `a`, and `ahead` (X, …) is brought into the L2
    meanwhile, of experts that have rows. `sums` takes partial column sums of the result. `cut`: columns of a tile and
    blocks of a cluster of the sm_90a kernels. `first`: the first launch of an operator, which waits for all before it;
    others may be queued up early.
    """
    ext = extension()
    X, K, N = b.shape
    k_major = b.stride(1) == 1 or K == 1
    out = a.new_empty(rows, N) if out is None else out
    ext.grouped_gemm(
        dtype=ext.DTYPES[DTYPES[a.dtype]], a=_ptr(a), lda=a.stride(0), a_rows=a.shape[0],
        b=_ptr(b), ldb=b.stride(2) if k_major else b.stride(1), stride_b=b.stride(0), b_k_major=k_major,
        offs=_ptr(offs), order=_ptr(order), top_k=top_k, rows=rows, experts=X, n=N, k=K, bias=_ptr(bias),
        aux=_ptr(aux), pre=_ptr(pre), out=_ptr(out), epilogue=ext.EPILOGUES[epilogue], sums=_ptr(sums),
        **_brought(ahead), columns=cut[0], cluster=cut[1], dependent=not first, stream=stream,
    )  # fmt: skip
    return out


def wgrad(stream, a, b, offs, *, order=None, top_k=1, cut=CHOSEN, first=False) -> Tensor:
    """Σ_r a[r]ᵀ · b[row(r)] over the rows of each expert, (X, m, n); the columns of a and b have unit strides."""
    ext = extension()
    X, m, n = offs.shape[0], a.shape[1], b.shape[1]
    out = a.new_empty(X, m, n)
    ext.grouped_wgrad(
        dtype=ext.DTYPES[DTYPES[a.dtype]], a=_ptr(a), lda=a.stride(0), a_rows=a.shape[0],
        b=_ptr(b), ldb=b.stride(0), b_rows=b.shape[0], offs=_ptr(offs), order=_ptr(order), top_k=top_k, experts=X,
        m=m, n=n, out=_ptr(out), columns=cut[0], cluster=cut[1], dependent=not first, stream=stream,
    )  # fmt: skip
    return out


def grouped_mm(
    a: Tensor, b: Tensor, offs: Tensor, bias: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor]:
    G = offs.shape[0]
    if max(a.shape) >= 2**31:
        raise ValueError(f"a's sizes must stay under 2^31, got {tuple(a.shape)}")
    if b.dim() == 2:
        # The kernel takes both operands with the summed rows outermost; anything else is copied.
        with launches(a) as stream:
            return wgrad(stream, _unit_columns(a.t()), _unit_columns(b), offs, first=True), a.new_empty(0)
    rows, N = a.shape[0], b.shape[2]
    pre = a.new_empty((rows, N) if activation in ("gelu", "silu") else (0,))
    if G == 0:
        return a.new_zeros(rows, N), torch.zeros_like(pre)
    ext = extension()
    dtype = ext.DTYPES[DTYPES[a.dtype]]
    with launches(a) as stream:
        out = gemm(stream, a, b, offs, rows, bias=bias, epilogue=activation or "identity", pre=pre, first=True)
        for t in (out, pre):
            if t.numel():
                ext.zero_tail(
                    dtype=dtype, out=_ptr(t), rows=rows, n=N, offs=_ptr(offs), experts=G, dependent=True, stream=stream
                )
    return out, pre


def _unit_columns(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


# ------------------------------------------------------------------------------------------------ expert projection


@replayed
def expert_projection_fwd(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    schedule: Schedule,
    parameters: Experts,
    activation: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (order, inverse, offs), (w1, b1, w2, b2, ln_weight, ln_bias) = schedule, parameters
    (T, K), O = weights.shape, w2.shape[1]
    _check_projection(T, K, parameters)
    y = x.new_empty(T, O)
    mean = weights.new_empty(T * K if ln_weight is not None else 0)
    rstd = torch.empty_like(mean)
    ext = extension()
    ahead = worth_bringing(w2, T * K)
    with launches(x) as stream:
        h, pre = _hidden(stream, x, order, offs, K, w1, b1, activation, ahead)
        z = gemm(stream, h, w2.transpose(1, 2), offs, T * K, bias=b2)
        ext.combine_fwd(
            **_combine_sizes(ext, x, weights, w2, ln_weight), z=_ptr(z), weights=_ptr(weights), chosen=_ptr(experts),
            inverse=_ptr(inverse), ln_weight=_ptr(ln_weight), ln_bias=_ptr(ln_bias), eps=eps, y=_ptr(y),
            mean=_ptr(mean), rstd=_ptr(rstd), dependent=True, stream=stream,
        )  # fmt: skip
    return y, h, pre, z, mean, rstd


@replayed
def expert_projection_bwd(
    dy: Tensor,
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    schedule: Schedule,
    parameters: Experts,
    saved: Saved,
    activation: str,
    eps: float,
    need_dx: bool,
    need_dweights: bool,
    need_dparams: bool,
) -> tuple[Tensor | None, ...]:
    (order, inverse, offs), (w1, b1, w2, b2, ln_weight, ln_bias) = schedule, parameters
    h, pre, z, mean, rstd = saved
    (T, K), (X, O, _), D = weights.shape, w2.shape, x.shape[1]
    _check_projection(T, K, parameters)
    rows = T * K
    ext = extension()
    ln_grads = need_dparams and ln_weight is not None
    dweights = torch.empty_like(weights) if need_dweights else None
    combine_sums = hidden_sums = dx = dw1 = db1 = dw2 = db2 = dln_weight = dln_bias = None
    if ln_grads or (need_dparams and b2 is not None):
        combine_sums = weights.new_empty(ext.sizes.combine_sums(rows, X, O, ln_weight is not None))
    if need_dparams and b1 is not None:
        hidden_sums = weights.new_empty(ext.sizes.column_sums(rows, X, w1.shape[1]))
    sizes = _combine_sizes(ext, x, weights, w2, ln_weight)
    ahead = worth_bringing(w2 if need_dx or need_dparams else None, rows)  # dh's product reads it
    with launches(x) as stream:
        # What is computed again belongs to this call: dz is written over z, and dh over h once dW2 has read it.
        own_h, own_z = h.numel() == 0, z.numel() == 0
        if own_h:
            h, pre = _hidden(stream, x, order, offs, K, w1, b1, activation, ahead)
        if own_z:
            z = gemm(stream, h, w2.transpose(1, 2), offs, rows, bias=b2, first=True)
        dz = z if own_z else torch.empty_like(z)
        ext.combine_bwd(
            **sizes, dy=_ptr(dy), z=_ptr(z), weights=_ptr(weights), order=_ptr(order), inverse=_ptr(inverse),
            offs=_ptr(offs), ln_weight=_ptr(ln_weight), ln_bias=_ptr(ln_bias), mean=_ptr(mean), rstd=_ptr(rstd),
            dz=_ptr(dz), dweights=_ptr(dweights), sums=_ptr(combine_sums), **_brought(ahead), dependent=False,
            stream=stream,
        )  # fmt: skip
        if need_dparams and own_h:
            dw2 = wgrad(stream, dz, h, offs)
        if need_dx or need_dparams:
            aux = h if activation == "relu" else pre
            over, kind = aux if own_h else None, f"{activation}_grad"
            dh = gemm(stream, dz, w2, offs, rows, aux=aux, epilogue=kind, sums=hidden_sums, out=over)
        if need_dparams and not own_h:
            dw2 = wgrad(stream, dz, h, offs)
        if need_dparams:
            dw1 = wgrad(stream, dh, x, offs, order=order, top_k=K)
            db1, db2 = (None if b is None else torch.empty_like(b) for b in (b1, b2))
            dln_weight, dln_bias = (torch.empty_like(p) if ln_grads else None for p in (ln_weight, ln_bias))
            ext.bias_sums(
                dtype=sizes["dtype"], ln_dtype=sizes["ln_dtype"], experts=X, hidden=w1.shape[1], dim=O, rows=rows,
                offs=_ptr(offs), hidden_sums=_ptr(hidden_sums), combine_sums=_ptr(combine_sums), db1=_ptr(db1),
                db2=_ptr(db2), dln_weight=_ptr(dln_weight), dln_bias=_ptr(dln_bias), dependent=True, stream=stream,
            )  # fmt: skip
        if need_dx:
            dx_rows, dx = gemm(stream, dh, w1, offs, rows), torch.empty_like(x)
            ext.gather_sum(
                dtype=ext.DTYPES[DTYPES[x.dtype]], tokens=T, top_k=K, dim=D, rows=_ptr(dx_rows), inverse=_ptr(inverse),
                dx=_ptr(dx), dependent=True, stream=stream,
            )  # fmt: skip
    return dx, dweights, dw1, db1, dw2, db2, dln_weight, dln_bias


def _hidden(stream, x, order, offs, top_k: int, w1, b1, activation: str, ahead) -> tuple[Tensor, Tensor]:
    """h and, for activations whose derivative needs it, the pre-activation (else empty); rows in expert order."""
    rows, H = order.shape[0], w1.shape[1]
    pre = x.new_empty((0,) if activation == "relu" else (rows, H))
    h = gemm(
        stream, x, w1.transpose(1, 2), offs, rows,
        order=order, top_k=top_k, bias=b1, epilogue=activation, pre=pre, ahead=ahead,
        first=True,
    )  # fmt: skip
    return h, pre


def _check_projection(tokens: int, top_k: int, parameters: Experts) -> None:
    w1, *_, ln_weight, ln_bias = parameters
    _check_sizes(w1.shape[0], top_k, tokens)
    if ln_weight is not None and not (ln_weight.dtype == ln_bias.dtype in (w1.dtype, torch.float32)):
        raise TypeError(
            f"ln_weight and ln_bias must both be {w1.dtype} or both float32 for the CUDA backend, "
            f"got {ln_weight.dtype} and {ln_bias.dtype}"
        )


def _combine_sizes(ext, x: Tensor, weights: Tensor, w2: Tensor, ln_weight: Tensor | None) -> dict:
    (T, K), (X, O, _) = weights.shape, w2.shape
    dtype = ext.DTYPES[DTYPES[x.dtype]]
    ln_dtype = dtype if ln_weight is None else ext.DTYPES[LN_DTYPES[ln_weight.dtype]]
    return {"dtype": dtype, "ln_dtype": ln_dtype, "tokens": T, "top_k": K, "experts": X, "dim": O}
