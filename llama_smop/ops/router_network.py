"""Logits of routers that are more than one product: with a hidden layer, a bias, noise in training."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_smop.ops import checks
from llama_smop.ops.backend import acc_dtype
from llama_smop.ops.operator import is_plain


def exact(like: Tensor) -> AbstractContextManager:
    """Without autocast, where `like`'s device has it: sums over tokens and counts of them are float32 or better."""
    known = like.device.type in ("cpu", "cuda")
    return torch.autocast(like.device.type, enabled=False) if known else nullcontext()


def check_modality(modality: Tensor | None) -> None:
    """Raise IndexError for a modality other than 0 and 1, where values may be read and there are any."""
    if modality is not None and is_plain((modality,)):
        checks.in_range("modality", modality, 0, 1)


def router_logits(
    x: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    hidden_weight: Tensor | None,
    hidden_bias: Tensor | None,
    modality: Tensor | None,
    jitter: float = 0.0,
) -> Tensor:
    """Logits (..., E) of each token's own router, in float32 (float64 for float64 x).

        logits = G · relu(W x + b) + c, or G · x + c without a hidden layer;  with jitter ε times U(1 − ε, 1 + ε)

    Args:
        x: (..., D).
        gate_weight: G (R, E, D), or (R, E, Q) after a hidden layer.  gate_bias: c (R, E) or None.
        hidden_weight, hidden_bias: W (R, Q, D) and b (R, Q), or None.
        modality: (...) integer, the router of each token; None with one router.
    """
    R, E, _ = gate_weight.shape
    rows = x[..., None, :]
    if hidden_weight is not None and hidden_bias is not None:
        rows = F.relu(F.linear(x, hidden_weight.flatten(0, 1), hidden_bias.flatten())).unflatten(-1, (R, -1))
    acc = acc_dtype(x.dtype)
    with exact(x):  # a routing must not turn on the low bits of 16
        logits = torch.einsum("...rd,red->...re", rows.to(acc).expand(*x.shape[:-1], R, -1), gate_weight.to(acc))
        if gate_bias is not None:
            logits = logits + gate_bias.to(acc)
        if R == 1:
            logits = logits[..., 0, :]
        elif modality is None:
            raise ValueError("modality is required with two routers: an integer for each token, 0 audio, 1 video")
        else:
            check_modality(modality)
            own = modality.long()[..., None, None].expand(*modality.shape, 1, E)
            logits = logits.gather(-2, own)[..., 0, :]
        if jitter:
            logits = logits * torch.empty_like(logits).uniform_(1 - jitter, 1 + jitter)
    return logits
