"""Frames and samples at a constant rate, placed by their timestamps.

Everything here is a generator that holds a moment of its input, so memory does not grow with the length of a recording.
Times are seconds on the container's clock.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from math import gcd
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")

LONGEST_GAP_S = 600  # between two timestamps; beyond that one of them is wrong
SET_BACK_S = 1.0  # a clock that goes back by more was restarted, as where two recordings were joined
SOUND_TOLERANCE_S = 0.02  # half a frame, by which sound may leave its timestamps: many containers round them
LONGEST_TAIL_S = 10.0  # for which the last frame is shown
BLOCK_S = 10  # length of sound resampled at once


class TimelineError(ValueError):
    """Timestamps that cannot be right."""


class _Clock:
    """Makes timestamps continuous: a missing one is as expected, and a restarted clock continues from there."""

    def __init__(self):
        self._added = 0.0

    def time(self, stamp: float | None, expected: float | None) -> float:
        """expected: the time by what came before, None at the beginning."""
        if stamp is None:
            return 0.0 if expected is None else expected
        if expected is None:
            return stamp
        time = stamp + self._added
        if time < expected - SET_BACK_S:
            self._added += expected - time
            return expected
        if time > expected + LONGEST_GAP_S:
            raise TimelineError(f"after {expected:.2f} s a timestamp jumps by {time - expected:.0f} s")
        return time


def even_frames(
    frames: Iterable[tuple[float | None, Item]], fps: float, start: float | None = None, interval: float | None = None
) -> Iterator[Item]:
    """The frame nearest in time to each of start, start + 1/fps, …; of two as near the earlier.

    frames: (time or None, frame) in the order they are shown. start: None = the time of the first frame; the first one
    is shown from there on, however late it comes. interval: seconds that the last frame is shown, and that lie between
    frames without a time; None = the mean of those before, or one period of `fps`.

    Raises:
        TimelineError: timestamps more than LONGEST_GAP_S apart.
    """
    clock, given, count = _Clock(), 0, 0
    first = at = begun = 0.0
    shown: Item | None = None
    for stamp, frame in frames:
        time = clock.time(stamp, first + at + (interval or 1 / fps) if count else None)
        if not count:
            first = time if start is None else start
            begun = time - first
        elif time - first <= at:
            continue
        elif shown is not None:
            while given / fps - at <= time - first - given / fps:
                yield shown
                given += 1
        shown, at, count = frame, time - first, count + 1
    if shown is None:
        return
    if interval is None:
        interval = (at - begun) / (count - 1) if count > 1 else 1 / fps
    total = max(1, round((at + min(interval, LONGEST_TAIL_S)) * fps))
    while given < total:
        yield shown
        given += 1


def unbroken(
    blocks: Iterable[tuple[float | None, np.ndarray]], rate: int, start: float | None = None
) -> Iterator[np.ndarray]:
    """Blocks of samples (n,) at `rate` Hz as one stream from `start` on: silence where none were recorded.

    blocks: (time of the first sample or None, samples). start: None = the time of the first block; samples before it
    are cut. What lies within SOUND_TOLERANCE_S of where it should be is joined as it is.

    Raises:
        TimelineError: timestamps more than LONGEST_GAP_S apart.
    """
    clock, done = _Clock(), 0
    first = start
    for stamp, samples in blocks:
        time = clock.time(stamp, None if first is None else first + done / rate)
        if first is None:
            first = time
        missing = round((time - first) * rate) - done
        if not done or abs(missing) > SOUND_TOLERANCE_S * rate:
            for begin in range(0, missing, rate):
                yield np.zeros(min(rate, missing - begin), dtype=np.float32)
            done += max(0, missing)
            samples = samples[max(0, -missing) :]
        if len(samples):
            yield samples
            done += len(samples)


def resampled(blocks: Iterable[np.ndarray], source: int, rate: int) -> Iterator[np.ndarray]:
    """Samples (n,) at `source` Hz as float32 samples at `rate` Hz: the same as of `resample_poly` over all of them."""
    common = gcd(source, rate)
    up, down = rate // common, source // common
    if up == down:
        yield from blocks
        return
    # Pieces begin at whole periods of `down`, and see as much of their neighbours as the filter does.
    margin = down * -(-(10 * max(up, down) // up + 1) // down)
    piece = down * -(-BLOCK_S * source // down)
    held: list[np.ndarray] = []
    before, waiting = 0, 0  # samples already resampled at the front of `held`, samples in all
    for block in blocks:
        held.append(block)
        waiting += len(block)
        while waiting >= before + piece + margin:
            samples = np.concatenate(held)
            yield _resample(samples[: before + piece + margin], up, down)[before * up // down :][: piece * up // down]
            keep = samples[before + piece - margin :]  # a view, whose base is let go with the next piece
            held, before, waiting = [keep], margin, len(keep)
    if waiting > before:
        yield _resample(np.concatenate(held), up, down)[before * up // down :]


def _resample(samples: np.ndarray, up: int, down: int) -> np.ndarray:
    from scipy.signal import resample_poly  # takes a second to import

    return np.asarray(resample_poly(samples, up, down, window=_low_pass(up, down)), dtype=np.float32)


@lru_cache(maxsize=8)
def _low_pass(up: int, down: int) -> np.ndarray:
    """The filter that `resample_poly` would make anew at every call."""
    from scipy.signal import firwin

    widest = max(up, down)
    return firwin(20 * widest + 1, 1 / widest, window=("kaiser", 5.0)).astype(np.float32)
