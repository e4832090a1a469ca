"""CTC on a tower's tokens: an auxiliary loss for towers that are trained from scratch."""

from typing import Any

import torch
from torch import Tensor, nn

from llama_smop.models.rates import Rate
from llama_smop.models.units import STREAMS


def ctc_head(config: Any, modality: str, rate: Rate) -> str:
    """The name of the head for a modality's tokens: one for all rates, or one for each where their widths differ."""
    widths = {config.token_features_at(known)[modality] for known in config.known_rates}
    return modality if len(widths) == 1 else f"{modality}_{rate[STREAMS.index(modality)]}"


def ctc_loss(logits: Tensor, mask: Tensor, labels: Tensor, *, blank: int, ignored: tuple[int, ...]) -> Tensor:
    """Mean over clips of CTC per text token (Graves et al. 2006).

    Args:
        logits: (B, S, vocabulary), any float dtype; computed in float32.
        mask: (B, S) bool, True = real token, real tokens first.
        labels: (B, L); ids in `ignored` are no targets.
        blank: the id that stands for "no token"; must not occur in a text.
    """
    keep = torch.ones_like(labels, dtype=torch.bool)
    for token in ignored:
        keep &= labels != token
    # Stable: kept labels move to the front in their order.
    order = torch.sort((~keep).to(torch.int8), dim=1, stable=True).indices
    targets = labels.gather(1, order).clamp(min=0)
    log_probs = logits.float().log_softmax(-1).transpose(0, 1)
    return nn.functional.ctc_loss(
        log_probs, targets, mask.sum(1), keep.sum(1), blank=blank, reduction="mean", zero_infinity=True
    )
