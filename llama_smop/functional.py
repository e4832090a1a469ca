"""The public functions: `smop`, `route`, `expert_projection`, `grouped_mm`.

All of them work in eager mode, under autograd, autocast, `torch.compile(fullgraph=True)`, activation checkpointing and
CUDA graphs, and take `backend="auto" | "torch" | "triton" | "cuda"`. vmap and the other `torch.func` transforms,
forward-mode derivatives and second derivatives are refused (`grouped_mm` has second derivatives without activation and
with "relu").
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from llama_smop.ops import dispatch
from llama_smop.ops import expert_projection as _projection
from llama_smop.ops import grouped_mm as _grouped_mm
from llama_smop.ops import layer as _layer
from llama_smop.ops import merge as _merge
from llama_smop.ops import route as _route
from llama_smop.ops import route_logits as _route_logits
from llama_smop.ops.backend import Experts, Schedule, acc_dtype
from llama_smop.ops.checks import (
    ACTIVATIONS,
    are_tensors,
    are_tensors_or_none,
    epsilon,
    expert_activation,
    layout,
    routing_weights,
)
from llama_smop.ops.operator import autocast_dtype
from llama_smop.ops.route import Routed, Routing


class SMoPOutput(NamedTuple):
    """What a projector returns. `...` are the leading dimensions of its input, X the experts in all."""

    hidden_states: Tensor  # (..., O); 0 for masked tokens
    router_logits: Tensor | None  # (..., E) float32
    expert_indices: Tensor | None  # (..., K) int32 in [0, X); X for masked tokens
    expert_weights: Tensor | None  # (..., K) float32
    load_balancing_loss: Tensor  # ()
    router_z_loss: Tensor  # ()
    expert_counts: Tensor | None  # (X,) int32, choices of each expert


def route(
    x: Tensor,
    gate_weight: Tensor,
    *,
    top_k: int,
    num_experts: int | None = None,
    modality: Tensor | None = None,
    mask: Tensor | None = None,
    normalize_weights: bool = True,
    weight_scale: float = 1.0,
    backend: str = "auto",
) -> Routing:
    """Choose K experts a token.

        logits = x · Gᵀ,  p = softmax(logits) in float32,  (w, e) = top-K(p),  w = w / Σ w

    With two routers a token's modality picks its router; with `num_experts == 2·E` expert ids are shifted by
    modality·E. Ties go to the lower expert.

    Auxiliary losses, for each router over its real tokens, averaged over the routers that have any: load balancing
    `E · Σ_k Σ_e f_{k,e} P_e` (Fedus et al., Switch Transformers, eq. 4, summed over the K choices: K when uniform) and
    router z-loss `mean(logsumexp(logits)²)` (Zoph et al., ST-MoE, eq. 5).

    Args:
        x: (T, D) float.
        gate_weight: (R, E, D), R = 1 or 2 routers, x's dtype.
        top_k: K, 1 to E.
        num_experts: X, E or R·E; default E.
        modality: (T,) integer, 0 audio, 1 video; required when R = 2.
        mask: (T,) bool, True = real. Masked tokens are routed nowhere and count in no loss and no load figure.
        normalize_weights: False leaves the chosen experts' probabilities as they are, w = p.
        weight_scale: what the gate weights are multiplied with at last.

    Raises:
        ValueError, TypeError: a shape, size or dtype that does not fit, naming the argument.
        IndexError: a modality outside [0, 1] (on a GPU only with LLAMA_SMOP_DEBUG=1).
        RuntimeError: the backend asked for cannot run here.
    """
    are_tensors(x=x, gate_weight=gate_weight)
    are_tensors_or_none(modality=modality, mask=mask)
    X = gate_weight.shape[1] if num_experts is None and gate_weight.dim() > 1 else num_experts or 0
    _route.check(x, gate_weight, modality, mask, top_k, X)
    backend = dispatch.resolve(backend, autocast_dtype(x), x.device, top_k, X)
    r = Routed(*_route.route(x, gate_weight, modality, mask, top_k, X, 0, backend))
    if not normalize_weights or weight_scale != 1:
        routing_weights(normalize_weights, weight_scale)
        r = _route_logits.reweighted(r, X, normalize_weights, weight_scale)
    return Routing(*r[:9])


def route_logits(
    logits: Tensor,
    *,
    top_k: int,
    num_experts: int | None = None,
    modality: Tensor | None = None,
    mask: Tensor | None = None,
    normalize_weights: bool = True,
    weight_scale: float = 1.0,
    backend: str = "auto",
) -> Routing:
    """`route` from the logits on, for a router of your own: one with hidden layers, a bias, noise.

    Args:
        logits: (T, E) float; with two routers those of each token's own.
        modality: (T,) integer, which of two routers a token's logits are of; None for one router.
        top_k, num_experts, mask, normalize_weights, weight_scale: as in `route`.

    Raises:
        As `route`.
    """
    are_tensors(logits=logits)
    are_tensors_or_none(modality=modality, mask=mask)
    X = (logits.shape[1] if logits.dim() > 1 else 0) if num_experts is None else num_experts
    _route_logits.check(logits, modality, mask, top_k, X)
    routing_weights(normalize_weights, weight_scale)
    # All that a backend makes here is the rows' order: any dtype that it has will do.
    backend = dispatch.resolve(backend, torch.bfloat16, logits.device, top_k, X)
    r = _route_logits.route_logits(logits, modality, mask, top_k, X, 0, backend)
    return Routing(*_route_logits.reweighted(r, X, normalize_weights, weight_scale)[:9])


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
    *,
    activation: str = "relu",
    gated: bool = False,
    eps: float = 1e-5,
    recompute: str | int = "none",
    schedule: tuple[Tensor, Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Each token through its K experts.

        y = Σ_k w_k · LayerNorm_{e_k}(W2_{e_k} · act(W1_{e_k} x + b1_{e_k}) + b2_{e_k})

    With `gated`, act(W1 x + b1) becomes act(Wg x + bg) ⊙ (Wu x + bu), where W1 holds Wg's rows and then Wu's (Shazeer,
    "GLU Variants Improve Transformer", 2020; the layout of transformers' `gate_up_proj`).

    Cappellazzo et al., "Scaling and Enhancing LLM-based AVSR: A Sparse Mixture of Projectors Approach", Interspeech
    2025, arXiv 2505.14336. Products accumulate in float32, LayerNorm and the sum over K are float32.

    Args:
        x: (T, D) float64, float32, bfloat16 or float16.
        weights: (T, K) float.
        experts: (T, K) integer in [0, X]; X skips the choice, which then contributes 0.
        w1, b1: (X, H, D), (X, H); (X, 2·H, D), (X, 2·H) if gated.  w2, b2: (X, O, H), (X, O).  x's dtype; biases may be
            None.
        ln_weight, ln_bias: (X, O), or both None for no LayerNorm.
        activation: "relu", "gelu" (erf) or "silu".
        recompute: "none", "h", "z" or "hz": what backward computes again instead of keeping it. Or the bytes of h and z
            that may be kept: then the least of these that keeps no more.
        schedule: (order, inverse, offs) of a `Routing` made for the same `experts`; made here when None.

    Returns:
        (T, O) in x's dtype.

    Raises:
        ValueError, TypeError: a shape, size, dtype or name that does not fit, naming the argument.
        IndexError: an expert id outside [0, X] (on a GPU only with LLAMA_SMOP_DEBUG=1).
        RuntimeError: the backend asked for cannot run here.
    """
    are_tensors(x=x, weights=weights, experts=experts, w1=w1, w2=w2)
    are_tensors_or_none(b1=b1, b2=b2, ln_weight=ln_weight, ln_bias=ln_bias)
    epsilon(eps)
    parameters, X = Experts(w1, b1, w2, b2, ln_weight, ln_bias), w1.shape[0] if w1.dim() else 0
    activation = expert_activation(activation, gated)
    _projection.check_parameters(x, parameters, activation, recompute)
    _projection.check_choices(x, weights, experts)
    backend = dispatch.resolve(backend, autocast_dtype(x), x.device, weights.shape[1], X, gated)
    rows = Schedule(*(_projection.schedule(experts, X, backend) if schedule is None else schedule))
    if schedule is not None:
        _projection.check_schedule(experts, X, rows)
        _projection.check_rows(rows)
    again = _projection.recomputed(recompute, x, experts.numel(), w1, w2, activation)
    y, *_ = _projection.expert_projection(x, weights, experts, rows, parameters, activation, eps, again, backend)
    return y


