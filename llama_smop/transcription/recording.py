"""A recording of any length to pieces of text with times: cut in silence, faces found, lips cropped, transcribed."""

import math
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from llama_smop.data.faces.speaker import choose, sound_envelope
from llama_smop.data.media import VIDEO_SIZE, MediaError, audio_path, stream_audio, stream_video, streams
from llama_smop.data.transforms import ClipTransform
from llama_smop.models.rates import Rate
from llama_smop.models.units import SAMPLES_PER_VIDEO_FRAME, VIDEO_RATE
from llama_smop.system.extras import remedy
from llama_smop.transcription.cutting import cut_prepared, cut_sound, frames_of
from llama_smop.transcription.pieces import Clip, Piece
from llama_smop.transcription.voice_activity import JOIN_S, RATE, STEP, Span, speech_pieces, speech_probabilities

LONGEST_S = 16.0  # of a piece: what LRS3 is trained in
ENDS_TOGETHER_S = 0.5  # that the sound may go on after the picture without being a piece of its own


@dataclass(frozen=True)
class Options:
    """How to transcribe.

    modality: "audio", "video", "audiovisual"; None = all that both the model and the recording have.
    face: "auto" (who speaks), "largest", or the number of a face.
    prepared: whether the picture is a mouth crop already; None = it is where it has 96×96 pixels.
    pieces_at_once: pieces in a batch, of one recording or of several short ones; None = 4, on a GPU 16.
    workers: recordings that are read and cropped ahead at the same time; None = 1, on a GPU 4.
    word_times: whether to find when each word is said. aligner: the Whisper model that finds it, a hub name or folder;
        None = the one that the model's audio tower comes from.
    rate: the compression rate, a pair or "16,5"; None = the model's default.
    settings: further ones of `generate`.
    """

    modality: str | None = None
    face: str | int = "auto"
    prepared: bool | None = None
    num_beams: int = 1
    pieces_at_once: int | None = None
    workers: int | None = None
    word_times: bool = False
    aligner: str | Path | None = None
    rate: Rate | str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def usable(path: str | os.PathLike, known: Sequence[str], wanted: str | None = None) -> tuple[Path | None, bool]:
    """The file that holds the sound, or None, and whether there is a picture, of what the model can be given.

    Args:
        known: the modalities that the model takes. wanted: the only one to use.

    Raises:
        MediaError: the file has nothing for the model.
    """
    path = Path(path)
    held = set(streams(path))
    sound = audio_path(path) if "video" in held else path
    if sound != path:
        held.add("audio")
    if not held:
        raise MediaError(path, "has neither sound nor a picture")
    takes = known if wanted is None else (wanted,)
    hears = "audio" in held and any(modality != "video" for modality in takes)
    sees = "video" in held and any(modality != "audio" for modality in takes)
    if not (hears or sees) or (wanted == "audiovisual" and not (hears and sees)):
        lacks = "sound" if "audio" not in held else "picture"
        asks = f"the model takes {', '.join(known)} only" if wanted is None else f"{wanted} was asked for"
        raise MediaError(path, f"has no {lacks}, and {asks}")
    return sound if hears else None, sees


