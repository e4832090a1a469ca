"""From landmarks to the 96×96 mouth crop that published lip readers were trained on.

The reference is the preparation of auto_avsr (Ma et al., ICASSP 2023). It aligns eight of the 68 points of dlib with a
mean face in a 256×256 frame and cuts 96×96 round the mean of the twenty points of the mouth. Here landmarks of the mesh
stand in for dlib's points.
"""

import numpy as np

CROP = 96
SMOOTHING = 6  # frames on either side
# Mesh landmark → its place in the reference frame; in order dlib's points 28, 33, 36, 39, 42, 45, 48, 54.
REFERENCE = {
    197: (128.49, 106.92),
    2: (128.87, 137.30),
    33: (92.52, 94.37),
    133: (112.77, 94.94),
    362: (145.53, 94.53),
    263: (166.68, 93.57),
    61: (107.17, 157.20),
    291: (152.19, 156.99),
}
# The mouth's outline and inner lips, for dlib's points 48 to 67 (some of dlib's points share a landmark).
MOUTH = (61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181, 78, 82, 13, 312, 308, 317, 14, 87)
# The landmarks that a track keeps of each frame, and where they are in what it keeps.
KEPT = tuple(dict.fromkeys((*REFERENCE, *MOUTH)))
PLACE = {landmark: place for place, landmark in enumerate(KEPT)}
_STABLE = [PLACE[landmark] for landmark in REFERENCE]
_MOUTH = [PLACE[landmark] for landmark in MOUTH]
_TARGETS = np.array(list(REFERENCE.values()))


def smooth(points: np.ndarray) -> np.ndarray:
    """Landmarks (T, P, 2) averaged over ±min(6, t, T−1−t) frames, each frame moved back to its own mean."""
    frames = len(points)
    sums = np.concatenate([np.zeros_like(points[:1], dtype=np.float64), np.cumsum(points, axis=0, dtype=np.float64)])
    t = np.arange(frames)
    reach = np.minimum(SMOOTHING, np.minimum(t, frames - 1 - t))
    means = (sums[t + reach + 1] - sums[t - reach]) / (2 * reach + 1)[:, None, None]
    return means + (points.mean(axis=1, keepdims=True) - means.mean(axis=1, keepdims=True))


def similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The rotation, scale and shift that brings points (…, P, 2) closest to others (P, 2) in the least-squares sense,
    as (…, 2, 3).

    With points as complex numbers z → a·z + b: a = Σ conj(z − z̄)(w − w̄) / Σ |z − z̄|².
    """
    z, w = source @ (1, 1j), target @ (1, 1j)
    middle = z.mean(axis=-1)
    centred = z - middle[..., None]
    spread = (abs(centred) ** 2).sum(axis=-1)
    turn = (centred.conj() * (w - w.mean())).sum(axis=-1)
    a = np.where(spread > 0, turn / np.where(spread > 0, spread, 1), 1.0 + 0j)
    b = w.mean() - a * middle
    rows = (a.real, -a.imag, b.real), (a.imag, a.real, b.imag)
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def crop_matrices(points: np.ndarray) -> np.ndarray:
    """For every frame of a track the map from its picture to its crop, float64 (T, 2, 3).

    Args:
        points: (T, len(KEPT), 2), in pixels.
    """
    steady = smooth(points)
    matrices = similarity(steady[:, _STABLE], _TARGETS)
    mouth = steady[:, _MOUTH].mean(axis=1)
    matrices[:, :, 2] += CROP / 2 - ((matrices[:, :, :2] @ mouth[..., None])[..., 0] + matrices[:, :, 2])
    return matrices


def warp(frame: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """The crop of a picture: uint8 (96, 96, 3), black outside of it."""
    import cv2

    return cv2.warpAffine(frame, matrix, (CROP, CROP), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
