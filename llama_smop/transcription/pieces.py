"""Pieces of recordings: what the model is given of each, and what it says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llama_smop.models.decoding import Written, recognise_batch
from llama_smop.models.rates import Rate
from llama_smop.models.units import streams_of
from llama_smop.transcription.cutting import new_words
from llama_smop.transcription.word_times import WhisperAligner, Word

OVERLAP_WORDS = 8  # that fit into the overlap of two pieces


@dataclass(frozen=True)
class Piece:
    """A part of a recording and what is said in it.

    start, end: seconds. modality: "audio", "video" or "audiovisual": what the model was given.
    face: the number of the face whose lips were read, box: its left, top, right, bottom where the piece begins.
    speech_probability: the highest in it, by what finds speech; None where nothing was listened to.
    words: with the times in the recording, in order; None where they were not asked for, or cannot be found.
    written: what the model wrote of it, and how surely, words that the piece before has too included; None where that
    was not asked for.
    """

    start: float
    end: float
    text: str
    modality: str
    face: int | None = None
    box: tuple[int, int, int, int] | None = None
    speech_probability: float | None = None
    words: tuple[Word, ...] | None = None
    written: Written | None = None


@dataclass(frozen=True)
class Clip:
    """What the model is given of a piece, which has no text yet.

    overlap: seconds at its start that the piece before has too. audio: float32 (n,), video: float32 (T, 1, 88, 88),
    transformed, or None.
    """

    piece: Piece
    overlap: float
    audio: np.ndarray | None
    video: np.ndarray | None


def transcribe_clips(
    clips: Sequence[Clip],
    model,
    processor,
    num_beams: int = 1,
    aligner: WhisperAligner | None = None,
    settings: Mapping[str, Any] | None = None,
    rate: Rate | None = None,
    scored: bool = False,
) -> list[Piece]:
    """The piece of every clip with its text, and with its words where there is an aligner and sound.

    Clips of one modality go through the model together. settings: further ones of `generate`. rate: None = the default.
    scored: pieces have `written`; for one beam.
    """
    found: dict[int, Piece] = {}
    for modality in dict.fromkeys(clip.piece.modality for clip in clips):
        places = [i for i, clip in enumerate(clips) if clip.piece.modality == modality]
        inputs = {name: [getattr(clips[i], name) for i in places] for name in streams_of(modality)}
        given = inputs | dict(settings or {})
        written: list[Written] = []
        if scored:
            given["written"] = written
        texts, speech = recognise_batch(model, processor, num_beams=num_beams, rate=rate, **given)
        for row, (i, text) in enumerate(zip(places, texts, strict=True)):
            piece, audio = clips[i].piece, clips[i].audio
            words = None
            if aligner is not None and audio is not None:
                frames = speech.states["audio"][row][speech.state_masks["audio"][row]]
                words = aligner(text, audio, frames)
            if words is not None:
                words = tuple(Word(w.word, w.start + piece.start, min(w.end + piece.start, piece.end)) for w in words)
            found[i] = replace(
                piece, text=" ".join(text.split()), words=words, written=written[row] if scored else None
            )
    return [found[i] for i in range(len(clips))]


class Joint:
    """The pieces of one recording, given in order: what two that overlap both say is said once."""

    def __init__(self):
        self._before: list[str] = []
        self._time = 0.0  # where the last word ends

    def __call__(self, piece: Piece, overlap: float) -> Piece:
        """The piece without the words that the one before has. overlap: seconds that the two share."""
        said = piece.text.split()
        kept = new_words(self._before, said) if overlap else said
        self._before = [*self._before, *kept][-OVERLAP_WORDS:]
        words = piece.words
        if words is not None:
            words = tuple(
                Word(w.word, max(w.start, self._time), max(w.end, self._time)) for w in words[len(said) - len(kept) :]
            )
            self._time = words[-1].end if words else self._time
        return replace(piece, text=" ".join(kept), words=words)
