"""From files to text: `transcribe(["clip.mp4", …], "runs/demo/run/model")`."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from llama_smop import checkpoint
from llama_smop.data.lrs3 import load_clip
from llama_smop.data.media import MediaError
from llama_smop.data.transforms import ClipTransform
from llama_smop.evaluate import supported
from llama_smop.models.decoding import transcribe_long

SOUND_ONLY = (".wav", ".flac", ".mp3", ".ogg")


def transcribe(
    paths: Sequence[str | Path], model: str | Path, *, modality: str | None = None, num_beams: int = 1
) -> Iterator[tuple[Path, str]]:
    """(path, text) of each clip in turn, as they are done. A long recording is cut at its quietest moments.

    Args:
        paths: mp4 files (their sound from the .wav beside them, else from the mp4 itself), or sound files alone.
        model: a folder that training or `llama-smop convert` wrote.
        modality: "audio", "video" or "audiovisual"; by default all that both the model and the file have.

    Raises:
        ValueError: no model there, or a modality that it lacks. MediaError: a file that cannot be used.
    """
    loaded, processor = checkpoint.load(model)
    known = supported(loaded)
    if modality is not None and modality not in known:
        raise ValueError(f"{model} takes {', '.join(known)}, not {modality}")
    for path in map(Path, paths):
        wanted = modality or _richest(path, known)
        audio, video = load_clip(path, wanted)
        pieces = transcribe_long(
            loaded, processor, audio=audio, video=video, transform=ClipTransform.testing(), num_beams=num_beams
        )
        yield path, " ".join(piece.text for piece in pieces)


def _richest(path: Path, known: Sequence[str]) -> str:
    if path.suffix.lower() in SOUND_ONLY:
        if "audio" not in known:
            raise MediaError(path, f"has no picture, and the model takes {', '.join(known)} only")
        return "audio"
    return known[-1]
