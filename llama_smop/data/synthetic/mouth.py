"""A rendered mouth: articulation parameters → 96×96 RGB frames, 25 a second.

The face is drawn at twice the size with OpenCV and sampled down with the head's motion.
"""

from dataclasses import dataclass

import numpy as np

from llama_smop.data.synthetic.articulation import PARAMETERS
from llama_smop.models.units import VIDEO_RATE

SIZE = 96


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


_SCALE = 2  # drawn at twice the size
_ZOOM = 1.3  # and cropped around the mouth, as lip-reading data sets are
_SHIFT = 4  # fractional bits of OpenCV's coordinates
_CENTRE_X, _CENTRE_Y = 48.0, 50.0
_MOUTH = np.s_[60:180, 36:156]  # rows and columns that the mouth can reach, at the drawn size
_SHINE = (1 - np.linspace(-1, 1, 13)[:, None] ** 2) * (0, 0.55)  # half the thickness of the light on the lower lip
_ACROSS = np.linspace(-1, 1, 17)  # from one corner of the opening to the other
_ARCH = 1 - _ACROSS * _ACROSS


def _skin_texture(face: Face, rng: np.random.Generator) -> np.ndarray:
    """The face without its mouth, uint8 (192, 192, 3)."""
    import cv2

    n = SIZE * _SCALE
    y, x = np.mgrid[0:n, 0:n].astype(np.float32) / _SCALE
    dx, dy = (x - _CENTRE_X) / face.face_width, y - _CENTRE_Y

    def blob(cx, cy, rx, ry):
        return np.exp(-(((y[:, :1] - cy) / ry) ** 2)) * np.exp(-(((x[:1] - cx) / rx) ** 2))

    def both_sides(cx, cy, rx, ry):
        return blob(_CENTRE_X - cx, cy, rx, ry) + blob(_CENTRE_X + cx, cy, rx, ry)

    nx, ny = dx / 58.0, (y - 30.0) / 84.0
    nz = np.sqrt(np.maximum(1.0 - nx * nx - ny * ny, 0.05))
    lambert = nx * np.sin(face.light) * 0.75 - ny * 0.35 + nz * 0.9
    shade = 0.42 + 0.60 * lambert
    shade += (
        0.07 * both_sides(27, 30, 12, 12) + 0.08 * blob(48, 84, 9, 6) + 0.10 * blob(48, 9, 7, 8)
    )  # cheeks, chin, nose
    shade -= 0.15 * blob(48, 67.5, 12, 3.2) + 0.10 * blob(48, 22, 12, 3.5)  # under the lip, under the nose
    shade -= 0.05 * blob(48, 31, 1.6, 6) - 0.03 * both_sides(3.6, 31, 1.6, 6)  # philtrum
    for fold in np.linspace(0, 1, 14):  # from the wing of the nose to beside the mouth
        shade -= 0.022 * both_sides(13.5 + 12.5 * fold**1.3, 17 + 31 * fold, 2.2, 3.0)
    shade -= 0.13 * both_sides(10.5, 15, 2.0, 4.5)  # wings of the nose

    skin = np.array(face.skin, dtype=np.float32)
    image = skin * shade[..., None]
    nostrils = np.clip(1.3 * both_sides(5.2, 18.2, 2.6, 1.5), 0, 1)[..., None]
    image = image * (1 - 0.72 * nostrils)
    if face.stubble:
        beard = np.clip(blob(48, 78, 34, 22) + 0.8 * blob(48, 32, 20, 6) + both_sides(34, 60, 12, 22), 0, 1)
        grain = rng.normal(0, 1, (n, n)).astype(np.float32)
        beard = beard * (0.30 + 0.05 * cv2.GaussianBlur(grain, (3, 3), 0)) * face.stubble
        image = image * (1 - beard[..., None]) + np.array((62, 56, 56), dtype=np.float32) * beard[..., None]
    mottle = cv2.GaussianBlur(rng.normal(0, 1, (n, n)).astype(np.float32), (0, 0), 5.0)
    image *= 1 + 0.10 * mottle[..., None] + 0.008 * rng.normal(0, 1, (n, n, 1)).astype(np.float32)

    # Face outline: an ellipse down to the chin; behind it the neck, and behind that the wall.
    outline = np.sqrt((dx / 43.0) ** 2 + ((y - 22.0) / 71.0) ** 2)
    inside = np.clip((1.0 - outline) * 22.0 + 0.5, 0, 1)[..., None]
    inside = inside * inside * (3 - 2 * inside)
    neck_shade = 0.50 + 0.16 * np.clip((y - 84) / 16, 0, 1) - 0.010 * np.abs(dx) + 0.004 * dx * np.sin(face.light)
    neck = skin * np.clip(neck_shade, 0.15, 1)[..., None]
    wall = (
        np.array(face.wall, dtype=np.float32)
        * (0.80 + 0.15 * (1 - y / SIZE) + 0.001 * (x - 48) * face.light)[..., None]
    )
    is_neck = np.clip((27.0 - np.abs(dx) + 0.05 * dy) / 2.0, 0, 1)[..., None] * np.clip((y - 58) / 4, 0, 1)[..., None]
    behind = wall * (1 - is_neck) + neck * is_neck
    image = image * inside + behind * (1 - inside)
    return np.clip(image * face.brightness, 0, 255).astype(np.uint8)


