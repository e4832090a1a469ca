"""The operators by definition: a literal loop over tokens and choices, meant to be read.

Every backend is tested against it. It is differentiable, so autograd gives the reference gradients, and it computes in
the dtype of its inputs: give it float64. It reads values on the host and is slow.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda v: v,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    # Gated: the first half of the values is the gate, the second what it opens for.
    "reglu": lambda v: F.relu(v[: len(v) // 2]) * v[len(v) // 2 :],
    "geglu": lambda v: F.gelu(v[: len(v) // 2]) * v[len(v) // 2 :],
    "swiglu": lambda v: F.silu(v[: len(v) // 2]) * v[len(v) // 2 :],
}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Each token over the root of its mean square, scaled (Zhang and Sennrich, 2019). x (T, D), weight (D,)."""
    return torch.stack([weight * t / (t.square().sum() / len(t) + eps).sqrt() for t in x]) if len(x) else x


class NaiveRouting(NamedTuple):
    """What the router decides. T tokens, R routers, E experts a router, X experts in all, K active."""

    logits: Tensor  # (T, E)
    weights: Tensor  # (T, K)
    experts: Tensor  # (T, K) int64, X for masked tokens
    counts: Tensor  # (R, E) int64
    load_balancing_loss: Tensor  # ()
    router_z_loss: Tensor  # ()


def route(
    x: Tensor,
    gate_weight: Tensor | None,
    modality: Tensor | None,
    mask: Tensor | None,
    top_k: int,
    num_experts: int,
    experts: Tensor | None = None,
    *,
    normalize_weights: bool = True,
    weight_scale: float = 1.0,
    balance_form: str | None = "switch",
) -> NaiveRouting:
    """Route each token. `experts` (T, K) fixes the choice, for inputs where rounding may tip a near tie.

    `gate_weight` None: x holds the logits (T, E), of two routers if there is a modality.
    """
    T = x.shape[0]
    R, E = ((1 if modality is None else 2), x.shape[1]) if gate_weight is None else gate_weight.shape[:2]
    all_logits, all_weights, all_experts = [], [], []
    members: list[list] = [[] for _ in range(R)]  # (chosen, probabilities, logsumexp) of each router's real tokens
    for t in range(T):
        if mask is not None and not mask[t]:
            all_logits.append(x.new_zeros(E))
            all_weights.append(x.new_zeros(top_k))
            all_experts.append([num_experts] * top_k)
            continue
        m = 0 if modality is None or R == 1 else int(modality[t])
        shift = m * E if num_experts == 2 * E and R == 2 else 0
        logits = x[t] if gate_weight is None else gate_weight[m] @ x[t]
        p = logits.softmax(0)
        if experts is None:
            chosen = sorted(range(E), key=lambda e: (-float(p[e].detach()), e))[:top_k]
        else:
            chosen = [int(e) - shift for e in experts[t]]
        w = torch.stack([p[e] for e in chosen])
        all_logits.append(logits)
        all_weights.append(weight_scale * (w / w.sum() if normalize_weights else w))
        all_experts.append([e + shift for e in chosen])
        members[m].append((chosen, p, logits.logsumexp(0)))

    counts = torch.zeros(R, E, dtype=torch.int64)
    balance, z = [], []
    for r, tokens in enumerate(members):
        for chosen, _, _ in tokens:
            for e in chosen:
                counts[r, e] += 1
        if tokens:
            n = len(tokens)
            mean_p = torch.stack([p for _, p, _ in tokens]).sum(0) / n
            switch = E * (counts[r].to(x.dtype) / n * mean_p).sum()
            mse = (mean_p - 1 / E).square().sum()
            balance.append({"switch": switch, "mse": mse, None: x.new_zeros(())}[balance_form])
            z.append(torch.stack([lse**2 for _, _, lse in tokens]).sum() / n)
    none = x.new_zeros(())
    return NaiveRouting(
        torch.stack(all_logits) if T else x.new_zeros(0, E),
        torch.stack(all_weights) if T else x.new_zeros(0, top_k),
        torch.tensor(all_experts, dtype=torch.int64).view(T, top_k),
        counts,
        torch.stack(balance).mean() if balance else none,
        torch.stack(z).mean() if z else none,
    )