def smop(
    x: Tensor,
    gate_weight: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    *,
    top_k: int,
    sharing: str,
    modality: Tensor | None = None,
    mask: Tensor | None = None,
    activation: str = "relu",
    gated: bool = False,
    shared_experts: int = 0,
    normalize_weights: bool = True,
    weight_scale: float = 1.0,
    router_logits: Tensor | None = None,
    eps: float = 1e-5,
    recompute: str | int = "none",
    backend: str = "auto",
) -> SMoPOutput:
    """The sparse mixture of projectors: `route`, then `expert_projection`. Audio and video tokens go through together.

    Args:
        x: (..., D); `modality` (...) integer and `mask` (...) bool share its leading dimensions.
        gate_weight: (R, E, D).  w1 (X, H, D), b1 (X, H), w2 (X, O, H), b2 (X, O), ln_weight and ln_bias (X, O), with
            JEJR: R = 1, X = E;  JEDR: R = 2, X = E;  DEDR: R = 2, X = 2·E, modality-major (expert m·E + e).
        gated, normalize_weights, weight_scale: as in `expert_projection` and `route`.
        shared_experts: S experts more, the last of the stacked parameters (X + S of them), through which every real
            token goes with weight 1, whatever its modality (Dai et al., DeepSeekMoE, 2024). They are further choices in
            the same grouped products. Losses, counts, indices and weights that are returned are of the routed ones.
        router_logits: (..., E), of each token's own router, in place of `gate_weight`, which is then None.

    See `route` and `expert_projection` for the formulas, dtypes and errors.
    """
    for value in (x, w1, w2):  # here: a call is time before the first launch
        if not isinstance(value, Tensor):
            are_tensors(x=x, w1=w1, w2=w2)
    for given in (gate_weight, router_logits, b1, b2, ln_weight, ln_bias, modality, mask):
        if given is not None and not isinstance(given, Tensor):
            are_tensors_or_none(
                gate_weight=gate_weight, router_logits=router_logits, b1=b1, b2=b2, ln_weight=ln_weight,
                ln_bias=ln_bias, modality=modality, mask=mask,
            )  # fmt: skip
    if type(eps) is not float or not 0 <= eps < math.inf:
        epsilon(eps)
    if x.dim() == 0:
        raise ValueError("x must have shape (..., D), got a scalar")
    if (gate_weight is None) == (router_logits is None):
        raise ValueError("pass gate_weight, or None in its place and router_logits")
    lead = x.shape[:-1]
    if gate_weight is not None:
        E = gate_weight.shape[1] if gate_weight.dim() > 1 else 0
    else:
        assert router_logits is not None
        if router_logits.dim() == 0 or router_logits.shape[:-1] != lead:
            raise ValueError(
                f"router_logits must have x's leading shape {tuple(lead)}, got {tuple(router_logits.shape)}"
            )
        E = router_logits.shape[-1]
    routers, total = layout(sharing, E)
    if modality is not None:
        if modality.shape != lead:
            raise ValueError(f"modality must have x's leading shape {tuple(lead)}, got {tuple(modality.shape)}")
        modality = modality.reshape(-1)
    if mask is not None:
        if mask.shape != lead:
            raise ValueError(f"mask must have x's leading shape {tuple(lead)}, got {tuple(mask.shape)}")
        mask = mask.reshape(-1)
    flat, parameters = x if len(lead) == 1 else x.reshape(-1, x.shape[-1]), Experts(w1, b1, w2, b2, ln_weight, ln_bias)
    if gate_weight is not None:
        if gate_weight.dim() == 3 and gate_weight.shape[0] != routers:
            raise ValueError(f"gate_weight must hold {routers} router(s) for {sharing}, got {gate_weight.shape[0]}")
        _route.check(flat, gate_weight, modality, mask, top_k, total)
    else:
        assert router_logits is not None
        if routers == 2 and modality is None:
            raise ValueError("modality is required with two routers: an integer for each token, 0 audio, 1 video")
        modality = modality if routers == 2 else None
        logits = router_logits.reshape(-1, E)
        _route_logits.check(logits, modality, mask, top_k, total)
    if shared_experts < 0:
        raise ValueError(f"shared_experts must be at least 0, got {shared_experts}")
    if w1.dim() and w1.shape[0] != total + shared_experts:
        shared = f" with {shared_experts} shared" if shared_experts else ""
        raise ValueError(f"w1 must hold {total + shared_experts} experts for {sharing}{shared}, got {w1.shape[0]}")
    if gated or activation not in ACTIVATIONS:  # asked here: a call is time before the first launch
        activation = expert_activation(activation, gated)
    _projection.check_parameters(flat, parameters, activation, recompute)
    backend = dispatch.resolve(
        backend, autocast_dtype(x), x.device, top_k + shared_experts, total + shared_experts, gated
    )
    again = _projection.recomputed(recompute, flat, flat.shape[0] * (top_k + shared_experts), w1, w2, activation)
    reweighted = not normalize_weights or weight_scale != 1
    if gate_weight is not None and not (reweighted or torch.compiler.is_compiling()):
        options = _layer.Options(modality, mask, top_k, total, shared_experts, activation, eps, again, backend)
        projected = _layer.in_one_node(flat, gate_weight, parameters, options)
        if projected is not None:
            return _output(projected, lead, total)
    if gate_weight is not None:
        r = Routed(*_route.route(flat, gate_weight, modality, mask, top_k, total, shared_experts, backend))
    else:
        r = _route_logits.route_logits(logits, modality, mask, top_k, total, shared_experts, backend)
    if reweighted:
        routing_weights(normalize_weights, weight_scale)
        r = _route_logits.reweighted(r, total, normalize_weights, weight_scale)
    weights, experts = (r.all_weights, r.all_experts) if shared_experts else (r.weights, r.experts)
    rows = Schedule(r.order, r.inverse, r.offs)
    y, *_ = _projection.expert_projection(
        flat, weights, experts, rows, parameters, activation, eps, again, backend
    )  # fmt: skip
    return _output(_layer.Projected(y, *r[:6]), lead, total)


