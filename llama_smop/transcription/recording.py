"""A recording of any length to pieces of text with times: cut in silence, faces found, lips cropped, transcribed."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise

import numpy as np
import torch

from llama_smop.data.media import (
    SAMPLES_PER_FRAME,
    VIDEO_RATE,
    MediaError,
    audio_path,
    stream_audio,
    stream_video,
    streams,
)
from llama_smop.data.transforms import ClipTransform
from llama_smop.models.decoding import transcribe_batch
from llama_smop.transcription.subtitles import Word
from llama_smop.transcription.voice_activity import Span, speech_pieces, speech_probabilities

LONGEST_S = 16.0  # of a piece: what LRS3 is trained in
PREPARED_SIZE = (96, 96)  # a picture of this size is a mouth crop already
DOUBLED_WORDS = 8  # how far back a word may be said twice where a cut is forced


@dataclass(frozen=True)
class Piece:
    """A part of a recording and what is said in it.

    start, end: seconds. modality: "audio", "video" or "audiovisual": what the model was given.
    face: the number of the track whose lips were read, box: left, top, right, bottom in its first frame.
    """

    start: float
    end: float
    text: str
    modality: str
    face: int | None = None
    box: tuple[int, int, int, int] | None = None
    words: tuple[Word, ...] | None = None


@dataclass
class Options:
    """How to transcribe.

    modality: "audio", "video", "audiovisual"; None = all that both the model and the recording have.
    face: "auto" (who speaks), "largest", or the number of a face.
    prepared: whether the picture is a mouth crop already; None = it is where it has 96×96 pixels.
    longest: seconds of a piece at most.
    """

    modality: str | None = None
    face: str | int = "auto"
    prepared: bool | None = None
    num_beams: int = 1
    longest: float = LONGEST_S
    pieces_at_once: int = 4


@dataclass
class _Plan:
    """What is transcribed of a recording: its pieces, and for each the track to read lips of."""

    spans: list[Span]
    sound: os.PathLike | str | None = None
    tracks: list = field(default_factory=list)
    chosen: list[int | None] = field(default_factory=list)
    prepared: bool = False


class Recording:
    """One file, looked through once; then `transcribe` gives its pieces in order.

    Attributes:
        warnings: a line for everything that makes the transcript less than it could be.
        seconds: its length.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        known: Sequence[str],
        options: Options,
        window_s: float,
        progress: Callable[[str, int, int], None] | None = None,
    ):
        """Find the speech and the faces.

        Args:
            known: the modalities that the model takes.
            window_s: the longest sound that the model takes.
            progress: called with what is being done, frames done and frames in all (0 = not known).

        Raises:
            MediaError: a file that cannot be read, or has nothing for this model.
        """
        self.path, self.options, self.warnings = path, options, []
        self._progress = progress or (lambda what, done, total: None)
        self.longest = min(options.longest, window_s)
        sound, picture = self._parts(known)
        self.seconds = 0.0
        envelope = None
        spans: list[Span] | None = None
        plan = _Plan([], sound=sound)
        if sound is not None:
            spans, envelope = self._listen(sound)
        if picture:
            plan.prepared = self._is_prepared()
            if plan.prepared:
                self.seconds = max(self.seconds, sum(1 for _ in stream_video(path)) / VIDEO_RATE)
            else:
                faces = self._find_faces(known)
                if faces is not None:
                    plan.tracks = faces.tracks
                    self.seconds = max(self.seconds, faces.frames / VIDEO_RATE)
                picture = bool(plan.tracks)
        if sound is None or options.modality == "video":
            spans = self._by_sight(plan)
        elif (plan.prepared and self.seconds <= self.longest) or (self.seconds <= self.longest and spans):
            spans = [Span(0.0, self.seconds)]
        plan.spans = spans or []
        plan.chosen = [self._who(plan, span, envelope) for span in plan.spans]
        self._plan, self._reads_lips = plan, picture
        self._known = known
        if picture and not plan.prepared:
            self._warn_of_faces()

    # -- what there is ---------------------------------------------------------------------------------------------

    def _parts(self, known: Sequence[str]) -> tuple[str | os.PathLike | None, bool]:
        """Where the sound is, and whether there is a picture, of what the model and the options ask for."""
        held = streams(self.path)
        wav = audio_path(self.path) if "video" in held else self.path
        sound = wav if "audio" in held or wav != self.path else None
        wanted = self.options.modality
        hears = wanted != "video" and any(m != "video" for m in known)
        sees = wanted != "audio" and any(m != "audio" for m in known)
        if wanted == "audiovisual" and (sound is None or "video" not in held):
            raise MediaError(
                self.path, f"has no {'sound' if sound is None else 'picture'}, and audiovisual asks for both"
            )
        sound, picture = sound if hears else None, "video" in held and sees
        if sound is None and not picture:
            lacks = "picture" if "video" not in held else "sound"
            raise MediaError(
                self.path, f"has no {lacks}, and what was asked for takes {wanted or ', '.join(known)} only"
            )
        return sound, picture

    def _listen(self, sound: str | os.PathLike) -> tuple[list[Span], np.ndarray]:
        """Where speech is, and the loudness of every video frame."""
        from llama_smop.data.faces.speaker import sound_envelope

        levels, samples = [], 0

        def blocks() -> Iterator[np.ndarray]:
            nonlocal samples
            left = np.zeros(0, np.float32)
            for block in stream_audio(sound):
                samples += len(block)
                left = np.concatenate([left, block])
                whole = len(left) // SAMPLES_PER_FRAME
                levels.append(sound_envelope(left, whole))
                left = left[whole * SAMPLES_PER_FRAME :]
                self._progress("listening", sum(map(len, levels)), 0)
                yield block

        spans = list(speech_pieces(speech_probabilities(blocks()), self.longest))
        self.seconds = samples / (SAMPLES_PER_FRAME * VIDEO_RATE)
        return spans, np.concatenate(levels) if levels else np.zeros(0)

    def _is_prepared(self) -> bool:
        if self.options.prepared is not None:
            return self.options.prepared
        return next(iter(stream_video(self.path))).shape[:2] == PREPARED_SIZE

    def _find_faces(self, known: Sequence[str]):
        """The faces, or None where the model can do without and they cannot be had."""
        from llama_smop.data.faces.crop import find_faces
        from llama_smop.data.faces.model_files import FaceModelError

        alone = "audio" not in known or self.options.modality in ("video", "audiovisual")
        done = 0

        def progress(step: int) -> None:
            nonlocal done
            done += step
            self._progress("finding faces", done, math.ceil(self.seconds * VIDEO_RATE))

        try:
            faces = find_faces(self.path, progress=progress)
        except FaceModelError as error:
            if alone:
                raise
            self.warnings.append(f"the picture is not used: {error}")
            return None
        if not faces.tracks:
            if alone:
                raise MediaError(self.path, "shows no face, and lips are to be read")
            self.warnings.append("no face was found: only the sound is used")
        return faces

    def _by_sight(self, plan: _Plan) -> list[Span]:
        """Pieces where nothing is heard: the frames that show a face, cut evenly."""
        if plan.prepared:
            shown = [(0, round(self.seconds * VIDEO_RATE))]
        else:
            shown = []
            for track in plan.tracks:
                if shown and track.first <= shown[-1][1]:
                    shown[-1] = (shown[-1][0], max(shown[-1][1], track.end))
                else:
                    shown.append((track.first, track.end))
        spans = []
        for first, end in shown:
            parts = max(1, math.ceil((end - first) / (self.longest * VIDEO_RATE)))
            edges = np.linspace(first, end, parts + 1).round() / VIDEO_RATE
            spans += [Span(a, b) for a, b in pairwise(edges)]
        return spans

    def _who(self, plan: _Plan, span: Span, envelope: np.ndarray | None) -> int | None:
        from llama_smop.data.faces.speaker import choose

        if not plan.tracks:
            return None
        first, end = _frames(span)
        if envelope is not None:
            envelope = np.pad(envelope, (0, max(0, end - len(envelope))), constant_values=envelope.min(initial=0.0))
        return choose(plan.tracks, first, end, envelope, self.options.face)

    def _warn_of_faces(self) -> None:
        from llama_smop.data.faces.crop import warnings

        plan = self._plan
        for number in sorted({n for n in plan.chosen if n is not None}):
            self.warnings += [f"face {number}: {line}" for line in warnings(plan.tracks[number])]
        unseen = [span for span, n in zip(plan.spans, plan.chosen, strict=True) if n is None]
        if unseen and plan.tracks:
            times = ", ".join(f"{span.start:.1f}-{span.end:.1f} s" for span in unseen[:3])
            more = f" and {len(unseen) - 3} more pieces" if len(unseen) > 3 else ""
            self.warnings.append(f"no face is seen at {times}{more}: only the sound is used there")

    # -- to text ---------------------------------------------------------------------------------------------------

    def transcribe(self, model, processor) -> Iterator[Piece]:
        """The pieces in order, some at a time; memory does not grow with the length of the recording."""
        transform = ClipTransform.testing()
        before: list[str] = []
        batch: list[tuple[Piece, np.ndarray | None, torch.Tensor | None]] = []
        for piece, audio, video in self._clips():
            clip = transform(audio, video)
            batch.append((piece, clip[0], clip[1]))
            if len(batch) == self.options.pieces_at_once:
                yield from self._texts(model, processor, batch, before)
                batch = []
        yield from self._texts(model, processor, batch, before)

    def _texts(self, model, processor, batch, before: list[str]) -> Iterator[Piece]:
        for modality, clips in groupby(batch, key=lambda clip: clip[0].modality):
            clips = list(clips)
            inputs = {}
            if modality != "video":
                inputs["audio"] = [audio for _, audio, _ in clips]
            if modality != "audio":
                inputs["video"] = [video for _, _, video in clips]
            texts = transcribe_batch(model, processor, num_beams=self.options.num_beams, **inputs)
            for (piece, _, _), text in zip(clips, texts, strict=True):
                words = text.split()
                if self._overlaps(piece):
                    words = words[_doubled(before, words) :]
                before[:] = [*before, *words][-DOUBLED_WORDS:]
                self._progress("transcribing", round(piece.end * VIDEO_RATE), round(self.seconds * VIDEO_RATE))
                yield replace(piece, text=" ".join(words))

    def _overlaps(self, piece: Piece) -> bool:
        return any(span.overlap and span.start == piece.start for span in self._plan.spans)

    def _clips(self) -> Iterator[tuple[Piece, np.ndarray | None, np.ndarray | None]]:
        """Each piece without its text, its samples and its crops."""
        from llama_smop.data.faces.crop import Selection, crop_mouths

        plan = self._plan
        hears = plan.sound is not None
        sounds = _cut_sound(plan.sound, plan.spans) if hears else None
        pictures: Iterator[np.ndarray] = iter(())
        if self._reads_lips and plan.prepared:
            pictures = _cut_picture(self.path, plan.spans)
        elif self._reads_lips:
            pictures = crop_mouths(
                self.path,
                [
                    Selection(*_frames(span), plan.tracks[number])
                    for span, number in zip(plan.spans, plan.chosen, strict=True)
                    if number is not None
                ],
            )
        for span, number in zip(plan.spans, plan.chosen, strict=True):
            audio = next(sounds) if sounds is not None else None
            video = next(pictures, None) if self._reads_lips and (plan.prepared or number is not None) else None
            modality = "audiovisual" if video is not None and hears else "audio" if hears else "video"
            if modality not in self._known or (modality == "audio" and self.options.modality == "video"):
                continue
            if modality == "video" and video is None:
                continue
            box = None
            if number is not None:
                track = plan.tracks[number]
                place = min(max(_frames(span)[0] - track.first, 0), len(track.points) - 1)
                box = tuple(int(v) for v in track.filled_boxes()[place].round())
            if audio is not None and video is not None:
                audio = _of_length(audio, len(video) * SAMPLES_PER_FRAME)
            yield Piece(span.start, span.end, "", modality, number, box), audio, video