def _fixed_point(points: np.ndarray) -> np.ndarray:
    return np.rint(points * (_SCALE << _SHIFT)).astype(np.int32)


def _lip_contours(a: np.ndarray, face: Face) -> dict[str, np.ndarray]:
    """Lip lines over time, outer and inner, upper and lower: each (T, P, 2), left to right, in pixels."""
    jaw, gap, spread, rounding, _, _, tuck, press = (a[:, i, None] for i in range(8))
    u = np.linspace(-1, 1, 33)[None, :]
    arch = 1 - u * u

    half = (17.8 + 4.4 * spread - 7.6 * rounding - 0.8 * press - 1.2 * gap) * face.mouth_width
    upper = (5.0 + 0.9 * rounding - 2.0 * press - 0.6 * spread) * face.lip_thickness
    lower = (6.2 + 1.2 * rounding - 2.6 * press - 0.8 * spread - 2.4 * tuck) * face.lip_thickness
    rise = 3.4 * gap + 1.9 * tuck + 0.5 * spread * gap
    drop = 13.0 * gap + 0.8 * jaw - 2.2 * tuck
    corner = _CENTRE_Y + 1.1 * jaw - 0.9 * spread + 2.0 * rounding * gap

    middle = 0.55 * np.exp(-((u / 0.35) ** 2))  # the upper lip hangs a little in the middle
    bow = 1.15 * np.exp(-((u / 0.17) ** 2)) * (1 - 0.5 * rounding)
    inner_half = half - 2.2 + 0.6 * rounding
    x_outer = _CENTRE_X + half * u
    x_inner = _CENTRE_X + inner_half * u
    # A rounded opening is an ellipse, a spread one a flat lens.
    lens = arch ** (1.05 - 0.4 * rounding - 0.25 * gap)
    inner_top = corner - rise * lens + middle * (1 - np.clip(3 * gap, 0, 1))
    inner_bottom = corner + drop * lens + middle * (1 - np.clip(3 * gap, 0, 1))
    inner_bottom = np.maximum(inner_bottom, inner_top)
    outer_top = corner - (rise + upper) * arch**0.72 + bow
    outer_bottom = corner + (drop + lower) * arch**0.62
    pair = lambda x, y: np.stack(np.broadcast_arrays(x, y), axis=-1)  # noqa: E731
    return {
        "outer_top": pair(x_outer, outer_top),
        "inner_top": pair(x_inner, inner_top),
        "inner_bottom": pair(x_inner, inner_bottom),
        "outer_bottom": pair(x_outer, outer_bottom),
    }


