"""A drawn head: the crop in its own pixels, placed as it is asked for."""

import numpy as np
import pytest

pytest.importorskip("cv2")

from llama_smop.data.synthetic.corpus import VOICES
from llama_smop.data.synthetic.head import CROP, FEATHER, MOUTH, SIZE, draw_head, filmed


@pytest.fixture(scope="module")
def crops():
    generator = np.random.RandomState(0)
    return generator.randint(0, 256, (3, CROP, CROP, 3), np.uint8)


def test_the_crop_stands_in_the_head_in_its_own_pixels(crops):
    heads = draw_head(crops, VOICES[0].face)
    assert heads.shape == (3, SIZE, SIZE, 3) and heads.dtype == np.uint8
    top, left = int(MOUTH[1]) - CROP // 2, int(MOUTH[0]) - CROP // 2
    margin = round(FEATHER)
    inner = slice(margin, CROP - margin)
    assert (heads[:, top : top + CROP, left : left + CROP][:, inner, inner] == crops[:, inner, inner]).all()


def test_the_head_stays_still_outside_of_the_crop(crops):
    heads = draw_head(crops, VOICES[1].face)
    assert (heads[:, : int(MOUTH[1]) - CROP // 2] == heads[:1, : int(MOUTH[1]) - CROP // 2]).all()


def test_every_speaker_has_a_face_of_its_own(crops):
    faces = [draw_head(crops[:1], voice.face)[0] for voice in VOICES[:4]]
    for a in range(4):
        for b in range(a):
            assert np.abs(faces[a].astype(int) - faces[b]).mean() > 1


def test_filmed_heads_are_where_and_as_large_as_asked(crops):
    heads = np.zeros((2, SIZE, SIZE, 3), np.uint8)
    heads[:, :4] = 255  # of which the wall takes its colour
    for scale in (0.5, 2.0):
        frames = list(filmed(heads, (700, 800), scale=scale))
        assert frames[0].shape == (700, 800, 3) and len(frames) == 2
        dark = np.argwhere(frames[0].mean(axis=2) < 60)
        assert dark.mean(axis=0) == pytest.approx((350, 400), abs=6)
        assert np.ptp(dark, axis=0) + 1 == pytest.approx((scale * SIZE,) * 2, rel=0.12)


def test_a_drifting_head_moves_to_both_sides():
    heads = np.zeros((76, SIZE, SIZE, 3), np.uint8)
    heads[:, :4] = 255
    at = [np.argwhere(f.mean(axis=2) < 60)[:, 1].mean() for f in list(filmed(heads, (320, 640), drift=0.1))[::19]]
    assert at == pytest.approx([320, 384, 320, 256], abs=8)
