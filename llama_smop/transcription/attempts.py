"""Recordings to transcripts: read ahead by threads, transcribed in batches, each with its result or its error."""

import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import av
from tqdm import tqdm

from llama_smop.data.container import naming, open_container
from llama_smop.data.media import MediaError
from llama_smop.evaluation.run import supported
from llama_smop.models.units import VIDEO_RATE, WHISPER_RATE
from llama_smop.transcription.pieces import Clip, Joint, Piece, transcribe_clips
from llama_smop.transcription.prefetch import Ahead
from llama_smop.transcription.recording import LONGEST_S, Options, Recording
from llama_smop.transcription.word_times import find_aligner

ASKED_FOR = ("words", "written")  # of a piece
BAR_AFTER_S = 3  # work that is done sooner shows no progress
AT_ONCE, AT_ONCE_ON_GPU = 4, 16  # pieces in a batch
WORKERS, WORKERS_FOR_GPU = 1, 4


@dataclass
class Transcript:
    """What is said in a file.

    seconds: its length. warnings: what makes the transcript less than it could be. finished: False where
    Ctrl-C ended it.
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
            "pieces": [
                {key: value for key, value in asdict(piece).items() if key not in ASKED_FOR or value is not None}
                for piece in self.pieces
            ],
        }


@dataclass
class _Job:
    """A file on its way. short: whether its length alone says that it is one piece; left: clips without their text."""

    transcript: Transcript
    short: bool = False
    error: MediaError | None = None
    read: bool = False
    left: int = 0
    joint: Joint = field(default_factory=Joint)

    @property
    def done(self) -> bool:
        return self.read and not self.left


def attempts(
    paths: Sequence[str | Path], model, processor, options: Options | None = None, progress: bool = False
) -> Iterator[Transcript | MediaError]:
    """For each file in turn, as they are done, its transcript or why it has none; with a model that is loaded.

    Files are read and their faces found in threads while the model works. Pieces go through the model in batches: those
    of a long recording, and those of short ones that follow each other. Where Ctrl-C ends it, what was done of the
    files that were begun comes first.

    Args:
        options, progress: as in `run.transcripts`.

    Raises:
        TypeError: one path instead of several. ValueError: a modality or a rate that the model lacks, or no Whisper for
            word times.
    """
    if isinstance(paths, str | os.PathLike):
        raise TypeError(f"expected a list of files, got one path; write [{os.fspath(paths)!r}]")
    options = options or Options()
    rate = model.config.rate(options.rate)
    known = supported(model)
    if options.modality is not None and options.modality not in known:
        raise ValueError(f"the model takes {', '.join(known)}, not {options.modality}")
    aligner = find_aligner(model, options.aligner) if options.word_times else None
    on_gpu = model.device.type != "cpu"
    at_once = options.pieces_at_once or (AT_ONCE_ON_GPU if on_gpu else AT_ONCE)
    workers = options.workers or (WORKERS_FOR_GPU if on_gpu else WORKERS)
    window = processor.audio_window / WHISPER_RATE
    jobs = [_Job(Transcript(Path(path))) for path in paths]
    waiting: list[tuple[_Job, Clip]] = []  # for the next batch
    given = 0  # jobs whose result was yielded

    def read(job: _Job) -> Iterator[bool | Recording | Clip | MediaError]:
        """In a thread: whether the file is short, what was found in it, then its clips."""
        path = job.transcript.path

        def report(what: str, frames: int, total: int) -> None:
            ahead.check()
            bar.show(path, what, frames, total)

        try:
            yield _is_short(path)
            recording = Recording(path, known, window, options, report)
            yield recording
            yield from recording.clips(processor)
        except MediaError as error:
            yield error

    def take(job: _Job, item: bool | Recording | Clip | MediaError) -> None:
        if isinstance(item, bool):
            job.short = item
            if not item:  # short ones wait for each other, but not for a long one to be looked through
                clear()
        elif isinstance(item, Recording):
            job.transcript.seconds, job.transcript.warnings = item.seconds, item.warnings
        elif isinstance(item, MediaError):
            job.error = item
        else:
            job.left += 1
            waiting.append((job, item))
            if len(waiting) == at_once:
                clear()

    def clear() -> None:
        """Transcribe what waits."""
        clips = [clip for _, clip in waiting]
        pieces = transcribe_clips(clips, model, processor, options.num_beams, aligner, options.settings, rate)
        for (job, clip), piece in zip(waiting, pieces, strict=True):
            job.transcript.pieces.append(job.joint(piece, clip.overlap))
            job.left -= 1
            ends = [round(seconds * VIDEO_RATE) for seconds in (piece.end, job.transcript.seconds)]
            bar.show(job.transcript.path, "transcribing", *ends)
        waiting.clear()

    def result(job: _Job) -> Transcript | MediaError:
        if job.error is not None:
            return job.error
        if options.word_times:
            could = aligner is not None or known == ("video",)
            job.transcript.warnings += without_words(job.transcript.pieces, could)
        return job.transcript

    def finished() -> Iterator[Transcript | MediaError]:
        nonlocal given
        while given < len(jobs) and jobs[given].done:
            given += 1
            bar.file_done(given, jobs)
            yield result(jobs[given - 1])

    ahead = Ahead([partial(read, job) for job in jobs], workers, room=at_once + workers)
    with _Bar(progress, jobs) as bar:
        try:
            with ahead:
                for job, items in zip(jobs, ahead, strict=True):
                    for item in items:
                        take(job, item)
                        yield from finished()
                    job.read = True
                    if not job.short:
                        clear()
                    yield from finished()
                clear()
                yield from finished()
        except KeyboardInterrupt:
            begun = [job for job in jobs[given:] if job.transcript.pieces]
            for job in begun or jobs[given : given + 1]:
                job.transcript.finished = job.done
                yield result(job)
            raise


def _is_short(path: Path) -> bool:
    """Whether the file says that it is no longer than a piece; False where it does not say."""
    try:
        with naming(path), open_container(path, None) as container:
            return container.duration is not None and container.duration <= LONGEST_S * av.time_base
    except MediaError:
        return True  # nothing will come of it


def without_words(pieces: Sequence[Piece], could: bool = True) -> list[str]:
    """The warning, if one is due, that words of pieces have no times. could: nothing is lacking that finds them."""
    if not any(piece.text and piece.words is None for piece in pieces):
        return []
    if could:
        return ["words have no times where only lips were read, or where more was written than Whisper's decoder takes"]
    return [
        "words have no times: the model does not record the Whisper that its audio tower is from; name one with "
        "--aligner"
    ]


class _Bar:
    """Progress, from any thread: over the frames of the only file, begun anew for each thing done with them, or over
    the files, with what is done of the next to be finished."""

    def __init__(self, shown: bool, jobs: Sequence[_Job]):
        self._shown, self._files, self._doing = shown, len(jobs), ""
        self._next = jobs[0].transcript.path if jobs else None
        self._bar: tqdm | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> "_Bar":
        if self._files > 1:
            self._begin("transcribe", self._files, "file")
        return self

    def __exit__(self, *error) -> None:
        if self._bar is not None:
            self._bar.close()

    def _begin(self, what: str, total: int | None, unit: str) -> None:
        self.__exit__()
        self._bar = tqdm(
            desc=what, total=total, unit=unit, delay=BAR_AFTER_S, miniters=0, leave=False, disable=not self._shown
        )

    def show(self, path: Path, doing: str, done: int, total: int) -> None:
        with self._lock:
            if self._files == 1:
                if self._bar is None or doing != self._doing:
                    self._doing = doing
                    self._begin(doing, total or None, "frame")
                self._bar.update(done - self._bar.n)
            elif path == self._next and self._bar is not None:
                share = f" {done / total:.0%}" if total else ""
                self._bar.set_postfix_str(f"{path.name}: {doing}{share}", refresh=False)
                self._bar.update(0)

    def file_done(self, done: int, jobs: Sequence[_Job]) -> None:
        """The first `done` files are; hide, since their text may be printed now."""
        with self._lock:
            if self._files > 1 and self._bar is not None:
                self._next = jobs[min(done, len(jobs) - 1)].transcript.path
                self._bar.update(done - self._bar.n)
                self._bar.clear()
            elif self._bar is not None:
                self.__exit__()
                self._bar = None
