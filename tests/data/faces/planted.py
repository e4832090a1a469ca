"""Faces of numbers alone: landmarks where they are wanted, mouths that open as they are told."""

import numpy as np

from llama_smop.data.faces.geometry import KEPT, PLACE, REFERENCE
from llama_smop.data.faces.tracker import Track

LIPS = 180.0  # height of the mouth in the face that is planted


def face(opening: float = 0.0) -> np.ndarray:
    """(len(KEPT), 2): the reference face, its inner lips `opening` pixels apart."""
    points = np.full((len(KEPT), 2), (129.0, LIPS))
    for landmark, place in REFERENCE.items():
        points[PLACE[landmark]] = place
    points[PLACE[13]] = (129.0, LIPS - opening / 2)
    points[PLACE[14]] = (129.0, LIPS + opening / 2)
    return points


def track(first: int, openings, shift=(0.0, 0.0), size: float = 100.0) -> Track:
    """A face from frame `first` on, a frame for each opening; None where it was not found."""
    box = np.array([0, 0, size, size]) + np.tile(shift, 2)
    points = [None if opening is None else face(opening) + shift for opening in openings]
    return Track(first, points, [None if p is None else box for p in points], [120.0] * len(points))


def syllables(frames: int, hertz: float, phase: float = 0.0) -> np.ndarray:
    """(frames,) from 0 to 1."""
    return 0.5 + 0.5 * np.sin(2 * np.pi * hertz * np.arange(frames) / 25 + phase)
