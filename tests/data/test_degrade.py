"""Each degradation does what its amount says, to any kind of frames, and the same for the same seed."""

import numpy as np
import pytest

from llama_smop.data.degrade import KINDS, Degradation, degrade

EXAMPLES = ("blur:3", "occlude:0.3", "drop:0.2", "jitter:2", "fps:10")


def textured(frames: int = 20, colours: bool = True) -> np.ndarray:
    shape = (frames, 40, 48, 3) if colours else (frames, 40, 48)
    return np.random.RandomState(0).randint(1, 255, shape).astype(np.uint8)


@pytest.mark.parametrize("text", EXAMPLES)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
@pytest.mark.parametrize("colours", [True, False])
def test_shape_and_kind_of_frames_are_kept_and_the_seed_decides(text, dtype, colours):
    frames = textured(colours=colours).astype(dtype)
    before = frames.copy()
    worse = degrade(frames, text, seed=1)
    assert worse.shape == frames.shape and worse.dtype == dtype
    assert (frames == before).all(), "the frames handed in were written to"
    assert (worse != frames).any()
    assert (worse == degrade(frames, text, seed=1)).all()
    assert str(Degradation.parse(text)) == text
    if text.split(":")[0] not in ("blur", "fps"):
        assert (worse != degrade(frames, text, seed=2)).any(), "another seed draws something else"


@pytest.mark.parametrize("text", ["blur:0", "occlude:0", "drop:0", "jitter:0", "fps:25"])
def test_the_least_amount_changes_nothing(text):
    assert (degrade(textured(), text) == textured()).all()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("frames", [0, 1])
def test_clips_of_a_frame_and_of_none_are_taken_at_both_bounds(name, frames):
    for amount in (KINDS[name].low, KINDS[name].high):
        assert degrade(textured(frames), f"{name}:{amount:g}").shape == (frames, 40, 48, 3)


def test_blur_spreads_a_point_over_its_standard_deviation():
    frames = np.zeros((1, 61, 61), np.float32)
    frames[0, 30, 30] = 1
    spread = degrade(frames, "blur:4")[0]
    assert spread.sum() == pytest.approx(1, abs=1e-5)
    away = np.arange(61) - 30
    assert np.sqrt((spread.sum(axis=0) * away**2).sum()) == pytest.approx(4, rel=0.02)
    flat = np.full((2, 30, 30), 77, np.uint8)
    assert (degrade(flat, "blur:6") == 77).all(), "neither the edges nor the rounding change what is even"


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_an_occlusion_covers_its_share_in_one_place(share):
    frames = textured()
    worse = degrade(frames, f"occlude:{share}", seed=3)
    covered = (worse != frames).any(axis=-1)
    always = covered.mean(axis=0) > 0.9
    assert always.mean() == pytest.approx(share, abs=0.03)
    assert not covered[:, ~always].any()
    assert worse.mean() == pytest.approx(frames.mean(), abs=3), "the picture is as bright as before"


def test_dropped_frames_are_black_and_as_many_as_asked_for():
    worse = degrade(textured(50), "drop:0.3", seed=2)
    gone = (worse == 0).all(axis=(1, 2, 3))
    assert gone.sum() == 15
    assert (worse[~gone] == textured(50)[~gone]).all()


def test_jitter_shifts_each_frame_by_its_own_whole_pixels():
    frames = np.zeros((400, 41, 41), np.uint8)
    frames[:, 20, 20] = 255
    found = np.argwhere(degrade(frames, "jitter:2.5", seed=4))
    shifts = found[:, 1:] - 20
    assert len(found) == 400 and list(found[:, 0]) == list(range(400))
    assert shifts.std(axis=0) == pytest.approx([2.5, 2.5], rel=0.15)
    assert abs(shifts.mean(axis=0)).max() < 0.5
    still = np.full((5, 20, 20), 9, np.uint8)
    assert (degrade(still, "jitter:30") == 9).all(), "the edges are held"


@pytest.mark.parametrize(
    ("rate", "shown"),
    [("12.5", [0, 0, 2, 2, 4, 4]), ("10", [0, 0, 0, 3, 3, 5, 5, 5, 8, 8, 10]), ("1", [0] * 25 + [25])],
)
def test_fewer_frames_a_second_hold_each_until_the_next(rate, shown):
    frames = np.arange(len(shown), dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), np.uint8)
    assert degrade(frames, f"fps:{rate}")[:, 0, 0].tolist() == shown


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("smear:3", "expected a degradation of blur, occlude, drop, jitter, fps, as in blur:3, got 'smear:3'"),
        ("", "expected a degradation of"),
        ("blur", "blur takes a standard deviation in pixels, from 0 to 48, as in blur:12, got 'blur'"),
        ("blur:much", "got 'blur:much'"),
        ("blur:-1", "from 0 to 48, got -1.0"),
        ("blur:1e9", "from 0 to 48"),
        ("drop:nan", "drop takes a share of the frames, from 0 to 1, got nan"),
        ("occlude:30", "occlude takes a share of the picture, from 0 to 1, got 30.0"),
        ("fps:0", "fps takes frames a second, from 1 to 25, got 0.0"),
        ("fps:inf", "got inf"),
    ],
)
def test_what_cannot_be_meant_is_an_error_that_says_what_can(text, reason):
    with pytest.raises(ValueError) as raised:
        degrade(textured(), text)
    assert reason in str(raised.value) and "\n" not in str(raised.value)


def test_other_frames_are_refused():
    for frames in (np.zeros((4, 4)), np.zeros((2, 4, 4), np.int64)):
        with pytest.raises(ValueError, match="expected uint8 or float frames"):
            degrade(frames, "blur:1")
