"""Where a drawn face lies in its crop: what the face pipeline would cut out of a film of it.

The drawing has its own landmarks. They sway with the head and go through the geometry of the prepared crops, so that
generated clips and crops of films show a mouth at the same place and of the same size.
"""

import numpy as np

from llama_smop.data.faces.geometry import KEPT, crop_matrices
from llama_smop.models.units import VIDEO_RATE

CENTRE_X, CENTRE_Y = 48.0, 50.0  # of the closed mouth in the drawing
ZOOM = 1.3  # pixels of a crop for a unit of the drawing
# Places of the landmarks that do not move with the mouth, in pixels of a crop from the closed mouth.
EYE_Y, EYE_X, EYE_HALF = -63.0, 26.0, 11.8
NOSE_Y, BRIDGE_Y = -20.0, -50.0
_STILL = {
    33: (-EYE_X - EYE_HALF, EYE_Y),
    133: (-EYE_X + EYE_HALF, EYE_Y),
    362: (EYE_X - EYE_HALF, EYE_Y),
    263: (EYE_X + EYE_HALF, EYE_Y),
    197: (0.0, BRIDGE_Y),
    2: (0.0, NOSE_Y),
}
# Landmark → the line of the lips it is on, and where on it, from −1 at the left corner to 1 at the right.
_ON_LIPS = {
    61: ("outer_top", -1.0),
    39: ("outer_top", -0.6),
    37: ("outer_top", -0.25),
    0: ("outer_top", 0.0),
    267: ("outer_top", 0.25),
    269: ("outer_top", 0.6),
    291: ("outer_top", 1.0),
    405: ("outer_bottom", 0.6),
    314: ("outer_bottom", 0.3),
    17: ("outer_bottom", 0.0),
    84: ("outer_bottom", -0.3),
    181: ("outer_bottom", -0.6),
    78: ("inner_top", -1.0),
    82: ("inner_top", -0.4),
    13: ("inner_top", 0.0),
    312: ("inner_top", 0.4),
    308: ("inner_top", 1.0),
    317: ("inner_bottom", 0.4),
    14: ("inner_bottom", 0.0),
    87: ("inner_bottom", -0.4),
}


def placements(contours: dict[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """For every frame the map from the drawing to its crop, float64 (T, 2, 3), with the head swaying as `rng` draws it.

    contours: the lip lines of `mouth`, each (T, P, 2), in units of the drawing.
    """
    points = _landmarks(contours)
    motion = _head_motion(len(points), rng)
    filmed = points @ motion[:, :, :2].transpose(0, 2, 1) + motion[:, None, :, 2]
    crop = crop_matrices(filmed)
    return np.concatenate([crop[:, :, :2] @ motion[:, :, :2], crop @ _with_one(motion[:, :, 2])], axis=2)


def _with_one(vectors: np.ndarray) -> np.ndarray:
    return np.concatenate([vectors, np.ones_like(vectors[:, :1])], axis=1)[..., None]


def _landmarks(contours: dict[str, np.ndarray]) -> np.ndarray:
    """The landmarks of the drawing in the order of KEPT, (T, len(KEPT), 2)."""
    frames, count = contours["outer_top"].shape[:2]
    points = np.empty((frames, len(KEPT), 2))
    for place, landmark in enumerate(KEPT):
        if landmark in _STILL:
            points[:, place] = np.array(_STILL[landmark]) / ZOOM + (CENTRE_X, CENTRE_Y)
        else:
            line, across = _ON_LIPS[landmark]
            points[:, place] = contours[line][:, round((across + 1) / 2 * (count - 1))]
    return points


def _head_motion(n_frames: int, rng: np.random.Generator) -> np.ndarray:
    """Slow sway of the head: affine matrices (T, 2, 3) from the drawing to a film of it."""
    t = np.arange(n_frames) / VIDEO_RATE
    sway = np.zeros((4, n_frames))
    for row, size in enumerate((1.1, 0.8, 1.3, 0.010)):  # pixels, pixels, degrees, relative scale
        for _ in range(2):
            sway[row] += size / 2 * np.sin(2 * np.pi * (rng.uniform(0.15, 0.6) * t + rng.uniform()))
        sway[row] += size * rng.uniform(-1, 1)
    angle, scale = np.deg2rad(sway[2]), ZOOM * (1 + sway[3])
    c, s = scale * np.cos(angle), scale * np.sin(angle)
    matrices = np.empty((n_frames, 2, 3))
    matrices[:, 0] = np.stack([c, -s, sway[0] - c * CENTRE_X + s * CENTRE_Y], axis=-1)
    matrices[:, 1] = np.stack([s, c, sway[1] - s * CENTRE_X - c * CENTRE_Y], axis=-1)
    return matrices
