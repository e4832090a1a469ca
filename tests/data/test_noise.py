import logging

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_smop.data.lrs3 import read_labels
from llama_smop.data.media import MediaError
from llama_smop.data.noise import RECIPE_SNRS, Babble, Noise, NoiseFile, add_noise

few = settings(derandomize=True, deadline=None, max_examples=40)


def babble(root, speakers: int) -> Babble:
    return Babble([clip.video_path(root) for clip in read_labels(root, "train.csv")], speakers)


def measured_snr(clean, noisy):
    noise = noisy.astype(np.float64) - clean
    return 10 * np.log10(np.sum(clean.astype(np.float64) ** 2) / np.sum(noise**2))


@given(st.floats(-15, 30), st.integers(1, 4000), st.floats(1e-3, 10), st.integers(0, 10**6))
@few
def test_the_ratio_is_the_one_asked_for(snr, length, level, seed):
    rng = np.random.default_rng(seed)
    clean = rng.standard_normal(length).astype(np.float32)
    noise = (level * rng.standard_normal(length)).astype(np.float32)
    assert measured_snr(clean, add_noise(clean, noise, snr)) == pytest.approx(snr, abs=0.02)


def test_zero_decibels_means_zero_decibels():
    rng = np.random.default_rng(0)
    clean, noise = rng.standard_normal((2, 16000)).astype(np.float32)
    assert measured_snr(clean, add_noise(clean, 7 * noise, 0)) == pytest.approx(0, abs=1e-4)


def test_silence_makes_no_noise_and_no_nan():
    clean = np.ones(10, dtype=np.float32)
    np.testing.assert_array_equal(add_noise(clean, np.zeros(10, dtype=np.float32), 0), clean)
    assert not add_noise(np.zeros(10, dtype=np.float32), clean, 0).any()


def test_noise_of_another_length_is_refused():
    with pytest.raises(ValueError, match="noise of the audio's shape"):
        add_noise(np.ones(10), np.ones(9), 0)


@pytest.mark.parametrize("seconds", [0.01, 1.0, 5.0])
def test_a_noise_file_of_any_length_and_rate_fills_the_clip(tmp_path, seconds):
    recording = np.random.default_rng(0).standard_normal(max(1, round(8000 * seconds))) * 0.1
    soundfile.write(tmp_path / "noise.wav", recording, 8000)
    source = NoiseFile(tmp_path / "noise.wav")
    stretches = [source.sample(20_000, np.random.default_rng(i)) for i in (0, 0, 1)]
    assert all(len(s) == 20_000 and s.std() > 0.01 for s in stretches)
    np.testing.assert_array_equal(stretches[0], stretches[1])
    assert not np.array_equal(stretches[0], stretches[2])


def test_a_missing_noise_file_is_named(tmp_path):
    with pytest.raises(MediaError, match=r"cafe\.wav: no such file"):
        NoiseFile(tmp_path / "cafe.wav")


def test_babble_is_many_voices_and_repeatable(small_corpus):
    source = babble(small_corpus, speakers=5)
    first, again, other = (source.sample(32_000, np.random.default_rng(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    # One voice pauses and is silent there; five together hardly are.
    level = lambda x: np.sqrt(np.mean(x.reshape(-1, 320) ** 2, axis=1))  # noqa: E731
    alone = Babble(
        [clip.video_path(small_corpus) for clip in read_labels(small_corpus, "train.csv")], speakers=1
    ).sample(32_000, np.random.default_rng(0))
    assert np.quantile(level(first), 0.1) / level(first).mean() > np.quantile(level(alone), 0.1) / level(alone).mean()


class White:
    def sample(self, samples, rng):
        return rng.standard_normal(samples).astype(np.float32)


def test_babble_does_without_a_clip_that_cannot_be_read(tmp_path, caplog):
    """It is no fault of the clip that the noise is for; the bad one is named once, and noise there is."""
    good, bad = tmp_path / "good.wav", tmp_path / "bad.wav"
    soundfile.write(good, np.random.default_rng(0).standard_normal(8000).astype(np.float32) / 10, 16000)
    bad.write_bytes(good.read_bytes()[:30])
    babble = Babble([good, bad])
    with caplog.at_level(logging.WARNING):
        noise = [babble.sample(16000, np.random.default_rng(seed)) for seed in range(4)]
    assert all(part.std() > 0 for part in noise)
    assert len([r for r in caplog.records if f"{bad}: " in r.getMessage() and "takes its place" in r.getMessage()]) == 1
    with pytest.raises(MediaError, match=rf"^{bad}: this clip and the next 10 cannot be read"):
        Babble([bad]).sample(16000, np.random.default_rng(0))


def test_snrs_are_drawn_from_the_list_and_none_is_clean():
    clean = np.random.default_rng(9).standard_normal(8000).astype(np.float32)
    noise = Noise(White(), RECIPE_SNRS)
    heard = set()
    for i in range(200):
        noisy = noise(clean, np.random.default_rng(i))
        heard.add(None if noisy is clean else round(measured_snr(clean, noisy)))
    assert heard == set(RECIPE_SNRS)


def test_noise_needs_a_ratio():
    with pytest.raises(ValueError, match="at least one SNR"):
        Noise(White(), ())
    with pytest.raises(ValueError, match="at least one speaker"):
        Babble(["a.wav"], speakers=0)
