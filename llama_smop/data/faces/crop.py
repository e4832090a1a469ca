"""Mouth crops of a video file, in two passes: find the faces, then warp the frames of those that are asked for."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llama_smop.data.faces.geometry import PLACE, SMOOTHING, crop_matrices, warp
from llama_smop.data.faces.tracker import Track, Tracker
from llama_smop.data.media import audio_path, stream_video

AT_ONCE = 250  # frames whose maps are computed together
SMALL_MOUTH = 22  # pixels from corner to corner; a crop of less is mostly invention
DARK = 40.0  # mean grey value of a face
PROFILE = 0.35  # the nose's distance from the middle of the eyes, over the distance of the eyes


@dataclass(frozen=True)
class Faces:
    """The faces of a video.

    tracks: in order of their beginning.
    frames: how many frames the video has at 25 a second.
    size: height and width of its picture.
    """

    tracks: list[Track]
    frames: int
    size: tuple[int, int]


@dataclass(frozen=True)
class Selection:
    """Frames of a video from `first` to before `end`, and the track whose mouth they show."""

    first: int
    end: int
    track: Track


def frames_beside_sound(path: str | os.PathLike) -> Iterator[np.ndarray]:
    """The frames of a video from where its sound begins: its own, or the .wav's beside it."""
    return stream_video(path, with_sound=audio_path(path) == Path(path))


def find_faces(
    path: str | os.PathLike, tracker: Tracker | None = None, progress: Callable[[int], None] | None = None
) -> Faces:
    """All faces of a video.

    Args:
        progress: called with 1 after every frame.

    Raises:
        MediaError: the video cannot be read. FaceModelError: the face models are not installed.
    """
    tracker = tracker or Tracker()
    frames, size = 0, (0, 0)
    for frame in frames_beside_sound(path):
        tracker.step(frame)
        frames, size = frames + 1, frame.shape[:2]
        if progress is not None:
            progress(1)
    return Faces(tracker.finish(), frames, size)


def crop_mouths(path: str | os.PathLike, selections: Sequence[Selection]) -> Iterator[np.ndarray]:
    """For every selection, in order, its crops: uint8 RGB (end − first, 96, 96, 3).

    One pass over the video. Only the crops of selections that overlap are in memory at once.

    Args:
        selections: in order of `first`; frames before or after the selected track's own show its first or last place.
    """
    waiting = list(selections)
    open_: list[tuple[Selection, np.ndarray, list[np.ndarray]]] = []
    for number, frame in enumerate(frames_beside_sound(path)):
        while waiting and waiting[0].first <= number:
            selection = waiting.pop(0)
            open_.append((selection, _matrices(selection), []))
        for selection, matrices, crops in open_:
            if number < selection.end:
                crops.append(warp(frame, matrices[number - selection.first]))
        while open_ and number + 1 >= open_[0][0].end:
            yield np.stack(open_.pop(0)[2])
        if not open_ and not waiting:
            return
    for _, _, crops in open_:  # the video ends within them
        if crops:
            yield np.stack(crops)


def stream_crops(path: str | os.PathLike, selection: Selection) -> Iterator[np.ndarray]:
    """The crops of one selection one by one, uint8 RGB (96, 96, 3): the memory does not grow with its length."""
    matrices, since = np.empty((0, 2, 3)), selection.first
    for number, frame in enumerate(frames_beside_sound(path)):
        if number >= selection.end:
            return
        if number < selection.first:
            continue
        if number >= since + len(matrices):
            since = number
            matrices = _matrices(Selection(number, min(number + AT_ONCE, selection.end), selection.track))
        yield warp(frame, matrices[number - since])


def warnings(track: Track) -> list[str]:
    """What makes the lips of a track hard to read, a line each."""
    found_points = [points for points in track.points if points is not None]
    points = np.stack(found_points[:: 1 + len(found_points) // 2000]).astype(np.float64)
    mouth = np.median(np.linalg.norm(points[:, PLACE[61]] - points[:, PLACE[291]], axis=1))
    eyes = points[:, PLACE[263]] - points[:, PLACE[33]]
    middle = (points[:, PLACE[263]] + points[:, PLACE[33]]) / 2
    aside = ((points[:, PLACE[2]] - middle) * eyes).sum(axis=1) / np.maximum((eyes**2).sum(axis=1), 1e-6)
    found = []
    if mouth < SMALL_MOUTH:
        found.append(f"the face is small: a mouth of {mouth:.0f} pixels, and {SMALL_MOUTH} are needed")
    if track.brightness and np.median(track.brightness) < DARK:
        found.append(f"the face is dark: grey value {np.median(track.brightness):.0f} of 255")
    if np.median(abs(aside)) > PROFILE:
        found.append("the face is seen from the side")
    return found


def _matrices(selection: Selection) -> np.ndarray:
    """(end − first, 2, 3): the track's maps, its ends held."""
    track = selection.track
    frames = np.clip(np.arange(selection.first, selection.end), track.first, track.end - 1)
    # The smoothing looks at its neighbours, so a part of a track has the maps of the whole one.
    low, high = max(track.first, frames[0] - SMOOTHING), min(track.end, frames[-1] + 1 + SMOOTHING)
    return crop_matrices(track.filled_points(low, high))[frames - low]
