"""Lips, teeth and tongue: outlines from articulation parameters, painted into crops.

Shapes are laid out for all frames of a clip at once, in units of the drawing, and painted at twice the crop's size.
"""

from dataclasses import dataclass

import numpy as np

from llama_smop.data.synthetic.articulation import PARAMETERS
from llama_smop.data.synthetic.face import Face
from llama_smop.data.synthetic.placing import CENTRE_X, CENTRE_Y, ZOOM

_FINE = 2  # painted pixels for one of the crop
_LEFT, _TOP, _RIGHT, _BOTTOM = 10, 20, 86, 84  # of the part of the crop that the mouth can reach
_SHIFT = 4  # fractional bits of OpenCV's coordinates
_SHINE = (1 - np.linspace(-1, 1, 13)[:, None] ** 2) * (0, 0.55)  # half the thickness of the light on the lower lip
_ACROSS = np.linspace(-1, 1, 17)  # from one corner of the opening to the other
_ARCH = 1 - _ACROSS * _ACROSS


def lip_contours(a: np.ndarray, face: Face) -> dict[str, np.ndarray]:
    """Lip lines over time, outer and inner, upper and lower: each (T, P, 2), left to right, in units of the drawing."""
    jaw, gap, spread, rounding, _, _, tuck, press = (a[:, i, None] for i in range(8))
    u = np.linspace(-1, 1, 33)[None, :]
    arch = 1 - u * u

    half = (17.8 + 4.4 * spread - 7.6 * rounding - 0.8 * press - 1.2 * gap) * face.mouth_width
    upper = (5.0 + 0.9 * rounding - 2.0 * press - 0.6 * spread) * face.lip_thickness
    lower = (6.2 + 1.2 * rounding - 2.6 * press - 0.8 * spread - 2.4 * tuck) * face.lip_thickness
    rise = 3.4 * gap + 1.9 * tuck + 0.5 * spread * gap
    drop = 13.0 * gap + 0.8 * jaw - 2.2 * tuck
    corner = CENTRE_Y + 1.1 * jaw - 0.9 * spread + 2.0 * rounding * gap

    middle = 0.55 * np.exp(-((u / 0.35) ** 2))  # the upper lip hangs a little in the middle
    bow = 1.15 * np.exp(-((u / 0.17) ** 2)) * (1 - 0.5 * rounding)
    inner_half = half - 2.2 + 0.6 * rounding
    x_outer = CENTRE_X + half * u
    x_inner = CENTRE_X + inner_half * u
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


