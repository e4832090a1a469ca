"""The routers' losses over the tokens of all processes, in place of the mean of every process's own."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def global_aux_losses(
    logits: Tensor,
    experts: Tensor,
    modality: Tensor | None,
    routers: int,
    num_experts: int,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """This process's part of the load-balancing loss and the router z-loss of the joint batch.

    Both are scaled by the number of processes, so that means over the processes, as data-parallel training takes them,
    are the losses of the joint batch and their gradients. How often each expert was chosen is summed over the
    processes (one all-reduce of R·(E + 1) numbers, without a gradient); the probabilities stay with their process.

    Args:
        logits: (T, E) float.
        experts: (T, K) integer in [0, X]; X for masked tokens.
        modality: (T,) integer, the router of each token; ignored with one router.
        routers, num_experts: R and X.
        group: processes that share the batch; default all, and none where torch.distributed is not in use.
    """
    with torch.autocast(logits.device.type, enabled=False):  # sums over tokens, and counts of them: float32 or better
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return _global_aux_losses(exact, experts, modality, routers, num_experts, group)


def _global_aux_losses(logits, experts, modality, routers, num_experts, group) -> tuple[Tensor, Tensor]:
    T, E = logits.shape
    router = modality.long() if routers > 1 else torch.zeros(T, dtype=torch.int64, device=logits.device)
    member = F.one_hot(router, routers).to(logits.dtype) * (experts[:, :1] < num_experts)
    hits = torch.zeros_like(logits).scatter_(1, experts.long() % E, 1.0)
    joint = torch.cat([member.t() @ hits, member.sum(0)[:, None]], 1).detach()
    world = 1
    if dist.is_available() and dist.is_initialized():
        world = dist.get_world_size(group)
        dist.all_reduce(joint, group=group)
    counts, tokens = joint[:, :E], joint[:, E:].clamp(min=1)
    scale = world / (joint[:, E] > 0).sum().clamp(min=1)
    balance = E * (counts / tokens * (member.t() @ logits.softmax(-1)) / tokens).sum()
    z_loss = (member.t() @ logits.logsumexp(-1, keepdim=True).square() / tokens).sum()
    return balance * scale, z_loss * scale
