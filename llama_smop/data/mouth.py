"""A rendered mouth that says a phoneme track: 96×96 RGB, 25 frames a second.

Each phoneme is a viseme, a target for eight articulation parameters. Targets are blended over time by dominance
functions (Cohen and Massaro, "Modeling coarticulation in synthetic visual speech", 1993), so that a bilabial closes
fully, a rounded vowel rounds the consonants around it, and nothing jumps. The face is drawn at twice the size with
OpenCV and sampled down with the head's motion. Sounds that look alike on real lips (p b m; s z; k g) look alike here.
"""

from dataclasses import dataclass

import numpy as np

from .speech import Segment

FPS = 25
SIZE = 96

PARAMETERS = ("jaw", "open", "spread", "round", "teeth", "tongue", "tuck", "press")
_ANY = float("nan")  # the viseme leaves this parameter to its neighbours

#                 jaw   open  spread round teeth tongue tuck press
_VISEMES = {
    "rest": (0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.0, 0.0),
    "bilabial": (0.05, 0.00, _ANY, _ANY, 0.00, _ANY, 0.0, 1.0),
    "labiodental": (0.10, 0.10, 0.15, _ANY, 1.00, 0.10, 1.0, 0.0),
    "dental": (0.22, 0.34, 0.10, 0.00, 0.70, 1.00, 0.0, 0.0),
    "alveolar": (0.15, 0.26, 0.20, _ANY, 0.80, 0.70, 0.0, 0.0),
    "lateral": (0.25, 0.42, 0.15, 0.00, 0.60, 0.85, 0.0, 0.0),
    "sibilant": (0.03, 0.20, 0.50, _ANY, 1.00, 0.10, 0.0, 0.0),
    "postalveolar": (0.08, 0.28, 0.00, 0.70, 1.00, 0.10, 0.0, 0.0),
    "velar": (0.20, 0.30, _ANY, _ANY, 0.40, 0.15, 0.0, 0.0),
    "rhotic": (0.15, 0.24, 0.00, 0.50, 0.40, 0.45, 0.0, 0.0),
    "glide_w": (0.08, 0.14, 0.00, 1.00, 0.00, 0.00, 0.0, 0.0),
    "glide_j": (0.10, 0.22, 0.60, _ANY, 0.80, 0.50, 0.0, 0.0),
    "i": (0.12, 0.28, 1.00, 0.00, 0.90, 0.45, 0.0, 0.0),
    "ih": (0.22, 0.34, 0.55, 0.00, 0.70, 0.30, 0.0, 0.0),
    "e": (0.45, 0.58, 0.50, 0.00, 0.60, 0.25, 0.0, 0.0),
    "ae": (0.75, 0.84, 0.45, 0.00, 0.55, 0.20, 0.0, 0.0),
    "ah": (0.95, 1.00, 0.00, 0.00, 0.35, 0.05, 0.0, 0.0),
    "uh": (0.50, 0.58, 0.00, 0.10, 0.40, 0.15, 0.0, 0.0),
    "aw": (0.60, 0.66, 0.00, 0.60, 0.10, 0.05, 0.0, 0.0),
    "oh": (0.35, 0.44, 0.00, 0.80, 0.00, 0.05, 0.0, 0.0),
    "u": (0.12, 0.20, 0.00, 1.00, 0.00, 0.00, 0.0, 0.0),
    "hook": (0.20, 0.26, 0.00, 0.65, 0.10, 0.10, 0.0, 0.0),
    "schwa": (0.25, 0.34, 0.05, 0.05, 0.40, 0.20, 0.0, 0.0),
    "er": (0.28, 0.34, 0.00, 0.45, 0.30, 0.30, 0.0, 0.0),
}
# How strongly a viseme holds against its neighbours; 1 where it is not named.
_STRENGTH = {"bilabial": 9.0, "labiodental": 6.0, "glide_w": 3.0, "u": 2.5, "postalveolar": 2.5, "dental": 3.0}
_STRENGTH |= {"velar": 0.4, "schwa": 0.6, "alveolar": 0.8, "rest": 1.5, "lateral": 1.2}

# espeak mnemonics without stress and length marks; vowels of two parts give two visemes.
_CONSONANTS = {
    "bilabial": "p b m",
    "labiodental": "f v",
    "dental": "T D",
    "alveolar": "t d n 4 *",
    "lateral": "l",
    "sibilant": "s z",
    "postalveolar": "S Z tS dZ",
    "velar": "k g N x C h H ?",
    "rhotic": "r R",
    "glide_w": "w W",
    "glide_j": "j",
}
_VOWEL_PARTS = {
    "i": "i",
    "I": "ih",
    "e": "e",
    "E": "e",
    "a": "ae",
    "A": "ah",
    "V": "uh",
    "0": "aw",
    "O": "aw",
    "o": "oh",
    "U": "hook",
    "u": "u",
    "@": "schwa",
    "3": "er",
    "L": "lateral",
}
_CONSONANT_OF = {name: viseme for viseme, names in _CONSONANTS.items() for name in names.split()}


