"""Length limits by duration, and recordings longer than the window."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_smop.models.decoding import cut_at_silences, token_limits, transcribe_batch, transcribe_long
from tests.models.conftest import clip

LOUD, QUIET = 0.5, 0.001


def speech(frames: int, silences: list[int]) -> np.ndarray:
    """Noise with 0.2 s of quiet round the given video frames."""
    samples = np.random.RandomState(0).randn(frames * 640) * LOUD
    for at in silences:
        samples[(at - 3) * 640 : (at + 3) * 640] *= QUIET
    return samples.astype(np.float32)


def test_cuts_fall_into_the_silences():
    pieces = cut_at_silences(speech(200, [42, 90]), 200, longest=60)
    assert [stop for _, stop in pieces][:2] == pytest.approx([42, 90], abs=1)


def test_without_sound_pieces_are_as_long_as_they_may_be():
    assert cut_at_silences(None, 130, longest=50) == [(0, 50), (50, 100), (100, 130)]


@settings(derandomize=True, deadline=None, max_examples=40)
@given(frames=st.integers(1, 400), longest=st.integers(2, 90), seed=st.integers(0, 9), sound=st.booleans())
def test_pieces_cover_everything_once_and_fit(frames, longest, seed, sound):
    samples = np.random.RandomState(seed).randn(frames * 640 - 100) if sound else None
    pieces = cut_at_silences(samples, frames, longest)
    assert pieces[0][0] == 0
    assert pieces[-1][1] == frames
    assert all(a[1] == b[0] for a, b in pairwise(pieces))
    assert all(0 < stop - start <= longest for start, stop in pieces)


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


def test_a_long_recording_is_its_pieces_joined(model, processor):
    audio = speech(120, [44, 80])
    video = torch.randn(120, 1, 88, 88)
    pieces = list(transcribe_long(model, processor, audio=audio, video=video, pieces_at_once=2))
    assert [(p.start, p.stop) for p in pieces] == cut_at_silences(audio, 120, longest=50)
    for piece in pieces:
        sound = audio[piece.start * 640 : piece.stop * 640]
        alone = transcribe_batch(model, processor, audio=[sound], video=[video[piece.start : piece.stop]])
        assert alone == [piece.text]


def test_the_transform_sees_each_piece_raw(model, processor):
    seen = []

    def transform(audio, video):
        seen.append(len(audio))
        return audio / np.abs(audio).max(), None

    list(transcribe_long(model, processor, audio=speech(70, [40]), transform=transform))
    assert sum(seen) == 70 * 640
    assert len(seen) == 2


def test_nothing_to_transcribe_is_an_error(model, processor):
    with pytest.raises(ValueError, match="audio, video or both"):
        list(transcribe_long(model, processor))
    with pytest.raises(ValueError, match="at least 2 video frames"):
        cut_at_silences(None, 10, longest=1)
