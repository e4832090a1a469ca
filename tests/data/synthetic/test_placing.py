"""Generated clips are placed as prepared crops are."""

import numpy as np
import pytest

pytest.importorskip("cv2")

from llama_smop.data.faces.geometry import CROP, MOUTH, PLACE
from llama_smop.data.synthetic import placing
from llama_smop.data.synthetic.articulation import PARAMETERS, articulation
from llama_smop.data.synthetic.corpus import UNSEEN_VOICES, VOICES
from llama_smop.data.synthetic.lips import lip_contours
from llama_smop.data.synthetic.speech import Segment

FACES = [voice.face for voice in (*VOICES, *UNSEEN_VOICES)]


def placed(parameters: np.ndarray, face, seed: int = 0) -> np.ndarray:
    """The drawing's landmarks in its crops, (T, landmarks, 2)."""
    contours = lip_contours(parameters.astype(np.float64), face)
    maps = placing.placements(contours, np.random.default_rng(seed))
    return placing._landmarks(contours) @ maps[:, :, :2].transpose(0, 2, 1) + maps[:, None, :, 2]


def test_a_still_mouth_is_in_the_middle_and_as_wide_as_in_published_crops():
    rest = np.zeros((30, len(PARAMETERS)))
    for face in FACES:
        points = placed(rest, face)
        mouth = points[:, [PLACE[landmark] for landmark in MOUTH]].mean(axis=1)
        assert np.abs(mouth - CROP / 2).max() < 0.5
        width = np.linalg.norm(points[:, PLACE[291]] - points[:, PLACE[61]], axis=1) / face.mouth_width
        assert width.min() > 43 and width.max() < 48


def test_the_crop_follows_the_mouth_not_the_skull():
    talk = articulation(tuple(Segment(name, 0.3 * i, 0.3 * (i + 1)) for i, name in enumerate(("A:", "m", "A:"))), 30)
    points = placed(talk, FACES[0])
    mouth = points[:, [PLACE[landmark] for landmark in MOUTH], 1].mean(axis=1)
    eyes = points[:, [PLACE[33], PLACE[263]], 1].mean(axis=1)
    assert np.abs(mouth - CROP / 2).max() < 3.5, "what is left is the smoothing over half a second"
    assert np.ptp(eyes) > 3, "an open jaw moves the mouth's middle down, so the skull goes up in the crop"


def test_the_head_neither_turns_nor_grows_in_its_crop():
    points = placed(np.zeros((60, len(PARAMETERS))), FACES[1], seed=3)
    across = points[:, PLACE[263]] - points[:, PLACE[33]]
    assert np.abs(np.degrees(np.arctan2(across[:, 1], across[:, 0]))).max() < 0.5
    assert np.ptp(np.linalg.norm(across, axis=1)) < 1
