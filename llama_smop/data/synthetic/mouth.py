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
    across, down = _skin_lines(maps)
    frames = np.empty((len(parameters), CROP, CROP, 3), dtype=np.uint8)
    for t, jaw in enumerate(parameters[:, _JAW].tolist()):
        x, y = (down[t, axis][:, None] + across[t, axis] for axis in range(2))
        if jaw > 0:
            _drop_chin(x[_CHIN], y[_CHIN], jaw)
        frames[t] = cv2.remap(texture, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        mouth.paint(frames[t], t)
    return frames


def _skin_lines(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays float32 (T, 2, 96): pixel (row, column) of a crop comes from the place down[row] + across[column], x
    and y, in the skin's picture."""
    inverse = np.linalg.inv(maps[:, :, :2]) * SCALE
    offset = inverse @ maps[:, :, 2:]
    pixels = np.arange(CROP)
    across, down = inverse[:, :, :1] * pixels, inverse[:, :, 1:] * pixels - offset
    return across.astype(np.float32), down.astype(np.float32)


def _drop_chin(x: np.ndarray, y: np.ndarray, jaw: float) -> None:
    """Change the places of `_skin_lines`, in place: what is below the mouth falls with the jaw."""
    below = np.clip((y - np.float32(SCALE * (CENTRE_Y + 4))) * np.float32(1 / (30 * SCALE)), 0, 1)
    aside = (x - np.float32(SCALE * CENTRE_X)) * np.float32(1 / (48 * SCALE))
    fall = np.float32(SCALE * jaw * _FALL)
    y -= below * below * (3 - 2 * below) * (fall - (fall / 2) * aside * aside)
