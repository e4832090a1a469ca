"""From landmarks to crops, on planted landmarks."""

import numpy as np
import pytest

pytest.importorskip("cv2")

from llama_smop.data.faces.crop import Selection, _matrices, warnings
from llama_smop.data.faces.geometry import _MOUTH, CROP, PLACE, crop_matrices, similarity, smooth, warp
from tests.data.faces.planted import face, track


def rotation(degrees: float) -> np.ndarray:
    angle = np.radians(degrees)
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


@pytest.mark.parametrize(("degrees", "scale", "shift"), [(0, 1, (0, 0)), (25, 0.4, (900, 30)), (-170, 3, (-40, 500))])
def test_a_similarity_is_found_exactly_whatever_it_is(degrees, scale, shift):
    source = np.random.RandomState(0).rand(8, 2) * 100
    target = source @ (scale * rotation(degrees)).T + shift
    matrix = similarity(source, target)
    assert source @ matrix[:, :2].T + matrix[:, 2] == pytest.approx(target, abs=1e-9)


def test_the_reference_face_keeps_its_scale_and_its_mouth_is_in_the_middle():
    (matrix,) = crop_matrices(face()[None])
    assert matrix[:, :2] == pytest.approx(np.eye(2), abs=1e-9)
    mouth = face()[_MOUTH].mean(axis=0)
    assert matrix[:, :2] @ mouth + matrix[:, 2] == pytest.approx((CROP / 2, CROP / 2))
    corners = face()[[PLACE[61], PLACE[291]]]
    assert np.linalg.norm(matrix[:, :2] @ (corners[1] - corners[0])) == pytest.approx(45, abs=0.5)


def test_a_placed_scaled_and_turned_face_has_the_same_crop_points():
    still = np.repeat(face(6.0)[None], 20, axis=0)
    moved = still @ (0.7 * rotation(20)).T + np.linspace((10, 300), (90, 280), 20)[:, None]
    for points in (still, moved):
        matrices = crop_matrices(points)
        shown = np.einsum("tij,tpj->tpi", matrices[:, :, :2], points) + matrices[:, None, :, 2]
        assert shown == pytest.approx(np.einsum("ij,pj->pi", np.eye(2), shown[0])[None].repeat(20, 0), abs=1e-6)
        assert shown[:, PLACE[291], 0] - shown[:, PLACE[61], 0] == pytest.approx(45.0, abs=0.5)


def test_smoothing_keeps_each_frames_own_mean_and_removes_trembling():
    generator = np.random.RandomState(1)
    trembling = face()[None] + generator.randn(60, len(face()), 2) + np.linspace(0, 300, 60)[:, None, None]
    smoothed = smooth(trembling)
    assert smoothed.mean(axis=1) == pytest.approx(trembling.mean(axis=1))
    relative = smoothed - smoothed.mean(axis=1, keepdims=True)
    before = trembling - trembling.mean(axis=1, keepdims=True)
    assert relative[6:-6].std(axis=0).mean() < 0.4 * before.std(axis=0).mean()
    assert smoothed[0] == pytest.approx(trembling[0]), "the first frame has no neighbours before it"


def test_missing_frames_are_interpolated_and_the_ends_held():
    gap = track(10, [0.0, None, None, None, 8.0])
    gap.points[4] = gap.points[4] + (40, 0)
    filled = gap.filled_points()
    assert filled[:, PLACE[61], 0] - filled[0, PLACE[61], 0] == pytest.approx([0, 10, 20, 30, 40])
    assert gap.filled_points(12, 14) == pytest.approx(filled[2:4]), "a part is that part of the whole"
    assert gap.found == pytest.approx(0.4)


def test_the_maps_of_a_part_are_those_of_the_whole_track():
    generator = np.random.RandomState(2)
    whole = track(5, [0.0] * 80)
    whole.points = [points + generator.randn(*points.shape) for points in whole.points]
    for missing in (30, 31, 32, 50):
        whole.points[missing] = None
    every = _matrices(Selection(5, 85, whole))
    assert _matrices(Selection(30, 52, whole)) == pytest.approx(every[25:47])
    held = _matrices(Selection(0, 100, whole))
    assert (held[:5] == held[5]).all() and (held[85:] == held[84]).all(), "beyond the track its ends are held"


def test_outside_of_the_picture_a_crop_is_black():
    picture = np.full((60, 60, 3), 200, np.uint8)
    assert (warp(picture, np.array([[1.0, 0, 96], [0, 1, 0]])) == 0).all()
    assert (warp(picture, np.array([[1.0, 0, 0], [0, 1, 0]]))[:59, :59] == 200).all()


def test_what_makes_lips_hard_to_read_is_said():
    assert warnings(track(0, [5.0] * 20)) == []
    small = track(0, [5.0] * 20)
    small.points = [points * 0.4 for points in small.points]
    assert warnings(small) == ["the face is small: a mouth of 18 pixels, and 22 are needed"]
    dark = track(0, [5.0] * 20)
    dark.brightness = [20.0] * 20
    assert warnings(dark) == ["the face is dark: grey value 20 of 255"]
    aside = track(0, [5.0] * 20)
    for points in aside.points:
        points[PLACE[2]] += (40, 0)
    assert warnings(aside) == ["the face is seen from the side"]
