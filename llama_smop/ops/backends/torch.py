"""The operators in plain PyTorch: any device, any float dtype, float64 included. This is what runs on a CPU.

Rows are brought into expert order by a stable sort, so every expert works on one contiguous segment and writes its
weight gradient straight into the stacked tensor. Segment bounds are read on the host, so on a GPU this backend
synchronises; the Triton and CUDA backends do not. Products, LayerNorm and the sum over K accumulate in float32 (float64
for float64 inputs). In forward what lies between them is rounded to x's dtype, gate weights included where they
multiply; in backward only operands of products are, and only where the machine multiplies in that dtype.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_smop.ops.backend import Experts, Saved, Schedule, acc_dtype, with_shared_experts
from llama_smop.ops.backends import cpu_memory
from llama_smop.ops.backends.cpu_products import linear, outer, product_dtype
from llama_smop.ops.checks import GATED

_layer_norm_backward = torch.ops.aten.native_layer_norm_backward


def unsupported(
    dtype: torch.dtype, device: torch.device, top_k: int, num_experts: int, gated: bool = False
) -> str | None:
    return None


def replayed(sequence: Callable[..., tuple]) -> Callable[..., tuple]:
    return sequence


# ---------------------------------------------------------------------------------------------------------- router


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
    T, K = x.shape[0], top_k
    R, E, D = gate_weight.shape
    acc = acc_dtype(x.dtype)
    router = _router_ids(modality, R, T, x.device)
    logits = _select_router((x.to(acc) @ gate_weight.to(acc).reshape(R * E, D).t()).view(T, R, E), router)
    real = torch.ones(T, dtype=torch.bool, device=x.device) if mask is None else mask
    logits = logits.masked_fill(~real[:, None], 0.0)
    probs = logits.softmax(-1)
    top, chosen = probs.sort(dim=-1, descending=True, stable=True)  # stable: ties go to the lower expert
    top, chosen = top[:, :K], chosen[:, :K]
    weights = top / top.sum(-1, keepdim=True) * real[:, None]

    # Rows of `member` are one-hot over routers: sums over the tokens of each router become one small product.
    member = (F.one_hot(router, R) * real[:, None]).to(acc)
    hits = torch.zeros(T, E, dtype=acc, device=x.device).scatter_(1, chosen, 1.0)
    counts = member.t() @ hits
    tokens = member.sum(0)
    active = (tokens > 0).sum().clamp(min=1)
    share = tokens.clamp(min=1)[:, None]
    balance = (E * ((counts / share) * (member.t() @ probs / share)).sum()) / active
    lse = logits.logsumexp(-1)
    z_loss = ((member.t() @ lse.square()) / share[:, 0]).sum() / active

    shift = router * E if num_experts == 2 * E and R == 2 else torch.zeros_like(router)
    experts = torch.where(real[:, None], chosen + shift[:, None], num_experts).to(torch.int32)
    shared: tuple[Tensor, ...] = ()
    if shared_experts:
        shared = with_shared_experts(weights, experts, num_experts, shared_experts)
    order, inverse, offs = schedule(shared[1] if shared else experts, num_experts + shared_experts)
    return logits, weights, experts, counts.to(torch.int32), balance, z_loss, order, inverse, offs, *shared


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
    T, K = weights.shape
    R, E, D = gate_weight.shape
    acc = logits.dtype
    router = _router_ids(modality, R, T, x.device)
    grad = torch.zeros_like(logits) if dlogits is None else dlogits.to(acc, copy=True)
    if dweights is not None:
        # The renormalised top-K weights are a softmax over the chosen logits alone.
        dw = dweights[:, :K].to(acc)
        within = weights * (dw - (weights * dw).sum(-1, keepdim=True))
        grad.scatter_add_(1, experts.long() % E, within)
    if dbalance is not None or dz is not None:
        probs = logits.softmax(-1)
        tokens = counts.sum(-1).div(K).clamp(min=1).to(acc)
        active = (counts.sum(-1) > 0).sum().clamp(min=1)
        if dbalance is not None:
            dprobs = (dbalance * E / active * counts / tokens[:, None].square()).to(acc)[router]
            grad += probs * (dprobs - (probs * dprobs).sum(-1, keepdim=True))
        if dz is not None:
            grad += (dz * 2 / active / tokens)[router, None] * logits.logsumexp(-1, keepdim=True) * probs
    if mask is not None:  # padding may hold anything, NaN too: it is replaced, never multiplied by zero
        grad = grad.masked_fill(~mask[:, None], 0.0)
        x = x.masked_fill(~mask[:, None], 0.0)
    spread = torch.zeros(T, R, E, dtype=acc, device=x.device)
    spread.scatter_(1, router[:, None, None].expand(T, 1, E), grad[:, None])
    spread = spread.view(T, R * E)
    dgate = (spread.t() @ x.to(acc)).view(R, E, D).to(gate_weight.dtype)
    dx = (spread @ gate_weight.to(acc).reshape(R * E, D)).to(x.dtype) if need_dx else None
    return dx, dgate


def _router_ids(modality: Tensor | None, routers: int, tokens: int, device: torch.device) -> Tensor:
    if modality is None or routers == 1:
        return torch.zeros(tokens, dtype=torch.int64, device=device)
    return modality.long()


def _select_router(per_router: Tensor, router: Tensor) -> Tensor:
    T, R, E = per_router.shape
    return per_router[:, 0] if R == 1 else per_router.gather(1, router[:, None, None].expand(T, 1, E))[:, 0]


def schedule(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    T, K = experts.shape
    flat = experts.reshape(-1).long()
    flat = torch.where((flat < 0) | (flat >= num_experts), num_experts, flat)
    _, order = flat.sort(stable=True)
    ends = torch.bincount(flat, minlength=num_experts + 1)[:num_experts].cumsum(0)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(T * K, device=order.device)
    inverse = torch.where(flat == num_experts, -1, rank).view(T, K)
    return order.to(torch.int32), inverse.to(torch.int32), ends.to(torch.int32)


# ------------------------------------------------------------------------------------------------ expert projection


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
    (T, K), O = inverse.shape, w2.shape[1]
    segments = _segments(offs, T * K)
    h, pre = _expert_hidden(x, order, offs, K, w1, b1, activation)
    z = _expert_output(h, segments, w2, b2)
    mean = x.new_empty(T * K if ln_weight is not None else 0, dtype=acc_dtype(x.dtype))
    rstd = torch.empty_like(mean)
    normed = z
    if ln_weight is not None:
        normed = cpu_memory.empty(z.shape, z)
        gamma, beta = _affine(ln_weight, ln_bias, x)
        for e, rows in segments:
            n, m, r = torch.native_layer_norm(z[rows], (O,), gamma[e], beta[e], eps)
            normed[rows], mean[rows], rstd[rows] = n, m[:, 0], r[:, 0]
    y = _gather_sum(normed, inverse, weights, int(segments[-1][1].stop) if segments else 0)
    return y, h, pre, z, mean, rstd


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
    (T, K), (X, O, _), D = inverse.shape, w2.shape, x.shape[1]
    segments = _segments(offs, T * K)
    rows = segments[-1][1].stop if segments else 0
    if h.numel() == 0:
        h, pre = _expert_hidden(x, order, offs, K, w1, b1, activation)
    if z.numel() == 0:
        z = _expert_output(h, segments, w2, b2)

    choice = order[:rows].long()
    row_token = choice // K
    row_weight = weights.reshape(-1)[choice][:, None]
    dweight_rows = weights.new_empty(rows) if need_dweights else None
    dx_rows = cpu_memory.empty((rows, D), x) if need_dx else None

    dw1 = cpu_memory.empty(w1.shape, w1) if need_dparams else None
    dw2 = cpu_memory.empty(w2.shape, w2) if need_dparams else None
    db1 = torch.zeros_like(b1) if need_dparams and b1 is not None else None
    db2 = torch.zeros_like(b2) if need_dparams and b2 is not None else None
    dln_weight = torch.zeros_like(ln_weight) if need_dparams and ln_weight is not None else None
    dln_bias = torch.zeros_like(ln_bias) if need_dparams and ln_bias is not None else None
    acc, product = acc_dtype(x.dtype), product_dtype(x)
    gamma, beta = (None, None) if ln_weight is None else (ln_weight.to(acc), ln_bias.to(acc))

    idle = set(range(X))
    for e, s in segments:
        idle.remove(e)
        # Rows are gathered an expert at a time: small blocks stay in cache for the products that follow. What is
        # row-wise is computed in the accumulating dtype: PyTorch sums LayerNorm's gradients over rows in the input's.
        tokens = row_token[s]
        dy_rows = dy.index_select(0, tokens).to(acc)
        dz = dy_rows * row_weight[s]
        if ln_weight is None:
            if need_dweights:
                dweight_rows[s] = torch.linalg.vecdot(dy_rows, z[s].to(acc))
        else:
            z_rows = z[s].to(acc)
            if need_dweights:
                normed = torch.native_layer_norm(z_rows, (O,), gamma[e], beta[e], eps)[0]
                dweight_rows[s] = torch.linalg.vecdot(dy_rows, normed)
            stats = mean[s, None], rstd[s, None]
            wanted = [True, need_dparams, need_dparams]
            dz, dgamma, dbeta = _layer_norm_backward(dz, z_rows, (O,), *stats, gamma[e], beta[e], wanted)
            if need_dparams:
                dln_weight[e], dln_bias[e] = dgamma, dbeta
        dz, h_rows = dz.to(product), h[s].to(product)
        dh = linear(dz, w2[e].t())
        dh = _activation_backward(dh, h_rows, pre[s].to(product) if pre.numel() else pre, activation)  # of W1's rows
        if need_dparams:
            outer(dz, h_rows, out=dw2[e])
            outer(dh, x.index_select(0, tokens), out=dw1[e])
            if db2 is not None:
                db2[e] = dz.sum(0)
            if db1 is not None:
                db1[e] = dh.sum(0)
        if need_dx:
            linear(dh, w1[e].t(), out=dx_rows[s])
    if need_dparams:
        for e in idle:
            dw1[e].zero_()
            dw2[e].zero_()

    dx = _gather_sum(dx_rows, inverse, torch.ones_like(weights), rows) if need_dx else None
    dweights = None
    if need_dweights:
        dweights = torch.zeros(T * K, dtype=weights.dtype, device=x.device)
        dweights[choice] = dweight_rows
        dweights = dweights.view(T, K)
    return dx, dweights, dw1, db1, dw2, db2, dln_weight, dln_bias


def _affine(ln_weight: Tensor | None, ln_bias: Tensor | None, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """LayerNorm's parameters as PyTorch's kernels take them: in float32 on a CPU, in x's dtype elsewhere."""
    dtype = acc_dtype(x.dtype) if x.device.type == "cpu" else x.dtype
    return (None, None) if ln_weight is None else (ln_weight.to(dtype), ln_bias.to(dtype))


