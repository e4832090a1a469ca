"""A drawn face: how a speaker looks, and the skin round the mouth."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from llama_smop.data.synthetic.placing import CENTRE_X, CENTRE_Y

SIZE = 96  # of the square that is drawn, in units of the drawing
SCALE = 1.5  # pixels of the skin's picture for a unit


@dataclass(frozen=True)
class Face:
    """A speaker's fixed appearance. Colours are RGB, 0 to 255; lengths are relative to the average."""

    skin: tuple[int, int, int]
    lips: tuple[int, int, int]
    wall: tuple[int, int, int]
    light: float  # direction of the light, radians from straight above, positive to the right
    brightness: float
    mouth_width: float
    lip_thickness: float
    face_width: float
    stubble: float


def _rgb(colour: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = (int(c) for c in colour)
    return red, green, blue


_SKINS = (
    (244, 209, 184),
    (229, 184, 151),
    (205, 153, 115),
    (172, 119, 83),
    (131, 86, 59),
    (96, 62, 45),
)
_WALLS = ((112, 128, 138), (150, 142, 128), (88, 98, 92), (168, 170, 176), (120, 104, 110), (74, 84, 104))


def draw_face(seed: int, bearded: bool = False) -> Face:
    """A face drawn at random from a seed; neighbouring seeds differ in skin."""
    rng = np.random.default_rng([seed, 0xFACE])
    skin = np.array(_SKINS[seed % len(_SKINS)], dtype=np.float64)
    rose = np.array((176, 76, 82), dtype=np.float64)
    lips = (0.50 * skin + 0.50 * rose) * rng.uniform(0.86, 0.98)
    return Face(
        skin=_rgb(skin),
        lips=_rgb(lips),
        wall=_WALLS[rng.integers(len(_WALLS))],
        light=float(rng.uniform(-0.9, 0.9)),
        brightness=float(rng.uniform(0.92, 1.06)),
        mouth_width=float(rng.uniform(0.93, 1.08)),
        lip_thickness=float(rng.uniform(0.85, 1.2)),
        face_width=float(rng.uniform(0.94, 1.06)),
        stubble=float(rng.uniform(0.3, 0.8)) if bearded else 0.0,
    )


@dataclass(frozen=True)
class _Relief:
    """What does not change with the light, over the pixels of the skin's picture, float32.

    across: from the middle, in units of the drawing. nx: of a unit normal, to the right. facing: the part of the shade
    that comes from straight above and in front. folds: added to the shade. nostrils: factor of the shade. beard: how
    dense it is. face, neck: how far a pixel belongs to them (n, n, 1).
    """

    across: np.ndarray
    nx: np.ndarray
    facing: np.ndarray
    folds: np.ndarray
    nostrils: np.ndarray
    beard: np.ndarray
    face: np.ndarray
    neck: np.ndarray

    @classmethod
    @lru_cache(maxsize=32)
    def of(cls, face_width: float) -> "_Relief":
        n = round(SIZE * SCALE)
        y, x = np.mgrid[0:n, 0:n].astype(np.float32) / np.float32(SCALE)
        dx, dy = (x - CENTRE_X) / face_width, y - CENTRE_Y
        nx, ny = dx / 58.0, (y - 30.0) / 84.0
        nz = np.sqrt(np.maximum(1.0 - nx * nx - ny * ny, 0.05))
        folds = np.linspace(0, 1, 14)  # from the wings of the nose to beside the mouth
        # Face outline: an ellipse down to the chin; behind it the neck, and behind that the wall.
        outline = np.sqrt((dx / 43.0) ** 2 + ((y - 22.0) / 66.0) ** 2)
        inside = np.clip((1.0 - outline) * 22.0 + 0.5, 0, 1)[..., None]
        return cls(
            across=dx,
            nx=nx,
            facing=nz * 0.9 - ny * 0.35,
            folds=_blobs(
                n,
                *_pair(0.07, 27, 30, 12, 12),  # cheeks
                (0.08, 0, 80, 9, 6),  # chin
                (0.10, 0, 25, 7, 8),  # nose
                (-0.15, 0, 66, 12, 3.2),  # under the lip
                (-0.10, 0, 36.5, 10, 2.6),  # under the nose
                (-0.05, 0, 40, 1.6, 3),  # philtrum
                *_pair(0.03, 3.6, 40, 1.6, 3),
                *(blob for fold in folds for blob in _pair(-0.022, 13.5 + 12.5 * fold**1.3, 32 + 16 * fold, 2.2, 3.0)),
                *_pair(-0.13, 10.5, 30, 2.0, 4.5),  # wings of the nose
            ),
            nostrils=1 - 0.72 * np.clip(_blobs(n, *_pair(1.3, 5.2, 33.2, 2.6, 1.5)), 0, 1),
            beard=np.clip(_blobs(n, (1, 0, 76, 34, 22), (0.8, 0, 40, 20, 4), *_pair(1, 34, 60, 12, 22)), 0, 1),
            face=inside * inside * (3 - 2 * inside),
            neck=(np.clip((27.0 - np.abs(dx) + 0.05 * dy) / 2.0, 0, 1) * np.clip((y - 58) / 4, 0, 1))[..., None],
        )


def skin_texture(face: Face, rng: np.random.Generator) -> np.ndarray:
    """The face without its mouth, uint8 (144, 144, 3)."""
    import cv2

    relief = _Relief.of(face.face_width)
    n = len(relief.across)
    y = (np.arange(n, dtype=np.float32) / np.float32(SCALE))[:, None]
    sideways = float(np.sin(face.light))
    shade = 0.42 + 0.60 * (relief.nx * (sideways * 0.75) + relief.facing) + relief.folds
    shade *= relief.nostrils
    skin = np.array(face.skin, dtype=np.float32)
    image = skin * shade[..., None]
    if face.stubble:
        grain = rng.standard_normal((n, n), dtype=np.float32)
        beard = relief.beard * (0.30 + 0.05 * cv2.GaussianBlur(grain, (3, 3), 0)) * np.float32(face.stubble)
        image += beard[..., None] * (np.array((62, 56, 56), dtype=np.float32) - image)
    mottle = cv2.GaussianBlur(rng.standard_normal((n, n), dtype=np.float32), (0, 0), 2.5 * SCALE)
    grain = rng.standard_normal((n, n), dtype=np.float32)
    image *= (1 + np.float32(0.10) * mottle + np.float32(0.008) * grain)[..., None]

    dx = relief.across
    neck_shade = 0.50 + 0.16 * np.clip((y - 80) / 16, 0, 1) - 0.010 * np.abs(dx) + 0.004 * sideways * dx
    neck = skin * np.clip(neck_shade, 0.15, 1)[..., None]
    light = 0.80 + 0.15 * (1 - y / SIZE) + (0.001 * face.light * face.face_width) * dx
    wall = np.array(face.wall, dtype=np.float32) * light[..., None]
    behind = wall + relief.neck * (neck - wall)
    image = behind + relief.face * (image - behind)
    return np.clip(image * face.brightness, 0, 255).astype(np.uint8)


_Blob = tuple[float, float, float, float, float]


def _pair(weight: float, x: float, y: float, width: float, height: float) -> tuple[_Blob, _Blob]:
    """A blob on either side of the face."""
    return (weight, -x, y, width, height), (weight, x, y, width, height)


def _blobs(n: int, *blobs: _Blob) -> np.ndarray:
    """Sum of soft spots, float32 (n, n): each its weight, place from the middle, height in the drawing, half widths."""
    weight, x, y, width, height = np.array(blobs, dtype=np.float32)[..., None].transpose(1, 0, 2)
    at = np.arange(n, dtype=np.float32) / np.float32(SCALE)
    rows, columns = np.exp(-(((at - y) / height) ** 2)), np.exp(-(((at - CENTRE_X - x) / width) ** 2))
    return (weight * rows).T @ columns
