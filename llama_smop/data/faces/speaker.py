"""Who speaks: the face whose mouth opens with the sound."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from llama_smop.data.faces.geometry import PLACE

if TYPE_CHECKING:  # the tracker needs OpenCV, and who only listens does without
    from llama_smop.data.faces.tracker import Track

RATE = 25
LAGS = 8  # frames that sound and picture may be apart
BAND = (1.0, 8.0)  # Hz: syllables
MIN_OVERLAP = 12  # frames
SILENCE = -3.0  # the envelope where nothing is heard
AT_ONCE = 1000  # frames whose landmarks are in memory together


def mouth_opening(points: np.ndarray) -> np.ndarray:
    """(T,): distance of the inner lips over the distance of the eyes' outer corners.

    Args:
        points: (T, len(KEPT), 2).
    """
    lips = np.linalg.norm(points[:, PLACE[13]] - points[:, PLACE[14]], axis=1)
    eyes = np.linalg.norm(points[:, PLACE[33]] - points[:, PLACE[263]], axis=1)
    return lips / np.maximum(eyes, 1e-6)


def sound_envelope(samples: np.ndarray, frames: int, rate: int = 16000) -> np.ndarray:
    """(frames,): root mean square of the sound in each video frame, in a logarithmic scale."""
    hop = rate // RATE
    padded = np.zeros(frames * hop, np.float32)
    padded[: min(len(samples), len(padded))] = samples[: len(padded)]
    return np.log10(np.sqrt((padded.reshape(frames, hop) ** 2).mean(axis=1)) + 10**SILENCE)


def stream_envelope(blocks: Iterable[np.ndarray], rate: int = 16000) -> Iterator[np.ndarray]:
    """`sound_envelope` of sound that comes in blocks of any length, float32 (n,); the last frame may be begun only."""
    left, hop = np.zeros(0, np.float32), rate // RATE
    for block in blocks:
        left = np.concatenate([left, block])
        frames = len(left) // hop
        yield sound_envelope(left, frames, rate)
        left = left[frames * hop :]
    if len(left):
        yield sound_envelope(left, 1, rate)


def speaking_score(opening: np.ndarray, envelope: np.ndarray | None) -> float:
    """How likely a mouth is the one that is heard: the spread of its movement, weighed by how it goes with the sound.

    Args:
        opening: (T,), see `mouth_opening`.
        envelope: (T,) of the same frames, or None without sound; then the movement alone decides.
    """
    moves = _band(opening)
    spread = float(moves.std())
    if envelope is None or len(moves) < MIN_OVERLAP:
        return spread
    heard = _band(envelope)
    best = 0.0
    for lag in range(-LAGS, LAGS + 1):
        a = moves[max(0, lag) : len(moves) + min(0, lag)]
        b = heard[max(0, -lag) : len(heard) + min(0, -lag)]
        if len(a) >= MIN_OVERLAP and a.std() > 0 and b.std() > 0:
            best = max(best, float(np.corrcoef(a, b)[0, 1]))
    return spread * (0.25 + best)


def choose(
    tracks: Sequence["Track"], first: int, end: int, envelope: np.ndarray | None, which: str | int = "auto"
) -> int | None:
    """The index of the track to read lips of in the frames from `first` to `end`; None where there is none.

    Args:
        envelope: (frames of the video,), see `sound_envelope`, or None without sound.
        which: "auto", the speaker; "largest", the largest face; a number, that track.

    Raises:
        ValueError: no such track.
    """
    inside = {i: (max(first, t.first), min(end, t.end)) for i, t in enumerate(tracks)}
    inside = {i: (a, b) for i, (a, b) in inside.items() if b - a >= min(MIN_OVERLAP, end - first)}
    if isinstance(which, int):
        if not 0 <= which < len(tracks):
            raise ValueError(f"there is no face {which}: {len(tracks)} were found, counted from 0")
        return which if which in inside else None
    if not inside:
        return None
    if which == "largest":
        return max(inside, key=lambda i: _size(tracks[i], *inside[i]))
    if which != "auto":
        raise ValueError(f'a face is "auto", "largest" or a number, got {which!r}')

    def score(i: int) -> tuple[float, float]:
        a, b = inside[i]
        parts = (tracks[i].filled_points(at, min(at + AT_ONCE, b)) for at in range(a, b, AT_ONCE))
        opening = np.concatenate([mouth_opening(points) for points in parts])
        heard = None if envelope is None else envelope[a:b]
        return speaking_score(opening, heard) * (b - a) / (end - first), _size(tracks[i], a, b)

    return max(inside, key=score)


def _size(track: "Track", first: int, end: int) -> float:
    boxes = track.filled_boxes(first, end)
    return float(((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).mean()) * (end - first)


def _band(values: np.ndarray) -> np.ndarray:
    """`values` without what is slower or quicker than `BAND`, by the Fourier transform."""
    spectrum = np.fft.rfft(values - values.mean())
    hertz = np.fft.rfftfreq(len(values), 1 / RATE)
    spectrum[(hertz < BAND[0]) | (hertz > BAND[1])] = 0
    return np.fft.irfft(spectrum, len(values))
