"""A video of people to a mouth crop with its sound, as a file."""

import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from llama_smop.data.faces.crop import Selection, find_faces, stream_crops, warnings
from llama_smop.data.faces.sheet import check_sheet, write_sheet
from llama_smop.data.faces.speaker import SILENCE, choose, stream_envelope
from llama_smop.data.media import MediaError, audio_path, stream_audio, streams
from llama_smop.data.video_writer import check_name, write_frames
from llama_smop.models.units import SAMPLES_PER_VIDEO_FRAME

logger = logging.getLogger(__name__)

BAR_AFTER_S = 3  # work that is done sooner shows no progress


def sound_of(path: str | os.PathLike) -> Path | None:
    """The file that holds a video's sound, None where it has none. Raises MediaError."""
    source = audio_path(path)
    return source if str(source) != str(path) or "audio" in streams(path) else None


def crop_video(
    path: str | os.PathLike,
    out: str | os.PathLike,
    *,
    sheet: str | os.PathLike | None = None,
    face: str | int = "auto",
    progress: bool = False,
) -> Path:
    """Write the mouth of one face as an mp4 of 96×96 pixels, from the face's first frame to its last, with the sound.

    Memory grows with the length of the video by the landmarks alone.

    Args:
        sheet: a PNG to write too: frames with the faces marked, and the crops. It is written even where no face is.
        face: "auto", who speaks; "largest"; a number. What makes the lips hard to read is said in a warning.
        progress: show a bar on standard error where it takes long.

    Returns:
        `out`.

    Raises:
        MediaError: the video cannot be read, or shows no such face. FaceModelError: the face models are not installed.
        ValueError: `out` or `sheet` has the name of another format.
    """
    check_name(out)
    if sheet is not None:
        check_sheet(sheet)
    source = sound_of(path)
    envelope = None if source is None else np.concatenate([*stream_envelope(stream_audio(source))])
    with tqdm(desc="looking", unit="frame", delay=BAR_AFTER_S, leave=False, disable=not progress) as bar:
        faces = find_faces(path, progress=bar.update)
    if envelope is not None:
        envelope = np.pad(envelope, (0, max(0, faces.frames - len(envelope))), constant_values=SILENCE)
    try:
        chosen = choose(faces.tracks, 0, faces.frames, envelope, face) if faces.tracks else None
    except ValueError as error:
        raise MediaError(path, str(error)) from None
    if sheet is not None:
        write_sheet(path, faces, chosen, sheet)
    if chosen is None:
        raise MediaError(path, "shows no face")
    track = faces.tracks[chosen]
    for line in warnings(track):
        logger.warning("%s: face %d: %s", path, chosen, line)
    crops = stream_crops(path, Selection(track.first, track.end, track))
    total = track.end - track.first
    with tqdm(crops, desc="cropping", total=total, unit="frame", delay=BAR_AFTER_S, disable=not progress) as shown:
        sound = None if source is None else cut_blocks(stream_audio(source), track.first, track.end)
        write_frames(out, shown, sound=sound, fine=True)
    return Path(out)


def cut_blocks(blocks: Iterable[np.ndarray], first: int, end: int) -> Iterator[np.ndarray]:
    """The samples of the video frames from `first` to before `end`, of sound in blocks; silence beyond its end."""
    skip, left = first * SAMPLES_PER_VIDEO_FRAME, (end - first) * SAMPLES_PER_VIDEO_FRAME
    for block in blocks:
        part = block[skip : skip + left]
        skip, left = max(0, skip - len(block)), left - len(part)
        yield part
        if not left:
            return
    while left:
        yield np.zeros(min(left, SAMPLES_PER_VIDEO_FRAME), np.float32)
        left -= min(left, SAMPLES_PER_VIDEO_FRAME)
