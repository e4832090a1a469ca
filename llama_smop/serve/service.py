"""One job: from a file and the switches to transcripts, and to what a page shows of them."""

import json
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

from llama_smop.data.media import MediaError, streams
from llama_smop.data.noise import NoiseSource
from llama_smop.evaluation.run import supported
from llama_smop.models import model_folder
from llama_smop.models.units import MODALITIES, VIDEO_RATE, WHISPER_RATE
from llama_smop.serve.babble import OwnVoice
from llama_smop.serve.degraded import BLURS, SNRS, Degraded, Given
from llama_smop.serve.experts import ExpertTimes, expert_times
from llama_smop.transcription import subtitles
from llama_smop.transcription.attempts import AT_ONCE, Transcript, without_words
from llama_smop.transcription.pieces import Joint, Piece, transcribe_clips
from llama_smop.transcription.recording import Options, Recording
from llama_smop.transcription.word_times import find_aligner

Progress = Callable[[str, int, int], None]
LEAST_BYTES = 64  # a recording that was stopped at once has 0 or 1
STOPPED_AT_ONCE = "The recording is empty: it was stopped before anything was recorded. Record for a second or more."


class Refused(ValueError):
    """A job that cannot be done; its text is for the visitor. field: the setting at fault, if one is."""

    def __init__(self, text: str, field: str | None = None):
        super().__init__(text)
        self.field = field


@dataclass(frozen=True)
class Switches:
    """What the visitor asks for.

    modality: "audio", "video", "audiovisual"; None = all that the model and the recording have. compare: each sense by
    itself too. snr: of babble in decibels, None = none. blur: of the mouth in pixels of the crop. face: as in
    `Options`.

    Raises:
        Refused: a value out of bounds.
    """

    modality: str | None = None
    compare: bool = False
    snr: float | None = None
    blur: float = 0.0
    face: str | int = "auto"

    def __post_init__(self):
        if self.modality is not None and self.modality not in MODALITIES:
            raise Refused(f"modality takes {', '.join(MODALITIES)}, got {self.modality!r}", "modality")
        for name, value, (low, high) in (("snr", self.snr, SNRS), ("blur", self.blur, BLURS)):
            if value is not None and not low <= value <= high:
                raise Refused(f"{name} takes {low:g} to {high:g}, got {value:g}", name)
        if not (self.face in ("auto", "largest") or (isinstance(self.face, int) and self.face >= 0)):
            raise Refused(f"face takes auto, largest or a number, got {self.face!r}", "face")


@dataclass
class Outcome:
    """Of one job.

    name: the recording's, as the visitor knows it. transcripts: by modality, what was asked for first. parts: of that
    one, each piece and what the model was given. has_sound, has_picture: of the file.
    """

    name: str
    switches: Switches
    transcripts: dict[str, Transcript]
    has_sound: bool
    has_picture: bool
    parts: list[tuple[Piece, Given]] = field(default_factory=list)
    experts: list[ExpertTimes] = field(default_factory=list)

    @property
    def transcript(self) -> Transcript:
        return next(iter(self.transcripts.values()))

    @property
    def cues(self) -> list[subtitles.Cue]:
        return subtitles.cues((piece.start, piece.end, piece.text, piece.words) for piece in self.transcript.pieces)

    def as_json(self, model: str) -> str:
        others = {modality: transcript.text for modality, transcript in self.transcripts.items()}
        content = self.transcript.as_json() | {"model": model, "switches": asdict(self.switches), "texts": others}
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


