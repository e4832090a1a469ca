"""A whole head round a rendered mouth, for videos as a camera would take them: eyes, hair, neck, shoulders, a room."""

from collections.abc import Iterator

import numpy as np

from llama_smop.data.synthetic.face import Face
from llama_smop.data.synthetic.placing import EYE_HALF, EYE_X, EYE_Y

SIZE = 288  # of the square that the head is drawn in
MOUTH = (144.0, 186.0)  # where the middle of the mouth crop is
CROP = 96
LOWER = 2.0  # pixels that face meshes take drawn eyes to be lower than they are
FEATHER = 10.0  # pixels over which the crop fades into the head
_SCALE = 2  # drawn at twice the size


def draw_head(crops: np.ndarray, face: Face) -> np.ndarray:
    """Mouth crops uint8 (T, 96, 96, 3) → heads uint8 (T, 288, 288, 3), the crops in their own pixels."""
    still = _still_head(face)
    y, x = np.mgrid[0:CROP, 0:CROP].astype(np.float32)
    edge = np.clip(np.minimum(np.minimum(x, CROP - 1 - x), np.minimum(y, CROP - 1 - y)) / FEATHER, 0, 1)
    weight = (edge * edge * (3 - 2 * edge))[..., None]
    left, top = (int(v) - CROP // 2 for v in MOUTH)
    heads = np.repeat(still[None], len(crops), axis=0)
    view = heads[:, top : top + CROP, left : left + CROP]
    view[:] = view * (1 - weight) + crops * weight
    return heads


def draw_room(size: tuple[int, int], wall: np.ndarray, seed: int = 0) -> np.ndarray:
    """What is behind a person, out of focus, uint8 (height, width, 3): pictures and shelves on a wall, to both sides.

    wall: its colour, RGB.
    """
    import cv2

    rng = np.random.default_rng([seed, 0x400])
    height, width = size
    room = np.ones((height, width, 1), np.float32) * wall * np.linspace(1.05, 0.85, height)[:, None, None]
    for number in range(12):
        middle = width * (rng.uniform(-0.05, 0.16) if number % 2 else rng.uniform(0.84, 1.05))
        half, top, tall = rng.uniform(0.02, 0.1) * width, rng.uniform(0, 0.9) * height, rng.uniform(0.04, 0.3) * height
        left, right, bottom = (max(0, int(edge)) for edge in (middle - half, middle + half, top + tall))
        room[int(top) : bottom, left:right] = wall * rng.uniform(0.6, 1.25) + rng.uniform(-18, 18, 3)
    return np.clip(cv2.GaussianBlur(room, (0, 0), height / 120), 0, 255).astype(np.uint8)


def filmed(
    heads: np.ndarray,
    size: tuple[int, int],
    scale: float = 1.0,
    angle: float = 0.0,
    drift: float = 0.0,
    room: int | None = None,
) -> Iterator[np.ndarray]:
    """Frames uint8 (height, width, 3) that show the heads scaled, turned and moving over a plain wall, or a room.

    Args:
        size: height and width. scale: of the head. angle: degrees, counterclockwise.
        drift: how far the head moves to either side, as a share of the width. room: the seed of what is
            on the wall.
    """
    import cv2

    height, width = size
    wall = heads[0, :4].mean(axis=(0, 1))
    y = np.linspace(1.05, 0.85, height)[:, None, None]
    background = np.clip(wall * y, 0, 255).astype(np.uint8) * np.ones((1, width, 1), np.uint8)
    if room is not None:
        background = draw_room(size, wall, room)
    square = np.zeros((SIZE, SIZE), np.float32)
    square[6:-6, 6:-6] = 1
    inside = np.asarray(cv2.GaussianBlur(square, (0, 0), 3))
    for t, head in enumerate(heads):
        matrix = cv2.getRotationMatrix2D((SIZE / 2, SIZE / 2), angle, scale)
        sway = drift * width * np.sin(2 * np.pi * t / 75)
        matrix[:, 2] += np.array((width / 2 - SIZE / 2 + sway, height / 2 - SIZE / 2))
        # A large picture made small is averaged first, as a camera does.
        source, weight = head, inside
        if scale < 0.7:
            blur = 0.4 / scale
            source = np.asarray(cv2.GaussianBlur(head, (0, 0), blur))
            weight = np.asarray(cv2.GaussianBlur(inside, (0, 0), blur))
        picture = cv2.warpAffine(source, matrix, (width, height), borderMode=cv2.BORDER_REPLICATE)
        share = cv2.warpAffine(weight, matrix, (width, height))[..., None]
        yield (picture * share + background * (1 - share)).round().astype(np.uint8)


def _still_head(face: Face) -> np.ndarray:
    """The head without its mouth, uint8 (288, 288, 3)."""
    import cv2

    y, x = np.mgrid[0 : SIZE * _SCALE, 0 : SIZE * _SCALE].astype(np.float32) / _SCALE
    cx, cy = MOUTH[0], MOUTH[1] - 37
    skin = np.array(face.skin, np.float32)
    hair = np.array((58, 44, 36) if face.skin[0] > 120 else (26, 22, 22), np.float32)
    image = np.array(face.wall, np.float32) * (0.78 + 0.2 * (1 - y / SIZE))[..., None]

    def blob(bx, by, rx, ry):
        return np.exp(-(((y - by) / ry) ** 2 + ((x - bx) / rx) ** 2))

    def ellipse(ex, ey, rx, ry, sharpness):
        return np.clip((1 - np.sqrt(((x - ex) / rx) ** 2 + ((y - ey) / ry) ** 2)) * sharpness + 0.5, 0, 1)

    def put(mask, colour):
        image[:] = image * (1 - mask[..., None]) + np.asarray(colour, np.float32) * mask[..., None]

    put(ellipse(cx, SIZE + 60, 150, 110, 20), (70, 80, 110))  # shoulders
    neck = np.clip((34 - abs(x - cx)) / 2, 0, 1) * np.clip((y - cy - 60) / 6, 0, 1) * np.clip((SIZE - y) / 30, 0, 1)
    put(neck, skin * 0.62)
    put(ellipse(cx, cy - 14, 66, 92, 14), hair)
    for side in (-1, 1):
        put(ellipse(cx + side * 58, cy + 2, 8, 16, 12), skin * 0.75)  # ears

    eye_y = MOUTH[1] + EYE_Y - LOWER
    nx, ny = (x - cx) / 75, (y - cy - 10) / 110
    nz = np.sqrt(np.maximum(1 - nx * nx - ny * ny, 0.05))
    shade = 0.42 + 0.6 * (nx * np.sin(face.light) * 0.75 - ny * 0.35 + nz * 0.9)
    shade += 0.10 * blob(cx, eye_y + 22, 6, 22)  # bridge of the nose
    for side in (-1, 1):
        shade -= 0.16 * blob(cx + side * EYE_X, eye_y - 2, 17, 9) + 0.08 * blob(cx + side * 10, eye_y + 20, 4, 20)
    below_hair = np.clip((y - (cy - 66 + 0.0072 * (x - cx) ** 2)) / 4, 0, 1)
    put(ellipse(cx, cy, 56, 92, 18) * below_hair, skin * shade[..., None])
    for side in (-1, 1):
        ex = cx + side * EYE_X
        brow = np.exp(-(((y - (eye_y - 15 + 0.012 * (x - ex) ** 2)) / 2.6) ** 2))
        put(0.85 * brow * np.clip((17 - abs(x - ex)) / 3, 0, 1), hair * 0.9)
        white = ellipse(ex, eye_y, EYE_HALF - 0.3, 5.4, 9)
        put(white, (235, 232, 228))
        put(ellipse(ex, eye_y, 5, 5, 8) * white, (86, 60, 42))
        put(ellipse(ex, eye_y, 2.3, 2.3, 8) * white, (14, 12, 12))
        put(ellipse(ex - 1.5, eye_y - 1.7, 1.1, 1.1, 6) * white, (250, 250, 250))
        rim = np.exp(-(((np.sqrt(((x - ex) / EYE_HALF) ** 2 + ((y - eye_y) / 5.8) ** 2) - 1) / 0.11) ** 2))
        put(0.8 * rim * np.where(y < eye_y, 1, 0.45), skin * 0.28)  # lashes
    return cv2.resize(np.clip(image * face.brightness, 0, 255), (SIZE, SIZE), interpolation=cv2.INTER_AREA).astype(
        np.uint8
    )