def _output(found: _layer.Projected, lead: torch.Size, num_experts: int) -> SMoPOutput:
    y, logits, weights, experts, counts, balance, z_loss = found
    return SMoPOutput(
        hidden_states=_unflattened(y, lead),
        router_logits=_unflattened(logits, lead),
        expert_indices=_unflattened(experts, lead),
        expert_weights=_unflattened(weights, lead),
        load_balancing_loss=balance,
        router_z_loss=z_loss,
        expert_counts=counts.reshape(-1) if num_experts == counts.numel() else counts.sum(0, dtype=counts.dtype),
    )


def _unflattened(rows: Tensor, lead: torch.Size) -> Tensor:
    return rows if len(lead) == 1 else rows.reshape(*lead, rows.shape[-1])


def merged_projection(
    x: Tensor,
    router_logits: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    ln_weight: Tensor | None = None,
    ln_bias: Tensor | None = None,
    *,
    modality: Tensor | None = None,
    mask: Tensor | None = None,
    activation: str = "relu",
    gated: bool = False,
    eps: float = 1e-5,
    recompute: str | int = "none",
    backend: str = "auto",
) -> Tensor:
    """Soft merging: one MLP a clip, whose parameters are the experts' averaged by the clip's mean probabilities.

        π_b = mean over the clip's real tokens of softmax(logits),   θ_b = Σ_e π_be θ_e,   y = MLP(x; θ_b)

    Muqeeth et al., "Soft Merging of Experts with Adaptive Routing", 2023, arXiv 2306.03745; as a projector Pandey et
    al., SMEAR-MoE, 2026, arXiv 2601.19451. With a modality a clip's audio and video tokens are averaged apart, and with
    2·E experts merge their own half. The merged parameters take one copy of an MLP a clip and modality.

    Args:
        x: (B, N, D), N tokens a clip.  router_logits: (B, N, E), of each token's own router.
        w1 … ln_bias: as in `expert_projection`, E or 2·E experts.
        modality: (B, N) integer, 0 audio, 1 video; required with 2·E experts.  mask: (B, N) bool, True = real.

    Returns:
        (B, N, O), 0 for masked tokens.

    Raises:
        As `expert_projection`.
    """
    are_tensors(x=x, router_logits=router_logits, w1=w1, w2=w2)
    are_tensors_or_none(b1=b1, b2=b2, ln_weight=ln_weight, ln_bias=ln_bias, modality=modality, mask=mask)
    epsilon(eps)
    _merge.check(x, router_logits, modality, mask, w1)
    parameters = Experts(w1, b1, w2, b2, ln_weight, ln_bias)
    _projection.check_parameters(
        x.reshape(-1, x.shape[-1]), parameters, expert_activation(activation, gated), recompute
    )
    if x.shape[0] > (most := _merge.clips_at_once(modality)):
        parts = [
            merged_projection(
                x[s], router_logits[s], *parameters, modality=None if modality is None else modality[s],
                mask=None if mask is None else mask[s], activation=activation, gated=gated, eps=eps,
                recompute=recompute, backend=backend,
            )
            for s in (slice(i, i + most) for i in range(0, x.shape[0], most))
        ]  # fmt: skip
        return torch.cat(parts)
    (m1, mb1, m2, mb2, m_ln_weight, m_ln_bias), groups = _merge.merged(router_logits, modality, mask, parameters)
    flat = x.reshape(-1, x.shape[-1])
    y = expert_projection(
        flat, flat.new_ones(groups.shape, dtype=acc_dtype(x.dtype)), groups, m1, mb1, m2, mb2, m_ln_weight, m_ln_bias,
        activation=activation, gated=gated, eps=eps, recompute=recompute, backend=backend,
    )  # fmt: skip
    return y.reshape(*x.shape[:-1], y.shape[-1])


