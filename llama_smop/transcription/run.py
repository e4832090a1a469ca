"""From files to text: `transcribe(["talk.mp4", …], "runs/demo/run/model")`."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from llama_smop.data.media import MediaError, files_of
from llama_smop.models import model_folder
from llama_smop.models.rates import Rate
from llama_smop.system import files
from llama_smop.transcription import subtitles
from llama_smop.transcription.attempts import Transcript, attempts
from llama_smop.transcription.ranks import Ranks
from llama_smop.transcription.recording import Options

logger = logging.getLogger(__name__)

FORMATS = {"srt": "SubRip", "vtt": "WebVTT", "json": "JSON"}


def transcribe(
    paths: Sequence[str | Path],
    model: str | Path,
    *,
    modality: str | None = None,
    num_beams: int = 1,
    rate: Rate | str | None = None,
) -> Iterator[tuple[Path, str]]:
    """(path, text) of each file in turn, as they are done: `transcripts` without what is known beside the text."""
    for transcript in transcripts(paths, model, Options(modality=modality, num_beams=num_beams, rate=rate)):
        yield transcript.path, transcript.text


def transcripts(
    paths: Sequence[str | Path], model: str | Path, options: Options | None = None, progress: bool = False
) -> Iterator[Transcript]:
    """The transcript of each file in turn, as they are done.

    A file that cannot be used is named in a warning and does not end the others. Where Ctrl-C ends one, what was done
    of it comes first.

    Args:
        paths: videos (their sound from the .wav beside them, else from the video itself), or sound files alone.
        model: a folder that training or `llama-smop convert` wrote.
        progress: show a bar on standard error where it takes long.

    Raises:
        ValueError: no model there, a modality or rate that it lacks, or no Whisper for word times. MediaError: a file
            that cannot be used, where it is the only one. ValueError: after the last one, how many could not be used.
    """
    failed = 0
    for found in attempts(paths, *model_folder.load(model), options, progress):
        if not isinstance(found, Transcript) and len(paths) == 1:
            raise found
        if _told(found):
            yield found
        else:
            failed += 1
    _count(failed, len(paths))


def share_out(
    paths: Sequence[Path], model: str | Path, options: Options, outputs: "Outputs", here: Ranks
) -> Iterator[Transcript]:
    """As `transcripts`, by the processes of torchrun, all of which must call this.

    Each transcribes its share and writes it to `outputs` as it goes. The first process then yields all transcripts in
    order, and raises what `transcripts` raises at the end.
    """
    own = [paths[index] for index in here.share(paths)]
    found: dict[Path, Transcript] = {}
    for attempt in attempts(own, *model_folder.load(model, here.device), options, progress=here.rank == 0):
        if _told(attempt):
            outputs.write(attempt)
            found[attempt.path] = attempt
    found = here.gathered(found)
    if here.rank == 0:
        yield from (found[path] for path in paths if path in found)
        _count(sum(path not in found for path in paths), len(paths))


def _told(found: Transcript | MediaError) -> bool:
    """Whether it is a transcript. Its warnings, or why there is none, are logged."""
    if not isinstance(found, Transcript):
        logger.warning("%s", found)
        return False
    for line in found.warnings:
        logger.warning("%s: %s", found.path, line)
    return True


def _count(failed: int, files: int) -> None:
    if failed:
        raise ValueError(f"{failed} of {files} files could not be transcribed; they are named above")


class Outputs:
    """Where transcripts are written beside the text: SRT, WebVTT and JSON, each to a file.

    With several recordings each place is a folder, and the files in it are named after the recordings.
    """

    def __init__(
        self, paths: Sequence[Path], srt: Path | None = None, vtt: Path | None = None, json: Path | None = None
    ):
        """Check every place, before anything is computed.

        Raises:
            OSError: a place that cannot be written, or is one of the recordings. ValueError: two files that would be
                written to one place; a name that says another of the formats.
        """
        self._places: dict[tuple[Path, str], Path] = {}
        taken: dict[Path, Path] = {}
        for kind, place in (("srt", srt), ("vtt", vtt), ("json", json)):
            for path in map(Path, paths) if place is not None else ():
                target = place if len(paths) == 1 else place / f"{path.stem}.{kind}"
                if target.suffix.lower() in [f".{other}" for other in FORMATS]:
                    files.check_suffix(target, FORMATS[kind], f".{kind}")
                real = files.check_file(target, [file for each in paths for file in files_of(each)])
                if real in taken:
                    raise ValueError(
                        f"{target}: would hold the transcripts of {taken[real]} and of {path}; name other places, or "
                        "transcribe the two in commands of their own"
                    )
                taken[real] = path
                self._places[path, kind] = target

    def written(self, transcripts: Iterable[Transcript]) -> Iterator[Transcript]:
        """The same transcripts, each once it is written."""
        for transcript in transcripts:
            self.write(transcript)
            yield transcript

    def write(self, transcript: Transcript) -> None:
        """Write what was asked for of one recording. Raises OSError."""
        cues = subtitles.cues((piece.start, piece.end, piece.text, piece.words) for piece in transcript.pieces)
        writers = {
            "srt": lambda target: files.write_text(target, subtitles.srt(cues)),
            "vtt": lambda target: files.write_text(target, subtitles.vtt(cues)),
            "json": lambda target: files.write_json(target, transcript.as_json()),
        }
        for kind, write in writers.items():
            if (target := self._places.get((transcript.path, kind))) is not None:
                write(target)
