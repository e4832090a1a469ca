"""CTC on a tower's tokens: an auxiliary loss for towers that are trained from scratch."""

import torch
from torch import Tensor, nn


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