class Recording:
    """One file, looked through once when it is made; `transcribe` then gives its pieces in order.

    Attributes:
        seconds: its length. warnings: a line for everything that makes the transcript less than it could be.
        parts: (span, number of the face to read lips of, or None) of each piece.
        tracks: the faces.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        known: Sequence[str],
        window: float,
        options: Options | None = None,
        progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    ):
        """Find the speech and the faces.

        Args:
            known: the modalities that the model takes. window: seconds of sound that it takes at most.
            progress: called with what is being done, frames done and frames in all, 0 where not known.

        Raises:
            MediaError: a file that cannot be read, or has nothing for this model; no such face; lips are to be read,
                and the models that find faces are not installed.
        """
        self.path, self.options, self.warnings = Path(path), options or Options(), []
        self._known, self._progress = known, progress
        self._longest = min(LONGEST_S, window)
        self._sound, self._picture = usable(path, known, self.options.modality)
        self._prepared = "video" in streams(path) and self._is_prepared()
        self.tracks: list = []
        self.seconds = 0.0
        self._envelope: np.ndarray | None = None
        self._probabilities: np.ndarray | None = None  # of speech, every 32 ms
        speech = self._listen() if self._sound is not None else None
        shown = self._look() if self._picture else 0
        self._picture = self._picture and (self._prepared or bool(self.tracks))
        heard, self.seconds = self.seconds, max(self.seconds, shown / VIDEO_RATE)
        spans = self._by_sight(shown) if speech is None else self._by_sound(speech)
        if self._picture and speech is not None:
            spans = _divided(spans, shown / VIDEO_RATE)
        if self._prepared and self.seconds <= window:  # one clip, as in training
            end = shown / VIDEO_RATE if self._picture else heard
            spans = [Span(0.0, end), *(span for span in spans if span.start >= end)]
        try:
            self.parts = [part for span in spans for part in self._by_face(span)]
        except ValueError as error:  # no such face
            raise MediaError(path, str(error)) from None
        if not self.parts:
            self.warnings.append("no speech was found")
        if self.tracks:
            self._warn_of_faces()

    # -- what there is ---------------------------------------------------------------------------------------------

    def _is_prepared(self) -> bool:
        if self.options.prepared is not None:
            return self.options.prepared
        return next(iter(stream_video(self.path))).shape[:2] == (VIDEO_SIZE, VIDEO_SIZE)

    def _listen(self) -> list[Span]:
        """Where speech is. Finds the loudness of every video frame too."""
        levels, samples, left = [], 0, np.zeros(0, np.float32)

        def blocks() -> Iterator[np.ndarray]:
            nonlocal samples, left
            for block in stream_audio(self._sound):
                samples += len(block)
                left = np.concatenate([left, block])
                whole = len(left) // SAMPLES_PER_VIDEO_FRAME
                levels.append(sound_envelope(left, whole))
                left = left[whole * SAMPLES_PER_VIDEO_FRAME :]
                self._progress("listening", samples // SAMPLES_PER_VIDEO_FRAME, 0)
                yield block

        probabilities = array("f")

        def noted() -> Iterator[float]:
            for probability in speech_probabilities(blocks()):
                probabilities.append(probability)
                yield probability

        # A frame shorter than the model takes, since both ends are moved to the next frame.
        spans = list(speech_pieces(noted(), self._longest - 1 / VIDEO_RATE))
        self._probabilities = np.array(probabilities, np.float32)
        self.seconds = math.ceil(samples / SAMPLES_PER_VIDEO_FRAME) / VIDEO_RATE
        self._envelope = np.concatenate([*levels, sound_envelope(left, 1)])
        return [replace(span, end=min(span.end, self.seconds)) for span in spans]

    def _look(self) -> int:
        """How many frames there are. Finds the faces, where the picture is no mouth crop."""
        total, done = math.ceil(self.seconds * VIDEO_RATE), 0

        def progress(step: int) -> None:
            nonlocal done
            done += step
            self._progress("looking", done, total)

        if self._prepared:
            for _ in stream_video(self.path, with_sound=audio_path(self.path) == self.path):
                progress(1)
            return done
        needed = self._sound is None or self.options.modality == "audiovisual"
        try:
            from llama_smop.data.faces.crop import find_faces
            from llama_smop.data.faces.model_files import FaceModelError
        except ModuleNotFoundError as error:
            return self._unseen(remedy(error.name), needed)
        try:
            faces = find_faces(self.path, progress=progress)
        except FaceModelError as error:
            return self._unseen(str(error), needed)
        if not faces.tracks:
            if needed:
                raise MediaError(self.path, "shows no face, and lips are to be read")
            self.warnings.append("no face was found: only the sound is used")
        self.tracks = faces.tracks
        return faces.frames

    def _unseen(self, reason: str, needed: bool) -> int:
        if needed:
            raise MediaError(self.path, reason)
        self.warnings.append(f"the picture is not used: {reason}")
        return 0

    def _by_sound(self, speech: list[Span]) -> list[Span]:
        """Pieces of speech; all of a short recording that is hardly more than its speech, as in training."""
        edges = [0.0, *(edge for span in speech for edge in (span.start, span.end)), self.seconds]
        pauses = [b - a for a, b in zip(edges[::2], edges[1::2], strict=True)]
        if speech and self.seconds <= self._longest and max(pauses) < JOIN_S:
            return [Span(0.0, self.seconds)]
        return speech

    def _by_sight(self, frames: int) -> list[Span]:
        """Pieces where nothing is heard: the frames that show a face, cut evenly."""
        shown: list[tuple[int, int]] = [(0, frames)] if self._prepared else []
        for track in self.tracks:
            if shown and track.first <= shown[-1][1]:
                shown[-1] = (shown[-1][0], max(shown[-1][1], track.end))
            else:
                shown.append((track.first, track.end))
        spans = []
        for first, end in shown:
            parts = math.ceil((end - first) / math.floor(self._longest * VIDEO_RATE))
            edges = np.linspace(first, end, parts + 1).round() / VIDEO_RATE
            spans += [Span(float(a), float(b)) for a, b in pairwise(edges)]
        return spans

    # -- whose lips ------------------------------------------------------------------------------------------------

    def _by_face(self, span: Span) -> list[tuple[Span, int | None]]:
        """A span, divided where the face to read is not seen for long."""
        if not self.tracks:
            return [(span, None)]
        from llama_smop.data.faces.tracker import PATIENCE

        first, end = frames_of(span)
        heard = self._envelope
        if heard is not None and end > len(heard):
            heard = np.pad(heard, (0, end - len(heard)), constant_values=heard.min(initial=0.0))
        number = choose(self.tracks, first, end, heard, self.options.face)
        if number is None:
            return [(span, None)]
        seen = self.tracks[number]
        before: list[tuple[Span, int | None]] = []
        after: list[tuple[Span, int | None]] = []
        if seen.first - first > PATIENCE:
            before = self._by_face(replace(span, end=seen.first / VIDEO_RATE))
            span = Span(seen.first / VIDEO_RATE, span.end)
        if end - seen.end > PATIENCE:
            after = self._by_face(Span(seen.end / VIDEO_RATE, span.end))
            span = replace(span, end=seen.end / VIDEO_RATE)
        return [*before, (span, number), *after]

    def _warn_of_faces(self) -> None:
        from llama_smop.data.faces.crop import warnings

        for number in sorted({number for _, number in self.parts if number is not None}):
            self.warnings += [f"face {number}: {line}" for line in warnings(self.tracks[number])]
        unseen = [span for span, number in self.parts if number is None]
        if unseen and self._sound is not None:
            times = ", ".join(f"{span.start:.1f}-{span.end:.1f} s" for span in unseen[:3])
            more = f" and {len(unseen) - 3} more pieces" if len(unseen) > 3 else ""
            self.warnings.append(f"no face is seen at {times}{more}: only the sound is used there")

    # -- to text ---------------------------------------------------------------------------------------------------

    def clips(self, processor, transform: Callable | None = None, alone: str | None = None) -> Iterator[Clip]:
        """What the model is to be given, piece by piece in order; memory does not grow with the recording's length.

        Args:
            transform: (samples, crops) -> (audio, video) as a `Clip` has them; None = `ClipTransform.testing()`.
            alone: "audio" or "video", to give that alone of what each piece has.

        Raises:
            MediaError: a recording, all in one piece, that the model cannot take.
        """
        transform = transform or ClipTransform.testing()
        for piece, overlap, audio, video in self._cut(alone):
            lengths = (None if stream is None else len(stream) for stream in (audio, video))
            reason = processor.unfit(*lengths, rate=self.options.rate)
            if reason is None:
                yield Clip(piece, overlap, *transform(audio, video))
            elif len(self.parts) == 1:
                raise MediaError(self.path, reason)

    def _cut(self, alone: str | None) -> Iterator[tuple[Piece, float, np.ndarray | None, np.ndarray | None]]:
        """Each piece without its text, seconds that it shares with the one before, its samples and its crops."""
        spans = [span for span, _ in self.parts]
        sounds = cut_sound(self._sound, spans) if self._sound is not None else None
        pictures = self._crops(spans)
        for span, number in self.parts:
            audio = next(sounds) if sounds is not None else None
            video = next(pictures, None) if self._picture and (self._prepared or number is not None) else None
            audio, video = None if alone == "video" else audio, None if alone == "audio" else video
            modality = "audio" if video is None else "video" if audio is None else "audiovisual"
            if modality not in self._known or (audio is None and video is None):
                continue
            box = None
            if number is not None:
                track = self.tracks[number]
                frame = min(max(frames_of(span)[0], track.first), track.end - 1)
                box = tuple(int(v) for v in track.filled_boxes(frame, frame + 1)[0].round())
            times = (round(seconds, 3) for seconds in (span.start, span.end))
            yield Piece(*times, "", modality, number, box, self._speech(span)), span.overlap, audio, video

    def _speech(self, span: Span) -> float | None:
        """The highest probability of speech in a span."""
        if self._probabilities is None:
            return None
        first, end = (round(seconds * RATE / STEP) for seconds in (span.start, span.end))
        return round(float(self._probabilities[first:end].max(initial=0.0)), 4)

    def _crops(self, spans: Sequence[Span]) -> Iterator[np.ndarray | None]:
        """Of every span when the picture is prepared, else of every span with a face."""
        if self._picture and self._prepared:
            yield from cut_prepared(self.path, spans)
        elif self.tracks:
            from llama_smop.data.faces.crop import Selection, crop_mouths

            chosen = [(span, number) for span, number in self.parts if number is not None]
            yield from crop_mouths(self.path, [Selection(*frames_of(span), self.tracks[n]) for span, n in chosen])


def _divided(spans: Sequence[Span], at: float) -> list[Span]:
    """Spans of which none goes on for long after the picture's end."""
    divided = []
    for span in spans:
        if span.start < at < span.end - ENDS_TOGETHER_S:
            divided += [replace(span, end=at), Span(at, span.end)]
        else:
            divided.append(span)
    return divided