def _segments(offs: Tensor, rows: int) -> list[tuple[int, slice]]:
    """(expert, its rows) of every expert that has rows, in order. A caller's `offs` counts as clamped to the rows."""
    ends = [min(max(end, 0), rows) for end in offs.tolist()]
    return [(e, slice(a, b)) for e, (a, b) in enumerate(zip([0, *ends[:-1]], ends, strict=True)) if b > a]


def _expert_hidden(x, order, offs, top_k, w1, b1, activation) -> tuple[Tensor, Tensor]:
    """h and, for activations whose derivative needs it, the pre-activation (else empty); rows in expert order."""
    segments = _segments(offs, order.shape[0])
    h = cpu_memory.empty((order.shape[0], w1.shape[1]), x)  # gated: gate and up
    if segments:
        x_rows = x.index_select(0, order[: segments[-1][1].stop].long() // top_k)
        for e, rows in segments:
            linear(x_rows[rows], w1[e], None if b1 is None else b1[e], out=h[rows])
    if activation == "relu":
        return h.relu_(), h.new_empty(0)
    return _activate(h, activation), h


def _expert_output(h: Tensor, segments, w2: Tensor, b2: Tensor | None) -> Tensor:
    z = cpu_memory.empty((h.shape[0], w2.shape[1]), h)
    for e, rows in segments:
        linear(h[rows], w2[e], None if b2 is None else b2[e], out=z[rows])
    return z


def _activate(x: Tensor, activation: str | None) -> Tensor:
    if activation is None:
        return x
    if activation in GATED:
        gate, up = x.chunk(2, -1)
        return _activate(gate, GATED[activation]).mul_(up)
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x) if activation == "gelu" else F.silu(x)