def _head_motion(n_frames: int, rng: np.random.Generator) -> np.ndarray:
    """Slow sway of the head: affine matrices (T, 2, 3) from the drawing to the 96×96 frame."""
    t = np.arange(n_frames) / VIDEO_RATE
    sway = np.zeros((4, n_frames))
    for row, size in enumerate((1.1, 0.8, 1.3, 0.010)):  # pixels, pixels, degrees, relative scale
        for _ in range(2):
            sway[row] += size / 2 * np.sin(2 * np.pi * (rng.uniform(0.15, 0.6) * t + rng.uniform()))
        sway[row] += size * rng.uniform(-1, 1)
    angle, scale = np.deg2rad(sway[2]), _ZOOM * (1 + sway[3]) / _SCALE
    c, s = scale * np.cos(angle), scale * np.sin(angle)
    pivot = _CENTRE_X * _SCALE
    matrices = np.empty((n_frames, 2, 3))
    matrices[:, 0] = np.stack([c, -s, _CENTRE_X + sway[0] - (c - s) * pivot], axis=-1)
    matrices[:, 1] = np.stack([s, c, _CENTRE_X + sway[1] - (s + c) * pivot], axis=-1)
    return matrices


@dataclass(frozen=True)
class _Palette:
    """Colours in this face's light, RGB."""

    lips: np.ndarray
    shine: np.ndarray
    cavity: np.ndarray
    tongue: np.ndarray
    teeth: np.ndarray

    @classmethod
    def of(cls, face: Face) -> "_Palette":
        light = float(np.mean(face.skin)) / 255 * face.brightness
        dim = 0.55 + 0.45 * light
        lips = np.array(face.lips) * face.brightness
        return cls(
            lips=lips,
            shine=np.minimum(lips * 1.10 + 16 * light, 255),
            cavity=np.array((58, 22, 24)) * dim,
            tongue=np.array((196, 92, 98)) * dim,
            teeth=np.array((236, 230, 216)) * dim,
        )


def _fill(image: np.ndarray, polygon: np.ndarray, colour: np.ndarray | tuple) -> None:
    import cv2

    cv2.fillPoly(image, [_fixed_point(polygon)], [float(c) for c in colour], cv2.LINE_AA, _SHIFT)


