"""Length limits by duration."""

import pytest

from llama_smop.models.decoding import token_limits, transcribe_batch
from tests.models.conftest import clip


@pytest.mark.parametrize("beams", [1, 3])
def test_each_clip_has_its_own_limit(model, processor, beams, monkeypatch):
    """With EOS suppressed the limits show."""
    clips = [clip(20, 1)[0], clip(45, 2)[0]]
    counts = []
    monkeypatch.setattr(processor, "decode_new", lambda ids, prompt: counts.append(ids[:, prompt:]) or ["", ""])
    transcribe_batch(model, processor, audio=clips, num_beams=beams, suppress_tokens=[model.config.eos_token_id])
    limits = token_limits(processor(audio=clips))
    assert limits.tolist() == [16 + 7, 16 + 15]
    (ids,) = counts
    assert ids.shape[1] == limits.max()
    assert (ids[0, limits[0] :] == processor.tokenizer.pad_token_id).all()
    assert (ids[1] != processor.tokenizer.pad_token_id).all()
