"""Router entropy: what it is by definition, and what it leaves out."""

from math import log

import pytest
import torch

from llama_smop.models.outputs import router_entropy


def test_entropy_is_in_nats_by_modality_over_real_tokens():
    logits = torch.zeros(2, 5, 4)
    logits[:, 3:] = torch.tensor([100.0, 0, 0, 0])  # video tokens are sure of their expert
    logits[1, 3] = torch.tensor([0.0, 0, -100, -100])  # but one, of two
    logits[0, 0] = torch.tensor([100.0, 0, 0, 0])
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 0] = False  # padding
    audio, video = router_entropy(logits, mask, audio_tokens=3).tolist()
    assert audio == pytest.approx(log(4)), "uniform over four"
    assert video == pytest.approx(log(2) / 4), "one of four tokens wavers between two"


def test_a_modality_without_tokens_has_no_entropy():
    logits, mask = torch.zeros(1, 3, 2), torch.ones(1, 3, dtype=torch.bool)
    assert router_entropy(logits, mask, audio_tokens=0).isnan().tolist() == [True, False]
    assert router_entropy(logits, mask & False, audio_tokens=1).isnan().all()
