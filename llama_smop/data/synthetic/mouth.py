"""A rendered mouth: articulation parameters → 96×96 RGB frames, 25 a second, as the face pipeline would crop them.

Skin and mouth are drawn with OpenCV straight into the crop, the mouth at twice its size.
"""

import numpy as np

from llama_smop.data.faces.geometry import CROP
from llama_smop.data.synthetic.articulation import PARAMETERS
from llama_smop.data.synthetic.face import SCALE, Face, skin_texture
from llama_smop.data.synthetic.lips import Mouth, lip_contours
from llama_smop.data.synthetic.placing import CENTRE_X, CENTRE_Y, placements

_FALL = 7.5  # of the chin under a jaw that is wide open, in units of the drawing
_CHIN = np.s_[CROP // 2 - 4 :]  # rows of a crop that may lie below the mouth's middle
_JAW = PARAMETERS.index("jaw")


def render(parameters: np.ndarray, face: Face, seed: int = 0) -> np.ndarray:
    """Frames of a face that articulates `parameters` (T, 8), uint8 (T, 96, 96, 3); the seed moves the head."""
    import cv2

    rng = np.random.default_rng([seed, 0x30])
    texture = skin_texture(face, rng)
    contours = lip_contours(parameters.astype(np.float64), face)
    maps = placements(contours, rng)
    mouth = Mouth(contours, parameters, face, maps)
    frames = np.empty((len(parameters), CROP, CROP, 3), dtype=np.uint8)
    for t, pose in enumerate(parameters):
        x, y = _skin_places(maps[t], float(pose[_JAW]))
        frames[t] = cv2.remap(texture, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        mouth.paint(frames[t], t)
    return frames


def _skin_places(placement: np.ndarray, jaw: float) -> tuple[np.ndarray, np.ndarray]:
    """Where in the skin's picture each pixel of a crop comes from, x and y float32 (96, 96): what is below the mouth
    falls with the jaw."""
    inverse = np.linalg.inv(placement[:, :2])
    offset = inverse @ placement[:, 2]
    pixels = np.arange(CROP)
    x, y = (
        np.add.outer(
            (inverse[i, 1] * pixels - offset[i]).astype(np.float32), (inverse[i, 0] * pixels).astype(np.float32)
        )
        for i in range(2)
    )
    if jaw > 0:
        below = np.clip((y[_CHIN] - np.float32(CENTRE_Y + 4)) / 30, 0, 1)
        aside = (x[_CHIN] - np.float32(CENTRE_X)) / 48
        y[_CHIN] -= below * below * (3 - 2 * below) * (jaw * _FALL - (jaw * _FALL / 2) * aside * aside)
    x *= SCALE
    y *= SCALE
    return x, y