def _frames(span: Span) -> tuple[int, int]:
    first = round(span.start * VIDEO_RATE)
    return first, max(first + 1, round(span.end * VIDEO_RATE))


def _cut_sound(path, spans: Sequence[Span]) -> Iterator[np.ndarray]:
    """The samples of every span, in one pass."""
    kept, offset = np.zeros(0, np.float32), 0
    blocks = stream_audio(path)
    for span in spans:
        first, end = (frame * SAMPLES_PER_FRAME for frame in _frames(span))
        kept, offset = kept[max(0, first - offset) :], max(offset, min(first, offset + len(kept)))
        while offset + len(kept) < end and (block := next(blocks, None)) is not None:
            kept = np.concatenate([kept, block])
            cut = max(0, min(first - offset, len(kept)))
            kept, offset = kept[cut:], offset + cut
        yield kept[: end - offset]


def _cut_picture(path, spans: Sequence[Span]) -> Iterator[np.ndarray]:
    """The prepared crops of every span, in one pass."""
    kept: list[np.ndarray] = []
    offset = 0
    frames = stream_video(path, size=PREPARED_SIZE[0], with_sound=audio_path(path) == path)
    for span in spans:
        first, end = _frames(span)
        while offset + len(kept) < end and (frame := next(frames, None)) is not None:
            kept.append(frame)
            if offset < first:
                kept.pop(0)
                offset += 1
        drop = max(0, min(first - offset, len(kept)))
        kept, offset = kept[drop:], offset + drop
        if kept:
            yield np.stack(kept[: end - offset])


def _of_length(samples: np.ndarray, wanted: int) -> np.ndarray:
    return np.pad(samples[:wanted], (0, max(0, wanted - len(samples))))


def _doubled(before: Sequence[str], words: Sequence[str]) -> int:
    """How many of the first words were the last ones of the piece before."""
    for count in range(min(len(before), len(words)), 0, -1):
        with suppress(IndexError):
            if list(before[-count:]) == list(words[:count]):
                return count
    return 0
