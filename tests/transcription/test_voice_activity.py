"""Where speech is and where it is cut, on planted probabilities and planted sound."""

from importlib.util import find_spec
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_smop.transcription.voice_activity import (
    OVERLAP_S,
    EnergyVoiceActivity,
    SileroVoiceActivity,
    Span,
    speech_pieces,
    speech_probabilities,
)

STEP_S = 512 / 16000


def planted(*parts: tuple[float, float]) -> list[float]:
    """Probabilities of (seconds, probability) parts."""
    return [p for length, p in parts for _ in range(round(length / STEP_S))]


def bounds(spans: list[Span]) -> list[tuple[float, float]]:
    return [(pytest.approx(span.start, abs=0.2), pytest.approx(span.end, abs=0.2)) for span in spans]


def test_speech_is_cut_out_of_silence():
    spans = list(speech_pieces(planted((2, 0.01), (1, 0.9), (3, 0.02), (2, 0.8), (1, 0.0)), 16))
    assert bounds(spans) == [(2, 3), (6, 8)]
    assert all(span.overlap == 0 for span in spans)


def test_short_pauses_stay_inside_and_clicks_are_no_speech():
    spans = list(speech_pieces(planted((1, 0.9), (0.6, 0.1), (1, 0.9), (4, 0.0), (0.06, 0.9), (2, 0.0)), 16))
    assert bounds(spans) == [(0, 2.6)]


def test_silence_alone_has_no_pieces():
    assert list(speech_pieces(planted((3600, 0.02)), 16)) == []
    assert list(speech_pieces([], 16)) == []


def test_long_speech_is_cut_in_its_pauses():
    talk = [(4, 0.9), (0.4, 0.1)] * 12
    spans = list(speech_pieces(planted(*talk), 10))
    assert len(spans) == 6
    for span, later in pairwise(spans):
        assert span.end - span.start <= 10
        middle = (span.end + later.start) / 2
        assert middle % 4.4 == pytest.approx(4.2, abs=0.2), "cut in a pause"
        assert later.overlap == 0


def test_speech_without_a_pause_overlaps_where_it_is_cut():
    spans = list(speech_pieces(planted((40, 0.9)), 16))
    assert spans[0].start == 0 and spans[-1].end >= 40 - STEP_S
    for span, later in pairwise(spans):
        assert later.overlap == pytest.approx(OVERLAP_S, abs=0.05)
        assert span.end - later.start >= OVERLAP_S - 0.05


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    parts=st.lists(st.tuples(st.floats(0.05, 9), st.sampled_from([0.02, 0.3, 0.6, 0.95])), max_size=14),
    longest=st.sampled_from([2.5, 4.0, 16.0]),
)
def test_pieces_fit_are_in_order_and_hold_all_speech(parts, longest):
    probabilities = planted(*parts)
    spans = list(speech_pieces(probabilities, longest))
    assert all(0 < span.end - span.start <= longest + 1e-9 for span in spans)
    assert all(a.start < b.start and a.end <= b.end for a, b in pairwise(spans))
    assert all(b.start >= a.end - 1e-9 or b.overlap > 0 for a, b in pairwise(spans))
    # Speech of half a second and more is all inside.
    run = 0
    for step, p in enumerate([*probabilities, 0.0]):
        run = run + 1 if p > 0.5 else 0
        if run * STEP_S > 0.5:
            at = (step - 5) * STEP_S
            assert any(span.start - 1e-6 <= at <= span.end + 1e-6 for span in spans), at


def noise(seconds: float, level: float, seed: int = 0) -> np.ndarray:
    return (np.random.RandomState(seed).randn(round(seconds * 16000)) * level).astype(np.float32)


def test_energy_alone_finds_what_is_loud_whatever_the_room():
    for room in (1e-4, 3e-3):
        sound = np.concatenate([noise(3, room), noise(1, 0.1), noise(3, room), noise(2, 0.1), noise(2, room)])
        spans = list(speech_pieces(speech_probabilities([sound], EnergyVoiceActivity()), 16))
        assert bounds(spans) == [(3, 4), (7, 9)]


def test_by_energy_a_clip_that_is_speech_from_end_to_end_is_heard():
    spans = list(speech_pieces(speech_probabilities([noise(2, 0.1)], EnergyVoiceActivity()), 16))
    assert bounds(spans) == [(0, 2)]
    assert list(speech_pieces(speech_probabilities([np.zeros(32000, np.float32)], EnergyVoiceActivity()), 16)) == []


def test_probabilities_do_not_depend_on_the_blocks_the_sound_comes_in():
    torch.manual_seed(0)
    sound = np.concatenate([noise(0.7, 0.1), noise(0.5, 1e-3)])
    for model in (SileroVoiceActivity, EnergyVoiceActivity):
        torch.manual_seed(0)
        whole = list(speech_probabilities([sound], model()))
        torch.manual_seed(0)
        parts = list(speech_probabilities(np.array_split(sound, 23), model()))
        assert len(whole) == len(sound) // 512 + 1
        assert parts == pytest.approx(whole, abs=1e-5)


@pytest.mark.skipif(find_spec("silero_vad") is None, reason="needs pip install --no-deps silero-vad==6.2.3")
def test_the_installed_model_hears_speech_and_not_noise():
    pytest.importorskip("espeakng_loader")
    from llama_smop.data.synthetic.corpus import VOICES, make_clip
    from llama_smop.data.synthetic.grammar import GRID

    _, said, times = make_clip(("bin", "blue", "at", "f", "two", "now"), VOICES[0], GRID, 0, 0)
    sound = np.concatenate([noise(2.5, 0.002), said, noise(2.5, 0.002)])
    spans = list(speech_pieces(speech_probabilities([sound], SileroVoiceActivity.installed()), 16))
    assert [(2.5 + times[0][1], 2.5 + times[-1][2])] == [
        (pytest.approx(span.start, abs=0.35), pytest.approx(span.end, abs=0.35)) for span in spans
    ]
