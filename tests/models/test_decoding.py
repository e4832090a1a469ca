"""Length limits by duration; tokens and scores of what is written."""

import pytest
import torch

from llama_smop.models.decoding import Written, recognise_batch, token_limits, transcribe_batch
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


def scores_of(model, processor, audio, tokens: list[int]) -> float:
    """The mean log probability of tokens, by one forward over all of them."""
    batch = processor(audio=[audio], do_normalize=False)
    prompt = batch["input_ids"].shape[1]
    batch["input_ids"] = torch.cat([batch["input_ids"], torch.tensor([tokens])], 1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    with torch.no_grad():
        logits = model(**batch).logits[0, prompt - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None]).mean().item()


@pytest.mark.parametrize("ends", [False, True], ids=["at its limit", "at a token"])
def test_scores_are_those_of_a_forward_over_the_text_and_its_end(model, processor, ends, monkeypatch):
    """In a batch whose clips end at different steps."""
    clips = [clip(20, 1)[0], clip(45, 2)[0]]

    def decoded() -> list[Written]:
        written: list[Written] = []
        recognise_batch(model, processor, audio=clips, written=written)
        return written

    end = model.config.eos_token_id
    if ends:  # an untrained model's own end comes late or never
        end = decoded()[0].tokens[2]
        monkeypatch.setattr(model.generation_config, "eos_token_id", end)
    limits = token_limits(processor(audio=clips))
    for audio, found, limit in zip(clips, decoded(), limits, strict=True):
        tokens, ended = list(found.tokens), len(found.tokens) < limit
        assert end not in tokens and len(tokens) <= limit
        assert found.avg_logprob == pytest.approx(scores_of(model, processor, audio, tokens + [end] * ended), abs=1e-4)
    assert not ends or len(decoded()[0].tokens) <= 2


def test_one_that_writes_nothing_is_scored_by_its_end(model, processor, monkeypatch):
    end = model.config.eos_token_id
    written: list[Written] = []
    texts, _ = recognise_batch(
        model, processor, audio=[clip(20, 1)[0]], written=written, forced_eos_token_id=end, max_new_tokens=1
    )
    assert texts == [""] and written[0].tokens == () and written[0].avg_logprob <= 0


def test_beams_have_no_scores_of_tokens(model, processor):
    with pytest.raises(ValueError, match="greedy decoding alone, not for 2 beams"):
        recognise_batch(model, processor, audio=[clip(20, 1)[0]], written=[], num_beams=2)
