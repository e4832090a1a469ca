from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from llama_smop.data.noise import add_noise
from llama_smop.data.transforms import AudioTransform, ClipTransform, VideoTransform, clip_rng, layer_norm, time_mask
from llama_smop.models.units import cut_or_pad
from tests.data.conftest import TRAINING
from tests.rounding import two_orders

GOLDEN = Path(__file__).parents[1] / "golden" / "transforms"
few = settings(derandomize=True, deadline=None, max_examples=30)


def assert_same_samples(ours, theirs):
    """Equal but for the sums over all samples, of a power or a mean, which both sides take pairwise."""
    allowed = two_orders(2 * round(np.log2(len(theirs)))) * np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=allowed)


def test_video_matches_the_authors():
    data = load_file(GOLDEN / "video_test.safetensors")
    frames = data["video_uint8_TCHW"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(VideoTransform()(frames), data["out"], rtol=0, atol=two_orders(4) * 4)  # up to 4 in size


def test_clean_audio_matches_the_authors():
    data = load_file(GOLDEN / "audio_test_snr_None.safetensors")
    assert_same_samples(AudioTransform()(data["speech"][:, 0]), data["out"][:, 0])


@pytest.mark.parametrize("snr", [-5, 2.5, 10, 999999])
def test_noisy_audio_matches_the_authors(snr):
    data = load_file(GOLDEN / f"audio_test_snr_{snr}.safetensors")
    noisy = add_noise(data["speech"][:, 0], data["noise_segment"][0], snr)
    assert_same_samples(noisy, data["noisy_before_norm"][:, 0])
    assert_same_samples(layer_norm(noisy), data["out"][:, 0])


def test_cut_or_pad_matches_the_authors():
    data = {name: x[:, 0] for name, x in load_file(GOLDEN / "cut_or_pad.safetensors").items()}
    np.testing.assert_array_equal(cut_or_pad(data["x"], 6), data["cut6"])
    np.testing.assert_array_equal(cut_or_pad(data["x"], 14), data["pad14"])


def runs_of_zeros(mask):
    edges = np.flatnonzero(np.diff(np.concatenate([[1], mask, [1]])))
    return [(start, end - start) for start, end in zip(edges[::2], edges[1::2], strict=True)]


@given(st.integers(1, 400), st.integers(1, 40), st.integers(1, 60), st.integers(0, 10**6))
@few
def test_time_mask_zeroes_short_stretches(length, window, stride, seed):
    ones = np.ones(length)
    masked = time_mask(ones, window, stride, np.random.default_rng(seed))
    stretches = -(-length // stride)
    assert set(np.unique(masked)) <= {0.0, 1.0}
    assert len(runs_of_zeros(masked)) <= stretches
    assert (masked == 0).sum() <= stretches * (window - 1)
    assert ones.all(), "the input was changed"


def test_time_mask_hides_as_much_as_the_authors_does():
    """Their masks are drawn otherwise, so the shares are compared, not the places."""
    theirs = load_file(GOLDEN / "adaptive_time_mask.safetensors")
    for name, window, stride in (("video_mask_10_25_T60", 10, 25), ("audio_mask_6400_16000_T20000", 6400, 16000)):
        masks = [theirs[f"{name}_seed{i}"] for i in range(4)]
        limit = -(-len(masks[0]) // stride)
        for mask in masks:
            assert len(runs_of_zeros(mask)) <= limit and (mask == 0).sum() <= limit * (window - 1)
        ours = [
            (time_mask(np.ones(len(masks[0])), window, stride, np.random.default_rng(i)) == 0).mean()
            for i in range(300)
        ]
        least, most = np.quantile(ours, (0.01, 0.99))
        assert all(least <= (mask == 0).mean() <= most for mask in masks)


def test_masked_frames_are_black_before_normalisation():
    frames = np.full((200, 96, 96, 3), 255, dtype=np.uint8)
    out = VideoTransform(train=True)(frames, np.random.default_rng(0))
    values = np.unique(np.round(out[:, 0, 0, 0], 4))
    white, black = (0.9999 - 0.421) / 0.165, -0.421 / 0.165
    np.testing.assert_allclose(values, [black, white], atol=1e-3)


def test_random_crop_moves_between_clips_and_holds_within_one():
    frames = np.broadcast_to(np.arange(96, dtype=np.uint8)[None, None, :, None], (3, 96, 96, 3)).copy()
    transform = VideoTransform(train=True, mask_window=1)
    corners = set()
    for index in range(20):
        out = transform(frames, clip_rng(0, 0, index))
        assert (out == out[:1]).all()
        corners.add(round(float(out[0, 0, 0, 0]), 4))
    assert len(corners) > 3


def test_augmentation_is_a_function_of_seed_epoch_and_index():
    frames = np.random.default_rng(0).integers(0, 255, (30, 96, 96, 3), dtype=np.uint8)
    audio = np.random.default_rng(1).standard_normal(30 * 640).astype(np.float32)
    transform = TRAINING

    def draw(*key):
        return np.concatenate([part.ravel() for part in transform(audio, frames, clip_rng(*key))])

    np.testing.assert_array_equal(draw(1, 2, 3), draw(1, 2, 3))
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        assert not np.array_equal(draw(1, 2, 3), draw(*other)), f"{other} draws what (1, 2, 3) draws"


@pytest.mark.parametrize("samples", [1, 19_000, 19_200, 25_000])
def test_audio_is_fitted_to_the_video_in_audiovisual_mode(samples):
    frames = np.zeros((30, 96, 96, 3), dtype=np.uint8)
    audio = np.random.default_rng(0).standard_normal(samples).astype(np.float32)
    both, _ = ClipTransform.testing()(audio, frames)
    assert both.shape == (19_200,)
    alone, none = ClipTransform.testing()(audio, None)
    assert alone.shape == (samples,) and none is None


@given(st.integers(1, 3000), st.floats(1e-3, 1e3), st.floats(-10, 10))
@few
def test_layer_norm_takes_away_level_and_offset(length, gain, offset):
    audio = np.random.default_rng(length).standard_normal(length)
    out = layer_norm((audio * gain + offset * gain).astype(np.float32))
    assert np.isfinite(out).all()
    assert abs(out.mean()) < 1e-3
    if length > 1 and gain > 0.1:
        assert abs(out.std() - 1) < 1e-2


def test_silence_stays_silence():
    assert not AudioTransform()(np.zeros(100, dtype=np.float32)).any()


def test_wrong_input_is_refused_with_what_was_expected():
    with pytest.raises(ValueError, match=r"expected uint8 frames \(T, H, W, 3\), got float32"):
        VideoTransform()(np.zeros((3, 96, 96, 3), dtype=np.float32))
    with pytest.raises(ValueError, match="at least 88×88"):
        VideoTransform()(np.zeros((3, 80, 96, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="mono"):
        AudioTransform()(np.zeros((10, 2), dtype=np.float32))
    with pytest.raises(ValueError, match="clip_rng"):
        AudioTransform(train=True)(np.zeros(10, dtype=np.float32))