def visemes(phoneme: str) -> tuple[str, ...]:
    """The viseme of an espeak mnemonic, two for a diphthong; an unknown one moves the mouth like a schwa."""
    name = phoneme.strip("',_%=|;!~`^\"-")
    if not name:
        return ("rest",)
    bare = name.rstrip("#:2-;") or name
    for form in (name, bare, bare[:2], bare[:1]):
        if form in _CONSONANT_OF:
            return (_CONSONANT_OF[form],)
    if bare in ("aI", "aU"):  # these start lower than "cat"
        return ("ah", _VOWEL_PARTS[bare[1]])
    if len(bare) > 1 and bare[0] in "AOoeiU" and bare[1] == "@":  # r-coloured: car, four
        return (_VOWEL_PARTS[bare[0]], "er")
    parts = tuple(_VOWEL_PARTS[c] for c in bare[:2] if c in _VOWEL_PARTS)
    return parts or ("schwa",)


def articulation(phonemes: tuple[Segment, ...], n_frames: int, offset: float = 0.0) -> np.ndarray:
    """PARAMETERS over time, float32 (n_frames, 8); `offset` seconds are added to every phoneme's time."""
    names, starts, ends = ["rest"], [-1.0], [offset]
    for phoneme in phonemes:
        start, end = phoneme.start + offset, phoneme.end + offset
        if phoneme.name == "_":
            continue
        parts = visemes(phoneme.name)
        if parts == ("bilabial",) and phoneme.name[-1] in "pb":  # espeak marks the release; the lips close before it
            start, end = start - 0.05, start + 0.02
        edges = np.linspace(start, end, len(parts) + 1)
        names += parts
        starts += list(edges[:-1])
        ends += list(edges[1:])
    names.append("rest")
    starts.append(max(ends) + 0.02)
    ends.append(n_frames / FPS + 1.0)

    targets = np.array([_VISEMES[name] for name in names])  # (N, 8)
    strength = np.array([_STRENGTH.get(name, 1.0) for name in names])
    begin, finish = np.array(starts), np.array(ends)
    time = (np.arange(n_frames) + 0.5) / FPS
    centre, half = (begin + finish) / 2, (finish - begin) / 2
    away = np.maximum(np.abs(time[:, None] - centre) - 0.5 * half, 0.0)  # (n_frames, N)
    reach = np.clip(0.5 * half, 0.02, 0.04)
    dominance = strength * np.exp(-away / reach)
    known = ~np.isnan(targets)
    weights = dominance[:, :, None] * np.where(known, 1.0, 1e-3)
    return ((weights * np.where(known, targets, 0.0)).sum(1) / weights.sum(1)).astype(np.float32)


@dataclass(frozen=True)
class Face:
    """What stays the same while somebody speaks. Colours are RGB, 0 to 255; lengths are relative to the average."""

    skin: tuple[int, int, int]
    lips: tuple[int, int, int]
    wall: tuple[int, int, int]
    light: float  # where the light comes from, radians from straight above, positive to the right
    brightness: float
    mouth_width: float
    lip_thickness: float
    face_width: float
    stubble: float


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
        skin=tuple(int(c) for c in skin),
        lips=tuple(int(c) for c in lips),
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
    return np.round(points * (_SCALE << _SHIFT)).astype(np.int32)


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
    t = np.arange(n_frames) / FPS
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


