"""Routing of logits that somebody else computed: a router with hidden layers, a bias or noise, or no router at all.

What follows a router's logits is small, (T, E), and is plain PyTorch here, so that every backend serves it and autograd
differentiates it. Only the rows in expert order come from the backend (`smop::schedule`).
"""

import torch
from torch import Tensor

from llama_smop.ops import checks
from llama_smop.ops.backend import acc_dtype, with_shared_experts
from llama_smop.ops.expert_projection import schedule
from llama_smop.ops.route import Routed
from llama_smop.ops.router_network import check_modality, exact


def check(logits: Tensor, modality: Tensor | None, mask: Tensor | None, top_k: int, num_experts: int) -> None:
    sizes = checks.tensors(("logits", logits, "TE"), ("modality", modality, "T"), ("mask", mask, "T"))
    checks.floating(logits=logits)
    E = sizes["E"]
    if type(top_k) is not int or not 1 <= top_k <= E:
        checks.active_experts(top_k, E)
    most = 2 * E if modality is not None else E
    if num_experts not in (E, most):
        raise ValueError(f"num_experts must be {E}, or {2 * E} with a modality, for logits of {E} experts")
    checks.token_ids(modality, mask)


def route_logits(
    logits: Tensor,
    modality: Tensor | None,
    mask: Tensor | None,
    top_k: int,
    num_experts: int,
    shared_experts: int,
    backend: str,
) -> Routed:
    """As `smop::route` from its logits on. With a modality there are two routers, and each token has its own's logits.

    Args:
        logits: (T, E) float.  modality: (T,) integer or None.  mask: (T,) bool or None.
    """
    T, E = logits.shape
    R = 1 if modality is None else 2
    check_modality(modality)
    with exact(logits):
        logits = logits.to(acc_dtype(logits.dtype))
        router = logits.new_zeros(T, dtype=torch.int64) if modality is None else modality.long()
        real = torch.ones_like(router, dtype=torch.bool) if mask is None else mask
        logits = logits.masked_fill(~real[:, None], 0.0)
        probs = logits.softmax(-1)
        top, chosen = probs.sort(dim=-1, descending=True, stable=True)  # stable: ties go to the lower expert
        top, chosen = top[:, :top_k], chosen[:, :top_k]
        weights = top / top.sum(-1, keepdim=True) * real[:, None]

        routers = torch.arange(R, device=logits.device)  # compared, as one_hot may wait for a GPU
        member = ((router[:, None] == routers) & real[:, None]).to(logits.dtype)
        hits = torch.zeros_like(logits).scatter_(1, chosen, 1.0)
        counts = member.t() @ hits
        tokens = member.sum(0)
        share, active = tokens.clamp(min=1)[:, None], (tokens > 0).sum().clamp(min=1)
        balance = E * (counts / share * (member.t() @ probs / share)).sum() / active
        z_loss = (member.t() @ logits.logsumexp(-1, keepdim=True).square() / share).sum() / active

    shifted = chosen + (router * E)[:, None] if num_experts > E else chosen
    experts = torch.where(real[:, None], shifted, num_experts).to(torch.int32)
    if shared_experts:
        all_weights, all_experts = with_shared_experts(weights, experts, num_experts, shared_experts)
        rows = schedule(all_experts, num_experts + shared_experts, backend)
    else:
        all_weights, all_experts = weights.new_empty(0), experts.new_empty(0)
        rows = schedule(experts, num_experts, backend)
    routed = logits, weights, experts, counts.to(torch.int32), balance, z_loss
    order, inverse, offs = rows
    return Routed(*routed, order, inverse, offs, all_weights, all_experts)


def reweighted(routing: Routed, num_experts: int, normalize: bool, scale: float) -> Routed:
    """`routing` with other gate weights: the chosen experts' probabilities as they are, or times `scale`, or both."""
    weights = routing.weights
    if not normalize:
        E = routing.logits.shape[1]
        chosen = routing.logits.softmax(-1).gather(1, routing.experts.long() % E)
        weights = torch.where(routing.experts < num_experts, chosen, 0.0)
    weights = weights if scale == 1 else weights * scale
    all_weights = routing.all_weights
    if all_weights.dim() == 2:  # with shared experts, whose weight stays 1
        all_weights = torch.cat((weights, all_weights[:, weights.shape[1] :]), 1)
    return routing._replace(weights=weights, all_weights=all_weights)