def expert_projection(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    ln_weight: Tensor | None = None,
    ln_bias: Tensor | None = None,
    activation: str = "relu",
    eps: float = 1e-5,
) -> Tensor:
    """y_t = Σ_k w_tk · LN(W2·act(W1·x_t + b1) + b2), the experts outside [0, X) skipped."""
    (T, K), (X, O, _) = weights.shape, w2.shape
    act = ACTIVATIONS[activation]
    y = []
    for t in range(T):
        total = x.new_zeros(O)
        for k in range(K):
            e = int(experts[t, k])
            if not 0 <= e < X:
                continue
            h = w1[e] @ x[t]
            h = act(h if b1 is None else h + b1[e])
            z = w2[e] @ h
            z = z if b2 is None else z + b2[e]
            if ln_weight is not None:
                z = F.layer_norm(z, (O,), ln_weight[e], ln_bias[e], eps)
            total = total + weights[t, k] * z
        y.append(total)
    return torch.stack(y) if T else x.new_zeros(0, O)


def with_shared_experts(weights: Tensor, experts: Tensor, num_experts: int, shared: int) -> tuple[Tensor, Tensor]:
    """(weights, experts) with `shared` choices more of weight 1: experts X, X + 1, … of every token that is routed."""
    if not len(experts):
        return weights.new_zeros(0, weights.shape[1] + shared), experts.new_zeros(0, experts.shape[1] + shared)
    all_weights, all_experts = [], []
    for t in range(len(experts)):
        routed = int(experts[t, 0]) < num_experts
        ids = [num_experts + s if routed else num_experts + shared for s in range(shared)]
        chosen = [int(e) if routed else num_experts + shared for e in experts[t]]
        all_weights.append(torch.cat([weights[t], weights.new_full((shared,), float(routed))]))
        all_experts.append(torch.tensor(chosen + ids))
    return torch.stack(all_weights), torch.stack(all_experts)


def merged_projection(
    x: Tensor,
    logits: Tensor,
    modality: Tensor | None,
    mask: Tensor | None,
    parameters: tuple,
    activation: str = "relu",
    eps: float = 1e-5,
) -> Tensor:
    """Soft merging (Muqeeth et al., "Soft Merging of Experts with Adaptive Routing", 2023), by clip.

        π_b = mean over the clip's real tokens of softmax(logits),  θ_b = Σ_e π_be θ_e,  y = MLP(x; θ_b)

    x (B, T, D), logits (B, T, E). With a modality, a clip's audio and video tokens are averaged apart; where there are
    2·E experts, video's are the second half. `parameters`: those of `Experts`, X experts.
    """
    B, T, E = logits.shape
    X, O = parameters[2].shape[:2]
    y = x.new_zeros(B, T, O)
    for b in range(B):
        for m in (0, 1) if modality is not None else (0,):
            tokens = [
                t for t in range(T) if (mask is None or mask[b, t]) and (modality is None or int(modality[b, t]) == m)
            ]
            if not tokens:
                continue
            pi = torch.stack([logits[b, t].softmax(0) for t in tokens]).sum(0) / len(tokens)
            first = m * E if X == 2 * E else 0
            w1, b1, w2, b2, ln_weight, ln_bias = (
                None if p is None else torch.stack([pi[e] * p[first + e] for e in range(E)]).sum(0, keepdim=True)
                for p in parameters
            )
            ones, zeros = x.new_ones(len(tokens), 1), torch.zeros(len(tokens), 1, dtype=torch.int64)
            part = expert_projection(x[b, tokens], ones, zeros, w1, b1, w2, b2, ln_weight, ln_bias, activation, eps)
            y = y.index_put((torch.full((len(tokens),), b), torch.tensor(tokens)), part)
    return y


def schedule(experts: Tensor, num_experts: int) -> tuple[list[int], list[int], list[int]]:
    """(order up to offs[-1], inverse, offs) of caller-made routing, by the definition."""
    flat = experts.reshape(-1).tolist()
    order = [i for e in range(num_experts) for i, chosen in enumerate(flat) if chosen == e]
    row_of = {i: r for r, i in enumerate(order)}
    offs = [sum(chosen in range(e + 1) for chosen in flat) for e in range(num_experts)]
    return order, [row_of.get(i, -1) for i in range(len(flat))], offs


def grouped_mm(a: Tensor, b: Tensor, offs: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """2d x 3d: out[r] = act(a[r] @ b[g] + bias[g]) for rows r of group g, 0 past the last group. 2d x 2d: one product a
    group over its columns of a and rows of b."""
    ends = offs.tolist()
    begins = [0, *ends[:-1]]
    if b.dim() == 2:
        return torch.stack([a[:, s:t] @ b[s:t] for s, t in zip(begins, ends, strict=True)])
    act = ACTIVATIONS[activation]
    rows = [a.new_zeros(b.shape[2])] * a.shape[0]
    for g, (s, t) in enumerate(zip(begins, ends, strict=True)):
        for r in range(s, t):
            product = a[r] @ b[g]
            rows[r] = act(product if bias is None else product + bias[g])
    return torch.stack(rows) if rows else a.new_zeros(0, b.shape[2])
