"""From files to text: `transcribe(["clip.mp4", …], "runs/demo/run/model")`."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from llama_smop.data.lrs3 import load_clip
from llama_smop.data.media import MediaError, audio_path, streams
from llama_smop.data.transforms import ClipTransform
from llama_smop.evaluation.run import supported
from llama_smop.models import model_folder
from llama_smop.models.decoding import transcribe_long

logger = logging.getLogger(__name__)


def transcribe(
    paths: Sequence[str | Path], model: str | Path, *, modality: str | None = None, num_beams: int = 1
) -> Iterator[tuple[Path, str]]:
    """(path, text) of each clip in turn, as they are done. A long recording is cut at its quietest moments.

    A file that cannot be used is named in a warning and does not end the others.

    Args:
        paths: videos (their sound from the .wav beside them, else from the video itself), or sound files alone.
        model: a folder that training or `llama-smop convert` wrote.
        modality: "audio", "video" or "audiovisual"; by default all that both the model and the file have.

    Raises:
        ValueError: no model there, or a modality that it lacks. MediaError: a file that cannot be used, where it is
            the only one. ValueError: after the last one, how many could not be used.
    """
    loaded, processor = model_folder.load(model)
    known = supported(loaded)
    if modality is not None and modality not in known:
        raise ValueError(f"{model} takes {', '.join(known)}, not {modality}")
    failed = 0
    for path in map(Path, paths):
        try:
            text = _text(path, loaded, processor, modality or _richest(path, known), num_beams)
        except MediaError as error:
            if len(paths) == 1:
                raise
            logger.warning("%s", error)
            failed += 1
        else:
            yield path, text
    if failed:
        raise ValueError(f"{failed} of {len(paths)} files could not be transcribed; they are named above")


def _text(path: Path, model, processor, modality: str, num_beams: int) -> str:
    audio, video = load_clip(path, modality)
    pieces = transcribe_long(
        model, processor, audio=audio, video=video, transform=ClipTransform.testing(), num_beams=num_beams
    )
    try:
        return " ".join(piece.text for piece in pieces)
    except ValueError as error:  # what the processor says of a clip that the model cannot take
        raise MediaError(path, str(error)) from None


def _richest(path: Path, known: Sequence[str]) -> str:
    """The most that a file holds, and a model takes, by what is in the file."""
    held = set(streams(path)) | ({"audio"} if audio_path(path) != path else set())
    if held == {"audio", "video"}:
        return known[-1]
    if not held:
        raise MediaError(path, "has neither sound nor a picture")
    (only,) = held
    if only not in known:
        lacks = "picture" if only == "audio" else "sound"
        raise MediaError(path, f"has no {lacks}, and the model takes {', '.join(known)} only")
    return only
