"""The routers' losses from their logits: of the tokens of all processes, in place of the mean of every process's own;
and other forms of load balancing than `smop::route` computes."""

import torch
import torch.distributed as dist
from torch import Tensor

from llama_smop.ops.router_network import exact


def aux_losses(
    logits: Tensor,
    experts: Tensor | None,
    modality: Tensor | None,
    mask: Tensor | None,
    routers: int,
    *,
    balance: str | None = "switch",
    joint: bool = False,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """The load-balancing loss and the router z-loss; with `joint`, this process's part of those of the joint batch.

    Each is a mean over the routers that have tokens. f: shares of the choices, P: mean probabilities.

        switch  E · Σ_e f_e P_e            mse  Σ_e (P_e − 1/E)²           None  0

    Parts of a joint batch are scaled by the number of processes, so that means over the processes, as data-parallel
    training takes them, are the losses of the joint batch and their gradients. Tokens, choices and probabilities are
    summed over the processes (one all-reduce of R·(2·E + 1) numbers, without a gradient).

    Args:
        logits: (T, E) float.
        experts: (T, K) integer, those chosen; "switch" needs it.
        modality: (T,) integer, the router of each token; ignored with one router.
        mask: (T,) bool, True = real, or None.
        routers: R.
        group: processes that share the batch; default all, and none where torch.distributed is not in use.
    """
    with exact(logits):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return _aux_losses(logits, experts, modality, mask, routers, balance, joint, group)


def _aux_losses(logits, experts, modality, mask, routers, balance, joint, group) -> tuple[Tensor, Tensor]:
    T, E = logits.shape
    router = modality.long() if routers > 1 else torch.zeros(T, dtype=torch.int64, device=logits.device)
    member = router[:, None] == torch.arange(routers, device=logits.device)
    member = (member if mask is None else member & mask[:, None]).to(logits.dtype)
    if mask is not None:  # padding may hold anything
        logits = logits.masked_fill(~mask[:, None], 0.0)
    hits = torch.zeros_like(logits)
    if experts is not None:
        hits.scatter_(1, experts.long() % E, 1.0)
    probabilities = member.t() @ logits.softmax(-1)  # (R, E) sums
    sums = torch.cat([member.t() @ hits, probabilities, member.sum(0)[:, None]], 1).detach()
    world = 1
    if joint and dist.is_available() and dist.is_initialized():
        world = dist.get_world_size(group)
        dist.all_reduce(sums, group=group)
    counts, every, tokens = sums[:, :E], sums[:, E : 2 * E], sums[:, 2 * E :].clamp(min=1)
    scale = world / (sums[:, 2 * E] > 0).sum().clamp(min=1)
    z_loss = scale * (member.t() @ logits.logsumexp(-1, keepdim=True).square() / tokens).sum()
    if balance is None:
        return torch.zeros_like(z_loss), z_loss
    if balance == "switch":
        return scale * E * (counts / tokens * probabilities / tokens).sum(), z_loss
    # A square of a sum over processes: its value is the joint one, its gradient goes through this process's part.
    off = torch.where(sums[:, 2 * E :] > 0, every / tokens - 1 / E, 0.0)
    own = (probabilities - probabilities.detach()) / tokens
    return scale * (off.square() / world + 2 * off * own).sum(), z_loss