def grouped_mm(
    a: Tensor,
    b: Tensor,
    offs: Tensor,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """One matrix product a group; `offs` means what it means in `torch.nn.functional.grouped_mm`.

    2d x 3d: `out[rows of g] = act(a[rows of g] @ b[g] + bias[g])`, rows past `offs[-1]` are 0.
    2d x 2d: `out[g] = a[:, columns of g] @ b[rows of g]`, an empty group gives 0.

    Args:
        a: (M, K); any strides, float64 to float16.
        b: (G, K, N) or (K, N); any strides, a's dtype.
        offs: (G,) int32, cumulative ends of the groups. They must not fall, which a GPU checks only with
            LLAMA_SMOP_DEBUG=1: where they do, which rows a group has is left open, and the gradient may take others
            than the product.
        bias: (G, N), 2d x 3d only.
        activation: None, "relu", "gelu" or "silu", 2d x 3d only.

    Returns:
        (M, N) or (G, M, N) in a's dtype.
    """
    are_tensors(a=a, b=b, offs=offs)
    are_tensors_or_none(bias=bias)
    _grouped_mm.check(a, b, offs, bias, activation)
    backend = dispatch.resolve(backend, autocast_dtype(a), a.device, 1, offs.shape[0])
    return _grouped_mm.grouped_mm(a, b, offs, bias, activation, backend)[0]