class Service:
    """A model, and one job at a time for everybody.

    Attributes:
        name: of the model. known: the modalities that it takes. longest_s: of a recording.
        times_words: whether words get times.
    """

    def __init__(
        self,
        folder: str | Path,
        noise: NoiseSource | None = None,
        longest_s: float = 1800.0,
        word_times: bool = False,
        aligner: str | Path | None = None,
    ):
        """Load the model.

        Args:
            noise: what babble is made of; None = the recording's own sound.
            word_times, aligner: as in `Options`.

        Raises:
            ValueError: no model there; no Whisper for word times.
        """
        self.model, self.processor = model_folder.load(folder)
        self.folder = Path(folder)
        real = self.folder.resolve()
        self.name = f"{real.parent.name}/{real.name}" if real.name == "model" else real.name
        self.known = supported(self.model)
        self.longest_s = longest_s
        self._noise = noise
        self._aligner = find_aligner(self.model, aligner) if word_times else None
        self.times_words = self._aligner is not None
        if word_times and not self.times_words:
            raise ValueError(
                "--word-times: the model does not record the Whisper of its audio tower; name one with --aligner"
            )
        self._turn = threading.Lock()

    def run(
        self,
        path: str | Path,
        name: str,
        switches: Switches,
        *,
        views: bool = False,
        progress: Progress = lambda what, done, total: None,
    ) -> Outcome:
        """Transcribe a file, once the jobs before are done.

        Args:
            path: the file; `name`: what the visitor calls it, which is shown and never a path.
            views: keep what the page shows beside the text.
            progress: as in `Recording`; what it raises ends the job.

        Raises:
            Refused: the file or the switches cannot be used.
        """
        if Path(path).stat().st_size < LEAST_BYTES:
            raise Refused(STOPPED_AT_ONCE, "file")
        if switches.modality is not None and switches.modality not in self.known:
            raise Refused(f"this model takes {', '.join(self.known)}, not {switches.modality}", "modality")
        with self._turn:
            try:
                return self._run(Path(path), Path(name).name, switches, views, progress)
            except MediaError as error:
                raise Refused(f"{Path(name).name}: {error.reason}", "file") from None

    def _run(self, path: Path, name: str, switches: Switches, views: bool, progress: Progress) -> Outcome:
        held = streams(path)

        def checked(what: str, done: int, total: int) -> None:
            if done > self.longest_s * VIDEO_RATE:
                raise Refused(f"{name}: is longer than {self.longest_s / 60:g} minutes, the most that is taken", "file")
            progress(what, done, total)

        window = self.processor.audio_window / WHISPER_RATE
        recording = Recording(
            path, self.known, window, Options(modality=switches.modality, face=switches.face), checked
        )
        noise = None
        if switches.snr is not None and "audio" in held:
            noise = self._noise or OwnVoice(path)
        outcome = Outcome(name, switches, {}, "audio" in held, "video" in held)
        for alone in self._asked(switches, held):
            degraded = Degraded(noise, switches.snr, switches.blur, keep=views and not outcome.transcripts)
            pieces = list(self._pieces(recording, degraded, alone, checked))
            used = {piece.modality for piece in pieces}
            asked = alone or max(used, key=MODALITIES.index, default=switches.modality or self._heard(held))
            if asked in outcome.transcripts or (alone is not None and not pieces):
                continue
            warnings = [*recording.warnings, *(without_words(pieces) if self.times_words else ())]
            outcome.transcripts[asked] = Transcript(Path(name), pieces, recording.seconds, warnings)
            if degraded.keep:
                outcome.parts = list(zip(pieces, degraded.given, strict=True))
        for piece, given in outcome.parts:
            outcome.experts += expert_times(self.model, self.processor, given.streams, piece.start, piece.end)
        return outcome

    def _pieces(
        self, recording: Recording, degraded: Degraded, alone: str | None, progress: Progress
    ) -> Iterator[Piece]:
        clips, joint = recording.clips(self.processor, degraded, alone), Joint()
        while batch := list(islice(clips, AT_ONCE)):
            pieces = transcribe_clips(batch, self.model, self.processor, aligner=self._aligner, scored=True)
            for clip, piece in zip(batch, pieces, strict=True):
                progress("transcribing", round(piece.end * VIDEO_RATE), round(recording.seconds * VIDEO_RATE))
                yield joint(piece, clip.overlap)

    def _heard(self, held: tuple[str, ...]) -> str:
        """What a recording without a piece counts as: nothing was heard, or, of a silent one, seen."""
        return next(modality for modality in (*held, *self.known) if modality in self.known)

    def _asked(self, switches: Switches, held: tuple[str, ...]) -> tuple[str | None, ...]:
        """What to transcribe with: all there is, then each sense alone where they are compared."""
        both = len(held) == 2 and len(self.known) == len(MODALITIES)
        return (None, "audio", "video") if switches.compare and both else (None,)


def minutes(seconds: float) -> str:
    """1:02.5"""
    whole, tenths = divmod(math.floor(seconds * 10 + 0.5), 10)
    return f"{whole // 60}:{whole % 60:02d}.{tenths}"