def _closed(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """The polygons between lines (T, P, 2) that run left to right."""
    return np.concatenate([upper, lower[:, ::-1]], axis=1)


class Mouth:
    """The mouth of a clip, painted frame by frame.

    contours: of `lip_contours`. parameters: (T, 8). maps: (T, 2, 3), from the drawing to the crops.
    """

    def __init__(self, contours: dict[str, np.ndarray], parameters: np.ndarray, face: Face, maps: np.ndarray):
        self._maps = maps
        self._palette = palette = _Palette.of(face)
        self._pose = {name: parameters[:, i].astype(np.float64) for i, name in enumerate(PARAMETERS)}
        top, inner_top = contours["outer_top"], contours["inner_top"]
        bottom, inner_bottom = contours["outer_bottom"], contours["inner_bottom"]
        # Nested bands give the lips roundness; the upper one lies in shade, the lower one catches the light.
        self._bands = [
            (self._place(_closed(outer + share * (inner - outer), inner)), _colour(palette.lips * tone))
            for outer, inner, bands in (
                (top, inner_top, ((0.0, 0.80), (0.25, 0.86), (0.6, 0.78))),
                (bottom, inner_bottom, ((0.0, 0.86), (0.15, 0.96), (0.35, 1.06), (0.72, 0.94))),
            )
            for share, tone in bands
        ]
        middle = bottom[:, 10:23] + 0.45 * (inner_bottom[:, 10:23] - bottom[:, 10:23])
        self._shine = self._place(_closed(middle - _SHINE, middle + _SHINE))
        self._seam = self._place((inner_top + inner_bottom) / 2)
        self._lay_out_inside(inner_top, inner_bottom)

    def paint(self, crop: np.ndarray, t: int) -> None:
        """Paint frame `t` over the skin of its crop, uint8 (96, 96, 3)."""
        import cv2

        view = crop[_TOP:_BOTTOM, _LEFT:_RIGHT]
        height, width = view.shape[:2]
        image = cv2.resize(view, (_FINE * width, _FINE * height), interpolation=cv2.INTER_LINEAR)
        for polygons, colour in self._bands:
            _fill(image, polygons[t], colour)
        if self._pose["press"][t] < 0.6:
            _fill(image, self._shine[t], _colour(self._palette.shine))
        self._paint_inside(image, t)
        seam = min(max(1 - 6 * self._pose["open"][t] - self._pose["tuck"][t], 0), 1)
        if seam > 0.05:  # closed lips still meet in a dark line
            colour = _colour(self._palette.lips * (1 - 0.52 * seam))
            cv2.polylines(image, [self._seam[t]], False, colour, _FINE, cv2.LINE_AA, _SHIFT)
        view[:] = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)

    def _lay_out_inside(self, inner_top: np.ndarray, inner_bottom: np.ndarray) -> None:
        """Teeth and tongue, which are seen through the opening."""
        jaw, gap, tongue = (self._pose[name] for name in ("jaw", "open", "tongue"))
        middle = inner_top.shape[1] // 2
        roof, floor = inner_top[:, middle, 1], inner_bottom[:, middle, 1]
        half = (inner_top[:, -1, 0] - inner_top[:, 0, 0]) / 2

        def arc(height: np.ndarray, width: float, bulge: np.ndarray | float) -> np.ndarray:
            x = CENTRE_X + width * half[:, None] * _ACROSS
            return np.stack([x, height[:, None] + np.reshape(bulge, (-1, 1)) * _ARCH], axis=-1)

        # The upper teeth stay with the skull, the lower ones go with the jaw.
        edge = np.minimum(CENTRE_Y + 1.2 + 0.6 * jaw, roof + 5.2)
        rim = np.maximum(edge + 0.5 + 10.5 * jaw, floor - 2.6)
        # The tongue lies on the floor and rises to the teeth; a dental sound shows it in front of them.
        tip = floor - (1.5 + 2.2 * gap) - tongue * np.maximum(floor - roof - 3.0, 0.0) * 0.62
        rise = tip - floor - 2
        shapes = {
            "upper_teeth": _closed(arc(roof - 6, 0.92, 0), arc(edge - 1.3, 0.86, 1.6)),
            "lower_teeth": _closed(arc(rim + 1.0, 0.74, -0.9), arc(floor + 6, 0.74, 0)),
            "back": _closed(arc(floor + 2, 0.70, rise), arc(floor + 6, 0.70, 0)),
            "blade": _closed(arc(floor + 3.3, 0.385, rise), arc(floor + 7.3, 0.385, 0)),
        }
        self._inside = {name: self._place(shape) for name, shape in shapes.items()}
        self._opening = self._place(_closed(inner_top, inner_bottom))
        self._roof = self._place(inner_top[:, middle : middle + 1])[:, 0, 1] / (1 << _SHIFT)

    def _paint_inside(self, image: np.ndarray, t: int) -> None:
        opening, palette, tongue = self._opening[t], self._palette, self._pose["tongue"][t]
        (x0, y0), (x1, y1) = (opening.min(axis=0) >> _SHIFT) - 2, (opening.max(axis=0) >> _SHIFT) + 3
        x0, y0 = max(x0, 0), max(y0, 0)
        view = image[y0:y1, x0:x1]
        origin = np.array((x0, y0)) << _SHIFT
        mask = np.zeros(view.shape[:2], dtype=np.uint8)
        _fill(mask, opening - origin, (255,))
        inside = np.empty(view.shape, dtype=np.uint8)
        inside[:] = palette.cavity
        teeth = self._pose["teeth"][t]
        white = palette.teeth * (0.45 + 0.55 * teeth)
        flesh = [("back", palette.tongue), ("blade", palette.tongue * 1.10)]
        bone = [("upper_teeth", white)] if teeth > 0.15 else []
        if teeth > 0.15:
            _fill(inside, self._inside["lower_teeth"][t] - origin, _colour(white * 0.86))
        for name, colour in bone + flesh if tongue > 0.8 else flesh + bone:
            _fill(inside, self._inside[name][t] - origin, _colour(colour))
        depth = np.clip((np.arange(y0, y0 + len(view), dtype=np.float32) - self._roof[t]) / (3.5 * ZOOM * _FINE), 0, 1)
        shadow = (depth * 0.30 + 0.70)[:, None, None]  # of the upper lip
        alpha = (mask * np.float32(1 / 255))[..., None]
        view[:] = view + (inside * shadow - view) * alpha

    def _place(self, points: np.ndarray) -> np.ndarray:
        """Points (T, P, 2) of the drawing in the painted pictures, as OpenCV's fixed-point numbers."""
        placed = points @ self._maps[:, :, :2].transpose(0, 2, 1) + self._maps[:, None, :, 2]
        placed = (placed - (_LEFT, _TOP)) * _FINE + (_FINE - 1) / 2
        return np.rint(placed * (1 << _SHIFT)).astype(np.int32)


def _colour(colour: np.ndarray) -> tuple[float, ...]:
    return tuple(colour.tolist())


def _fill(image: np.ndarray, polygon: np.ndarray, colour: tuple[float, ...]) -> None:
    import cv2

    cv2.fillPoly(image, [polygon], colour, cv2.LINE_AA, _SHIFT)
