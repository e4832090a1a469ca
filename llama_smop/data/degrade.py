"""A picture made worse on purpose, to see what sight is worth: blur:3, occlude:0.3, drop:0.2, jitter:2, fps:10.

A degradation is a name and an amount. Where it draws, it draws from a generator of its own, so a clip is degraded in
the same way whatever noise its sound gets.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from scipy.ndimage import gaussian_filter

from llama_smop.models.units import VIDEO_RATE

Apply = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]  # (frames, amount, rng) -> new frames


@dataclass(frozen=True)
class Kind:
    """A way to degrade. unit: what its amount counts; low, high: its bounds, both included."""

    apply: Apply
    unit: str
    low: float
    high: float


@dataclass(frozen=True)
class Degradation:
    """One of `KINDS` with its amount; prints as it is parsed, `blur:3`."""

    name: str
    amount: float

    def __post_init__(self):
        kind = KINDS.get(self.name)
        if kind is None:
            raise ValueError(f"expected a degradation of {', '.join(KINDS)}, got {self.name!r}")
        if not kind.low <= self.amount <= kind.high:
            raise ValueError(f"{self.name} takes {kind.unit}, from {kind.low:g} to {kind.high:g}, got {self.amount!r}")

    @classmethod
    def parse(cls, text: str) -> "Degradation":
        """Raises ValueError: `text` is not NAME:AMOUNT, the name is unknown, or the amount out of bounds."""
        name, _, number = text.strip().partition(":")
        if name not in KINDS:
            raise ValueError(f"expected a degradation of {', '.join(KINDS)}, as in blur:3, got {text!r}")
        try:
            amount = float(number)
        except ValueError:
            kind = KINDS[name]
            raise ValueError(
                f"{name} takes {kind.unit}, from {kind.low:g} to {kind.high:g}, as in {name}:{kind.high / 4:g}, "
                f"got {text!r}"
            ) from None
        return cls(name, amount)

    def __str__(self) -> str:
        return f"{self.name}:{self.amount:g}"

    def __call__(self, frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Degraded frames of the shape and dtype of `frames`, (T, H, W) or (T, H, W, C), uint8 or float."""
        if frames.ndim not in (3, 4) or not (frames.dtype == np.uint8 or frames.dtype.kind == "f"):
            wanted = "uint8 or float frames (T, H, W) or (T, H, W, C)"
            raise ValueError(f"expected {wanted}, got {frames.dtype} {frames.shape}")
        return KINDS[self.name].apply(frames, self.amount, rng) if frames.size else frames.copy()


def degrade(frames: np.ndarray, degradation: str | Degradation, seed: int | tuple[int, ...] = 0) -> np.ndarray:
    """Frames made worse; `frames` are not written to.

    Args:
        frames: uint8 or float (T, H, W) or (T, H, W, C), 25 a second; lengths are in their pixels.
        degradation: one of

            - "blur:S", a Gaussian blur with a standard deviation of S pixels, the edges held;
            - "occlude:F", an upright rectangle that covers the share F of the picture, in its own shape and grey value,
              in one place all through the clip, drawn at random;
            - "drop:P", the share P of the frames, drawn at random, is black;
            - "jitter:S", every frame is shifted by whole pixels, drawn from a normal distribution with a standard
              deviation of S in either direction, the edges held;
            - "fps:N", N frames a second, each shown until the next one.
        seed: of what is drawn.

    Raises:
        ValueError: an unknown degradation, an amount out of bounds, other frames.
    """
    chosen = Degradation.parse(degradation) if isinstance(degradation, str) else degradation
    return chosen(frames, np.random.default_rng(seed))


def _blur(frames: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    sigma = (deviation, deviation, *(0,) * (frames.ndim - 3))
    blurred = np.empty_like(frames)
    for place, frame in enumerate(frames):
        smooth = gaussian_filter(frame.astype(np.result_type(frame, np.float32)), sigma, mode="nearest")
        blurred[place] = smooth.round() if frames.dtype == np.uint8 else smooth
    return blurred


def _occlude(frames: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """The rectangle has the mean value of the clip: black would also darken the picture."""
    sides = frames.shape[1:3]
    height, width = (round(side * share**0.5) for side in sides)
    top, left = (int(rng.integers(side - part + 1)) for side, part in zip(sides, (height, width), strict=True))
    covered = frames.copy()
    mean = frames.mean(axis=(0, 1, 2))
    covered[:, top : top + height, left : left + width] = mean.round() if frames.dtype == np.uint8 else mean
    return covered


def _drop(frames: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    left = frames.copy()
    left[rng.permutation(len(frames))[: round(share * len(frames))]] = 0
    return left


def _jitter(frames: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    shifts = rng.normal(0, deviation, (len(frames), 2)).round().astype(int)
    height, width = frames.shape[1:3]
    rows, columns = np.arange(height), np.arange(width)
    shaken = np.empty_like(frames)
    for place, (down, right) in enumerate(shifts):
        inside = np.ix_(np.clip(rows - down, 0, height - 1), np.clip(columns - right, 0, width - 1))
        shaken[place] = frames[place][inside]
    return shaken


def _slow(frames: np.ndarray, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Frame t shows the newest of those taken at 0, 25/N, 50/N, …, each moved to the next whole frame."""
    step = VIDEO_RATE / Fraction(rate).limit_denominator(1000)
    taken = np.array([-int(-(int(t / step) * step) // 1) for t in range(len(frames))])
    return frames[taken]


KINDS = {
    "blur": Kind(_blur, "a standard deviation in pixels", 0, 48),
    "occlude": Kind(_occlude, "a share of the picture", 0, 1),
    "drop": Kind(_drop, "a share of the frames", 0, 1),
    "jitter": Kind(_jitter, "a standard deviation in pixels", 0, 48),
    "fps": Kind(_slow, "frames a second", 1, VIDEO_RATE),
}
