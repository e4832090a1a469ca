"""A video of people to a mouth crop with its sound, as a file."""

import logging
import os
from pathlib import Path

import numpy as np

from llama_smop.data.faces.crop import Selection, crop_mouths, find_faces, warnings
from llama_smop.data.faces.sheet import write_sheet
from llama_smop.data.faces.speaker import choose, sound_envelope
from llama_smop.data.media import MediaError, audio_path, read_audio, streams, write_video
from llama_smop.models.units import SAMPLES_PER_VIDEO_FRAME

logger = logging.getLogger(__name__)


def crop_video(
    path: str | os.PathLike,
    out: str | os.PathLike,
    *,
    sheet: str | os.PathLike | None = None,
    face: str | int = "auto",
) -> Path:
    """Write the mouth of one face as an mp4 of 96×96 pixels, from the face's first frame to its last, with the sound.

    Args:
        sheet: a PNG to write too: frames with the faces marked, and the crops. It is written even where no face is.
        face: "auto", who speaks; "largest"; a number. What makes the lips hard to read is said in a warning.

    Returns:
        `out`.

    Raises:
        MediaError: the video cannot be read, or shows no such face. FaceModelError: the face models are not installed.
    """
    source = audio_path(path)
    sound = read_audio(source) if str(source) != str(path) or "audio" in streams(path) else None
    faces = find_faces(path)
    envelope = None if sound is None else sound_envelope(sound, faces.frames)
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
    crops = next(crop_mouths(path, [Selection(track.first, track.end, track)]))
    if sound is not None:
        sound = sound[track.first * SAMPLES_PER_VIDEO_FRAME : track.end * SAMPLES_PER_VIDEO_FRAME]
        sound = np.pad(sound, (0, len(crops) * SAMPLES_PER_VIDEO_FRAME - len(sound)))
    write_video(out, crops, audio=sound)
    return Path(out)
