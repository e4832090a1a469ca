"""Parts of a recording in one pass, and the words of parts that overlap."""

import pytest

from llama_smop.data.media import read_audio, write_audio
from llama_smop.transcription.cutting import cut_prepared, cut_sound, new_words
from llama_smop.transcription.voice_activity import Span
from tests.data.recordings import numbered, numbers, record, tone

SPANS = [Span(0.0, 0.4), Span(0.32, 0.8, 0.08), Span(1.2, 2.0), Span(1.6, 9.0), Span(20.0, 21.0)]


def test_the_samples_of_every_span_are_those_of_the_recording(tmp_path):
    write_audio(tmp_path / "a.wav", tone(3, 2.5))
    whole = read_audio(tmp_path / "a.wav")
    for span, samples in zip(SPANS, cut_sound(tmp_path / "a.wav", SPANS), strict=True):
        assert samples == pytest.approx(whole[round(span.start * 16000) : round(span.end * 16000)], abs=1e-6)


def test_the_frames_of_every_span_are_those_of_the_video(tmp_path):
    record(tmp_path / "v.mp4", numbered(55))
    found = list(cut_prepared(tmp_path / "v.mp4", SPANS))
    assert found.pop() is None, "after the end there is nothing"
    for span, frames in zip(SPANS, found, strict=False):
        assert numbers(frames) == list(range(round(span.start * 25), min(55, round(span.end * 25))))


@pytest.mark.parametrize(
    ("before", "words", "new"),
    [
        ("we will see", "will see them soon", "them soon"),
        ("we will see", "see see it", "see it"),
        ("we will see", "ill see them", "them"),  # the first word was cut in half
        ("we will see", "nothing of that", "nothing of that"),
        ("no no", "no no never", "never"),
        ("", "first words", "first words"),
        ("last words", "", ""),
    ],
)
def test_what_two_pieces_both_heard_is_said_once(before, words, new):
    assert new_words(before.split(), words.split()) == new.split()
