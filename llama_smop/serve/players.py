"""Small files that a browser plays: the clip as it was heard, the mouth crops on the clip's own clock."""

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import cv2
import numpy as np

from llama_smop.data.media import stream_audio, stream_video, write_audio, write_video
from llama_smop.data.video_writer import write_frames
from llama_smop.models.units import AUDIO_RATE, SAMPLES_PER_VIDEO_FRAME, VIDEO_RATE
from llama_smop.serve.degraded import Given
from llama_smop.transcription.pieces import Piece

SHOWN_S = 120  # of a recording, at most
HEIGHT, WIDTH = 360, 640  # of the picture, at most
ENLARGED = 2  # pixels of the page for a pixel of a crop


def write_clip(path: str | os.PathLike, folder: Path, has_sound: bool, has_picture: bool, parts) -> str:
    """Write the beginning of a recording with the sound that the model was given; return the file's name.

    parts: (piece, what was given) in order. Raises MediaError.
    """
    sound = _heard(path, parts) if has_sound else None
    if not has_picture:
        write_audio(folder / "clip.wav", sound)
        return "clip.wav"
    write_frames(folder / "clip.mp4", _frames(path, has_sound), sound=None if sound is None else [sound])
    return "clip.mp4"


def write_crops(folder: Path, parts: Sequence[tuple[Piece, Given]]) -> str | None:
    """Write the crops as the model sees them, grey and 88×88, enlarged; None where it saw none."""
    seen = [(round(piece.start * VIDEO_RATE), given.seen) for piece, given in parts if given.seen is not None]
    frames = min(SHOWN_S * VIDEO_RATE, max((first + len(crops) for first, crops in seen), default=0))
    if not frames:
        return None
    side = seen[0][1].shape[1] * ENLARGED
    shown = np.zeros((frames, side, side, 3), np.uint8)
    for first, crops in seen:
        for place, crop in enumerate(crops[: max(0, frames - first)], first):
            grey = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY)
            shown[place] = cv2.resize(grey, (side, side), interpolation=cv2.INTER_NEAREST)[..., None]
    write_video(folder / "crop.mp4", shown)
    return "crop.mp4"


def _heard(path: str | os.PathLike, parts: Sequence[tuple[Piece, Given]]) -> np.ndarray:
    """The samples of the beginning, (n,), with the pieces as they were given."""
    blocks, count = [], 0
    for block in stream_audio(path):
        blocks.append(block)
        count += len(block)
        if count >= SHOWN_S * AUDIO_RATE:
            break
    sound = np.concatenate(blocks)[: SHOWN_S * AUDIO_RATE]
    for piece, given in parts:
        if given.heard is not None:
            first = round(piece.start * VIDEO_RATE) * SAMPLES_PER_VIDEO_FRAME
            room = sound[first : first + len(given.heard)]
            room[:] = given.heard[: len(room)]
    return sound / max(1.0, float(np.abs(sound).max(initial=0.0)))


def _frames(path: str | os.PathLike, has_sound: bool) -> Iterator[np.ndarray]:
    for frame in islice(stream_video(path, with_sound=has_sound), SHOWN_S * VIDEO_RATE):
        height, width = frame.shape[:2]
        scale = min(1.0, HEIGHT / height, WIDTH / width)
        size = tuple(max(2, round(side * scale / 2) * 2) for side in (width, height))
        yield frame if size == (width, height) else cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
