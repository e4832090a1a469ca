"""From files to text: `transcribe(["talk.mp4", …], "runs/demo/run/model")`."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

from llama_smop import files
from llama_smop.data.media import MediaError, files_of
from llama_smop.evaluation.run import supported
from llama_smop.models import model_folder
from llama_smop.models.units import WHISPER_RATE
from llama_smop.transcription import subtitles
from llama_smop.transcription.recording import Options, Piece, Recording

logger = logging.getLogger(__name__)

BAR_AFTER_S = 3  # work that is done sooner shows no progress


@dataclass
class Transcript:
    """What is said in a file.

    seconds: its length. warnings: what makes the transcript less than it could be. finished: False after Ctrl-C.
    """

    path: Path
    pieces: list[Piece] = field(default_factory=list)
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)
    finished: bool = True

    @property
    def text(self) -> str:
        return " ".join(piece.text for piece in self.pieces if piece.text)

    def as_json(self) -> dict:
        return {
            "file": str(self.path),
            "seconds": self.seconds,
            "text": self.text,
            "finished": self.finished,
            "warnings": self.warnings,
            "pieces": [asdict(piece) for piece in self.pieces],
        }


def transcribe(
    paths: Sequence[str | Path], model: str | Path, *, modality: str | None = None, num_beams: int = 1
) -> Iterator[tuple[Path, str]]:
    """(path, text) of each file in turn, as they are done: `transcripts` without what is known beside the text."""
    for transcript in transcripts(paths, model, Options(modality=modality, num_beams=num_beams)):
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
        ValueError: no model there, or a modality that it lacks. MediaError: a file that cannot be used, where it is
            the only one. ValueError: after the last one, how many could not be used.
    """
    options = options or Options()
    loaded, processor = model_folder.load(model)
    known = supported(loaded)
    if options.modality is not None and options.modality not in known:
        raise ValueError(f"{model} takes {', '.join(known)}, not {options.modality}")
    window = processor.audio_window / WHISPER_RATE
    failed = 0
    for path in map(Path, paths):
        transcript = Transcript(path)
        try:
            with _Bar(progress) as bar:
                recording = Recording(path, known, window, options, bar.show)
                transcript.seconds, transcript.warnings = recording.seconds, recording.warnings
                for piece in recording.transcribe(loaded, processor):
                    transcript.pieces.append(piece)
        except MediaError as error:
            if len(paths) == 1:
                raise
            logger.warning("%s", error)
            failed += 1
            continue
        except KeyboardInterrupt:
            transcript.finished = False
            yield transcript
            raise
        for line in transcript.warnings:
            logger.warning("%s: %s", path, line)
        yield transcript
    if failed:
        raise ValueError(f"{failed} of {len(paths)} files could not be transcribed; they are named above")


class _Bar:
    """A progress bar over the frames of a file, begun anew for each thing that is done with them."""

    def __init__(self, shown: bool):
        self._shown, self._doing = shown, ""
        self._bar: tqdm | None = None

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, doing: str, done: int, total: int) -> None:
        if self._bar is None or doing != self._doing:
            self.__exit__()
            self._doing = doing
            self._bar = tqdm(
                desc=doing, total=total or None, unit="frame", delay=BAR_AFTER_S, leave=False, disable=not self._shown
            )
        self._bar.update(done - self._bar.n)


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
                written to one place.
        """
        self._places: dict[tuple[Path, str], Path] = {}
        taken: dict[Path, Path] = {}
        for kind, place in (("srt", srt), ("vtt", vtt), ("json", json)):
            for path in map(Path, paths) if place is not None else ():
                target = place if len(paths) == 1 else place / f"{path.stem}.{kind}"
                real = files.check_file(target, [file for each in paths for file in files_of(each)])
                if real in taken:
                    raise ValueError(f"{target}: would hold the transcripts of {taken[real]} and of {path}")
                taken[real] = path
                self._places[path, kind] = target

    def write(self, transcript: Transcript) -> None:
        """Write what was asked for of one recording. Raises OSError."""
        cues = subtitles.cues((piece.start, piece.end, piece.text) for piece in transcript.pieces)
        writers = {
            "srt": lambda target: files.write_text(target, subtitles.srt(cues)),
            "vtt": lambda target: files.write_text(target, subtitles.vtt(cues)),
            "json": lambda target: files.write_json(target, transcript.as_json()),
        }
        for kind, write in writers.items():
            if (target := self._places.get((transcript.path, kind))) is not None:
                write(target)