def _activation_backward(grad: Tensor, h: Tensor, pre: Tensor, activation: str) -> Tensor:
    if activation in GATED:
        gate, up = pre.chunk(2, -1)
        through = _activation_backward(grad * up, gate, gate, GATED[activation])
        return torch.cat((through, grad * _activate(gate, GATED[activation])), -1)
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, h, 0)
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, pre)
    return torch.ops.aten.silu_backward(grad, pre)


def _gather_sum(rows: Tensor, inverse: Tensor, weights: Tensor, filled: int) -> Tensor:
    """Σ_k weights[t, k] · rows[inverse[t, k]]; entries with inverse −1 contribute nothing. (T, K) → (T, width)."""
    T, width = inverse.shape[0], rows.shape[1]
    if 0 in (filled, T, width):
        return rows.new_zeros(T, width)
    index = inverse.clamp(min=0).long()
    weights = torch.where(inverse < 0, 0.0, weights).to(rows.dtype)
    return F.embedding_bag(index, rows[:filled], mode="sum", per_sample_weights=weights)


# ------------------------------------------------------------------------------------------------------ grouped_mm


def grouped_mm(
    a: Tensor, b: Tensor, offs: Tensor, bias: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor]:
    segments = _segments(offs, a.shape[1 if b.dim() == 2 else 0])
    if b.dim() == 2:
        out = a.new_zeros(offs.shape[0], a.shape[0], b.shape[1])
        for g, rows in segments:
            outer(a[:, rows].t(), b[rows], out=out[g])
        return out, out.new_empty(0)
    out = a.new_zeros(a.shape[0], b.shape[2])
    for g, rows in segments:
        linear(a[rows], b[g].t(), None if bias is None else bias[g], out=out[rows])
    if activation in (None, "relu"):
        return _activate(out, activation), out.new_empty(0)
    return _activate(out, activation), out