def render(parameters: np.ndarray, face: Face, seed: int = 0) -> np.ndarray:
    """Frames of a face that articulates `parameters` (T, 8), uint8 (T, 96, 96, 3); the seed moves the head."""
    import cv2

    rng = np.random.default_rng([seed, 0x30])
    n_frames, n = len(parameters), SIZE * _SCALE
    texture = _skin_texture(face, rng)
    motion = _head_motion(n_frames, rng)
    lines = _lip_contours(parameters.astype(np.float64), face)
    lips = np.array(face.lips, dtype=np.float64) * face.brightness
    light = float(np.mean(face.skin)) / 255 * face.brightness
    dim = 0.55 + 0.45 * light

    still = int(_CENTRE_Y + 4) * _SCALE  # rows above do not move with the jaw
    y, x = np.mgrid[still:n, 0:n].astype(np.float32)
    below = np.clip((y - still) / (30 * _SCALE), 0, 1)
    fall = below * below * (3 - 2 * below) * (1 - 0.5 * ((x / _SCALE - _CENTRE_X) / 48) ** 2) * (7.5 * _SCALE)

    def fill(image, polygon, colour):
        cv2.fillPoly(image, [_fixed_point(polygon)], [float(c) for c in colour], cv2.LINE_AA, _SHIFT)

    frames = np.empty((n_frames, SIZE, SIZE, 3), dtype=np.uint8)
    for t in range(n_frames):
        jaw, gap, _, _, teeth, tongue, tuck, press = (float(v) for v in parameters[t])
        canvas = texture.copy()
        canvas[still:] = cv2.remap(texture, x, y - jaw * fall, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        top, bottom = lines["outer_top"][t], lines["outer_bottom"][t]
        inner_top, inner_bottom = lines["inner_top"][t], lines["inner_bottom"][t]

        # Lips: nested bands give them roundness; the upper one lies in shade, the lower one catches the light.
        for share, tone in ((0.0, 0.80), (0.25, 0.86), (0.6, 0.78)):
            fill(canvas, np.concatenate([top + share * (inner_top - top), inner_top[::-1]]), lips * tone)
        for share, tone in ((0.0, 0.86), (0.15, 0.96), (0.35, 1.06), (0.72, 0.94)):
            fill(canvas, np.concatenate([bottom + share * (inner_bottom - bottom), inner_bottom[::-1]]), lips * tone)
        shine = bottom[10:23] + 0.45 * (inner_bottom[10:23] - bottom[10:23])
        thick = np.linspace(-1, 1, 13)[:, None] ** 2
        shine_shape = np.concatenate([shine + (1 - thick) * (0, -0.55), (shine + (1 - thick) * (0, 0.55))[::-1]])
        if press < 0.6:
            fill(canvas, shine_shape, np.minimum(lips * 1.10 + 16 * light, 255))

        # What is seen between the lips is drawn apart and let in through the opening.
        opening = np.concatenate([inner_top, inner_bottom[::-1]])
        x0, y0, x1, y1 = 40, 72, 152, 176
        hole = np.zeros((y1 - y0, x1 - x0), dtype=np.uint8)
        origin = np.array([x0, y0]) / _SCALE
        fill(hole, opening - origin, (255,))
        inside = np.empty((*hole.shape, 3), dtype=np.uint8)
        inside[:] = np.array((58, 22, 24)) * dim
        roof = inner_top[16, 1]
        floor = inner_bottom[16, 1]
        half = (inner_top[-1, 0] - inner_top[0, 0]) / 2
        u = np.linspace(-1, 1, 17)

        def arc(centre_y, width, bulge, u=u, half=half):
            return np.stack([_CENTRE_X + half * width * u, centre_y + bulge * (1 - u * u)], axis=-1)

        white = np.array((236, 230, 216)) * dim * (0.45 + 0.55 * teeth)
        flesh = np.array((196, 92, 98)) * dim
        # The tongue lies on the floor and rises to the teeth; a dental sound shows it in front of them.
        tip = floor - (1.5 + 2.2 * gap) - tongue * max(floor - roof - 3.0, 0.0) * 0.62
        tongue_shape = np.concatenate([arc(floor + 2, 0.70, -(floor + 2 - tip)), arc(floor + 6, 0.70, 0)[::-1]])
        edge = min(_CENTRE_Y + 1.2 + 0.6 * jaw, roof + 5.2)  # the upper teeth do not move with the jaw
        upper_teeth = np.concatenate([arc(roof - 6, 0.92, 0), arc(edge - 1.3, 0.86, 1.6)[::-1]])
        behind, front = (upper_teeth, tongue_shape) if tongue > 0.8 else (tongue_shape, upper_teeth)
        rim = max(edge + 0.5 + 10.5 * jaw, floor - 2.6)  # the lower teeth do
        lower_teeth = np.concatenate([arc(rim + 1.0, 0.74, -0.9), arc(floor + 6, 0.74, 0)[::-1]])
        if teeth > 0.15:
            fill(inside, lower_teeth - origin, white * 0.86)
        for shape in (behind, front):
            if shape is tongue_shape:
                fill(inside, shape - origin, flesh)
                fill(inside, shape * (0.55, 1) + (_CENTRE_X * 0.45, 1.3) - origin, flesh * 1.10)
            elif teeth > 0.15:
                fill(inside, shape - origin, white)
        alpha = cv2.GaussianBlur(hole, (3, 3), 0).astype(np.uint16)[..., None]
        shadow = np.clip((np.arange(y0, y1) / _SCALE - roof) / 3.5, 0, 1)[:, None, None] * 0.30 + 0.70
        view = canvas[y0:y1, x0:x1]
        lit = (inside * shadow).astype(np.uint16)
        view[:] = ((view * (255 - alpha) + lit * alpha) // 255).astype(np.uint8)
        seam = np.clip(1 - 6 * gap - tuck, 0, 1)
        if seam > 0.05:  # closed lips still meet in a dark line
            line = _fixed_point((inner_top + inner_bottom) / 2)
            cv2.polylines(canvas, [line], False, [float(c) for c in lips * (1 - 0.52 * seam)], 2, cv2.LINE_AA, _SHIFT)
        canvas = cv2.GaussianBlur(canvas, (3, 3), 0.8)
        frames[t] = cv2.warpAffine(
            canvas, motion[t], (SIZE, SIZE), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
    return frames
