import resource
import sys
from itertools import pairwise

import numpy as np
import pytest

from llama_smop.data.synthetic.corpus import GRID, UNSEEN_VOICES, VOICES
from llama_smop.data.synthetic.speech import SpeechError, speak

SENTENCE = "bin blue at f two now"


def test_a_sentence_sounds_the_same_whatever_was_said_before():
    first = speak(SENTENCE)
    for voice in VOICES + UNSEEN_VOICES:
        speak("place red with q nine soon", voice.espeak, words_per_minute=200, pitch=70)
    again = speak(SENTENCE)
    np.testing.assert_array_equal(first.samples, again.samples)
    assert first.phonemes == again.phonemes


@pytest.mark.parametrize("voice", VOICES + UNSEEN_VOICES, ids=lambda v: v.name)
def test_every_voice_of_the_corpus_is_reproducible(voice):
    first = speak(SENTENCE, voice.espeak)
    junk = [np.random.default_rng(i).random(1000 * i) for i in range(1, 20)]  # moves the heap about
    del junk[::2]
    np.testing.assert_array_equal(first.samples, speak(SENTENCE, voice.espeak).samples)


def test_times_are_in_order_and_within_the_sound():
    speech = speak(SENTENCE)
    end = len(speech.samples) / speech.rate
    assert [word.name for word in speech.words] == SENTENCE.split()
    for track in (speech.phonemes, speech.words):
        assert track[0].start >= 0 and track[-1].end <= end + 1e-9
        for one, following in pairwise(track):
            assert one.start <= one.end <= following.start + 1e-9
    assert 1.0 < end < 2.0


def test_rate_and_pitch_are_heard():
    slow, fast = (speak(SENTENCE, words_per_minute=rate) for rate in (120, 220))
    assert len(slow.samples) > 1.3 * len(fast.samples)

    def pitch(speech):
        vowel = next(p for p in speech.phonemes if p.name.strip("'") == "u:")
        x = speech.samples[int(vowel.start * speech.rate) : int(vowel.end * speech.rate)].astype(float)
        correlation = np.correlate(x, x, "full")[len(x) - 1 :]
        return speech.rate / (50 + np.argmax(correlation[50:400]))

    assert pitch(speak(SENTENCE, pitch=80)) > 1.3 * pitch(speak(SENTENCE, pitch=20))


def said(word):
    """The phonemes of a word in a sentence, without stress."""
    speech = speak(f"set blue {GRID.as_spoken([word])} now")
    span = speech.words[2]
    inside = [p for p in speech.phonemes if span.start - 1e-6 <= p.start < span.end - 1e-6]
    return tuple(p.name.strip("',") for p in inside if p.name != "_")


def test_letters_are_said_as_letters_and_no_two_alike():
    letters = dict(GRID.slots)["letter"]
    sounds = {letter: said(letter) for letter in letters}
    assert sounds["a"] == ("eI",), "'a' as in 'at a two' must not be a schwa"
    assert sounds["i"] == ("aI",)
    assert len(set(sounds.values())) == len(letters), sounds


def test_unknown_voice_and_empty_text():
    for voice in ("klingon", "gmw/en-US+worf", ""):
        with pytest.raises(SpeechError, match="has no voice"):
            speak(SENTENCE, voice)
    with pytest.raises(SpeechError, match="said nothing"):
        speak("")


def test_without_the_extra_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(SpeechError, match=r"llama-smop\[corpus\]"):
        speak(SENTENCE)


def test_reloading_the_library_leaks_nothing_to_speak_of():
    speak(SENTENCE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(100):
        speak(SENTENCE)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000, "100 sentences took over 20 MB"