def _closed(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """The polygon between two lines that run left to right."""
    return np.concatenate([upper, lower[::-1]])


def _draw_lips(canvas: np.ndarray, lines: dict[str, np.ndarray], press: float, palette: _Palette) -> None:
    """Nested bands give the lips roundness; the upper one lies in shade, the lower one catches the light."""
    top, inner_top = lines["outer_top"], lines["inner_top"]
    bottom, inner_bottom = lines["outer_bottom"], lines["inner_bottom"]
    for share, tone in ((0.0, 0.80), (0.25, 0.86), (0.6, 0.78)):
        _fill(canvas, _closed(top + share * (inner_top - top), inner_top), palette.lips * tone)
    for share, tone in ((0.0, 0.86), (0.15, 0.96), (0.35, 1.06), (0.72, 0.94)):
        _fill(canvas, _closed(bottom + share * (inner_bottom - bottom), inner_bottom), palette.lips * tone)
    if press < 0.6:
        middle = bottom[10:23] + 0.45 * (inner_bottom[10:23] - bottom[10:23])
        _fill(canvas, _closed(middle - _SHINE, middle + _SHINE), palette.shine)


def _draw_between_lips(canvas: np.ndarray, lines: dict[str, np.ndarray], pose: np.ndarray, palette: _Palette) -> None:
    """Teeth and tongue are drawn apart and let in through the opening."""
    import cv2

    jaw, gap, _, _, teeth, tongue, _, _ = (float(v) for v in pose)
    inner_top, inner_bottom = lines["inner_top"], lines["inner_bottom"]
    opening = _closed(inner_top, inner_bottom)
    x0, y0 = np.floor(opening.min(axis=0) * _SCALE).astype(int) - 3
    x1, y1 = np.ceil(opening.max(axis=0) * _SCALE).astype(int) + 3
    origin = np.array([x0, y0]) / _SCALE
    mask = np.zeros((y1 - y0, x1 - x0), dtype=np.uint8)
    _fill(mask, opening - origin, (255,))
    inside = np.empty((*mask.shape, 3), dtype=np.uint8)
    inside[:] = palette.cavity

    roof, floor = inner_top[16, 1], inner_bottom[16, 1]
    half = (inner_top[-1, 0] - inner_top[0, 0]) / 2

    def arc(height: float, width: float, bulge: float) -> np.ndarray:
        line = np.empty((len(_ACROSS), 2))
        line[:, 0] = _CENTRE_X + half * width * _ACROSS
        line[:, 1] = height + bulge * _ARCH
        return line - origin

    # The upper teeth stay with the skull, the lower ones go with the jaw.
    edge = min(_CENTRE_Y + 1.2 + 0.6 * jaw, roof + 5.2)
    rim = max(edge + 0.5 + 10.5 * jaw, floor - 2.6)
    upper_teeth = _closed(arc(roof - 6, 0.92, 0), arc(edge - 1.3, 0.86, 1.6))
    lower_teeth = _closed(arc(rim + 1.0, 0.74, -0.9), arc(floor + 6, 0.74, 0))
    white = palette.teeth * (0.45 + 0.55 * teeth)
    # The tongue lies on the floor and rises to the teeth; a dental sound shows it in front of them.
    tip = floor - (1.5 + 2.2 * gap) - tongue * max(floor - roof - 3.0, 0.0) * 0.62
    back = _closed(arc(floor + 2, 0.70, tip - floor - 2), arc(floor + 6, 0.70, 0))
    blade = _closed(arc(floor + 3.3, 0.385, tip - floor - 2), arc(floor + 7.3, 0.385, 0))
    flesh = [(back, palette.tongue), (blade, palette.tongue * 1.10)]
    bone = [(upper_teeth, white)] if teeth > 0.15 else []
    if teeth > 0.15:
        _fill(inside, lower_teeth, white * 0.86)
    for shape, colour in bone + flesh if tongue > 0.8 else flesh + bone:
        _fill(inside, shape, colour)

    depth = np.clip((np.arange(y0, y1, dtype=np.float32) / _SCALE - np.float32(roof)) / 3.5, 0, 1)
    shadow = (depth * 0.30 + 0.70)[:, None, None]  # of the upper lip
    alpha = (cv2.GaussianBlur(mask, (3, 3), 0) * np.float32(1 / 255))[..., None]
    view = canvas[y0:y1, x0:x1]
    view[:] = view + (inside * shadow - view) * alpha


def render(parameters: np.ndarray, face: Face, seed: int = 0) -> np.ndarray:
    """Frames of a face that articulates `parameters` (T, 8), uint8 (T, 96, 96, 3); the seed moves the head."""
    import cv2

    rng = np.random.default_rng([seed, 0x30])
    n_frames, n = len(parameters), SIZE * _SCALE
    texture = cv2.GaussianBlur(_skin_texture(face, rng), (3, 3), 0.8)
    motion = _head_motion(n_frames, rng)
    contours = _lip_contours(parameters.astype(np.float64), face)
    palette = _Palette.of(face)

    still = int(_CENTRE_Y + 4) * _SCALE  # rows above do not move with the jaw
    y, x = np.mgrid[still:n, 0:n].astype(np.float32)
    below = np.clip((y - still) / (30 * _SCALE), 0, 1)
    fall = below * below * (3 - 2 * below) * (1 - 0.5 * ((x / _SCALE - _CENTRE_X) / 48) ** 2) * (7.5 * _SCALE)

    frames = np.empty((n_frames, SIZE, SIZE, 3), dtype=np.uint8)
    for t, pose in enumerate(parameters):
        lines = {name: contour[t] for name, contour in contours.items()}
        gap, tuck, press = (float(pose[PARAMETERS.index(name)]) for name in ("open", "tuck", "press"))
        canvas = texture.copy()
        canvas[still:] = cv2.remap(texture, x, y - pose[0] * fall, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        _draw_lips(canvas, lines, press, palette)
        _draw_between_lips(canvas, lines, pose, palette)
        seam = min(max(1 - 6 * gap - tuck, 0), 1)
        if seam > 0.05:  # closed lips still meet in a dark line
            line = _fixed_point((lines["inner_top"] + lines["inner_bottom"]) / 2)
            colour = [float(c) for c in palette.lips * (1 - 0.52 * seam)]
            cv2.polylines(canvas, [line], False, colour, 2, cv2.LINE_AA, _SHIFT)
        mouth = canvas[_MOUTH]
        mouth[:] = cv2.GaussianBlur(mouth, (3, 3), 0.8)
        frames[t] = cv2.warpAffine(canvas, motion[t], (SIZE, SIZE), borderMode=cv2.BORDER_REPLICATE)
    return frames
