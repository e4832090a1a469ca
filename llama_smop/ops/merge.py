"""Soft merging of experts: the parameters of one MLP a clip, by the clip's mean router probabilities."""

import torch
from torch import Tensor

from llama_smop.ops import checks
from llama_smop.ops.backend import Experts, acc_dtype
from llama_smop.ops.router_network import check_modality, exact


def check(x: Tensor, logits: Tensor, modality: Tensor | None, mask: Tensor | None, w1: Tensor) -> None:
    sizes = checks.tensors(
        ("x", x, "BND"), ("router_logits", logits, "BNE"), ("modality", modality, "BN"), ("mask", mask, "BN")
    )
    checks.floating(x=x, router_logits=logits)
    checks.token_ids(modality, mask)
    E, X = sizes["E"], w1.shape[0] if w1.dim() else 0
    if X not in (E, 2 * E):
        raise ValueError(f"w1 must hold {E} or {2 * E} experts for router_logits of {E}, got {X}")
    if X != E and modality is None:
        raise ValueError(
            "modality is required where audio and video have experts each: (B, N) integer, 0 audio, 1 video"
        )
    check_modality(modality)


MAX_GROUPS = 128  # experts that every backend takes


def clips_at_once(modality: Tensor | None) -> int:
    return MAX_GROUPS if modality is None else MAX_GROUPS // 2


def merged(logits: Tensor, modality: Tensor | None, mask: Tensor | None, parameters: Experts) -> tuple[Experts, Tensor]:
    """→ the parameters of B·R MLPs (B clips, R = 2 with a modality, else 1), and each token's, (B·N, 1) int32.

    A masked token's is B·R, which skips it. A clip without tokens of a modality has MLPs of zeros there.
    """
    B, N, E = logits.shape
    R, X = 1 if modality is None else 2, parameters.w1.shape[0]
    with exact(logits):
        real = torch.ones(B, N, dtype=torch.bool, device=logits.device) if mask is None else mask
        router = real.new_zeros((B, N), dtype=torch.int64) if modality is None else modality.long()
        probs = logits.to(acc_dtype(logits.dtype)).masked_fill(~real[..., None], 0.0).softmax(-1)
        member = ((router[..., None] == torch.arange(R, device=logits.device)) & real[..., None]).to(probs.dtype)
        mean = torch.einsum("bnr,bne->bre", member, probs) / member.sum(1).clamp(min=1)[..., None]  # (B, R, E)

        def merge(p: Tensor) -> Tensor:
            share = mean.to(p.dtype)
            if X == E:
                return torch.einsum("bre,e...->br...", share, p).flatten(0, 1)
            return torch.einsum("bre,re...->br...", share, p.unflatten(0, (R, E))).flatten(0, 1)

        w1, b1, w2, b2, ln_weight, ln_bias = (None if p is None else merge(p) for p in parameters)
        assert w1 is not None and w2 is not None
    group = torch.arange(B, device=logits.device)[:, None] * R + router
    return Experts(w1, b1, w2, b2, ln_weight, ln_bias), torch.where(real, group, B * R).to(torch.int32).reshape(-1, 1)
