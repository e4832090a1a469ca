"""Parts of a recording, in order and in one pass: its sound, its prepared picture."""

import os
from collections.abc import Iterator, Sequence

import numpy as np

from llama_smop.data.media import VIDEO_SIZE, audio_path, stream_audio, stream_video
from llama_smop.models.units import SAMPLES_PER_VIDEO_FRAME, VIDEO_RATE
from llama_smop.transcription.voice_activity import Span


def frames_of(span: Span) -> tuple[int, int]:
    """The video frames [first, end) of a span, at least one."""
    first = round(span.start * VIDEO_RATE)
    return first, max(first + 1, round(span.end * VIDEO_RATE))


def cut_sound(path: str | os.PathLike, spans: Sequence[Span]) -> Iterator[np.ndarray]:
    """The samples of every span, float32 (n,); fewer than the span has where the sound ends in it. Raises MediaError.

    spans: in order of their starts; they may overlap.
    """
    kept, offset = np.zeros(0, np.float32), 0  # samples since the last span's start, and where they begin
    blocks = stream_audio(path)
    for span in spans:
        first, end = (frame * SAMPLES_PER_VIDEO_FRAME for frame in frames_of(span))
        while True:
            cut = max(0, min(first - offset, len(kept)))
            kept, offset = kept[cut:], offset + cut
            if offset + len(kept) >= end or (block := next(blocks, None)) is None:
                break
            kept = np.concatenate([kept, block])
        yield kept[: end - offset]


def cut_prepared(path: str | os.PathLike, spans: Sequence[Span], size: int = VIDEO_SIZE) -> Iterator[np.ndarray | None]:
    """The crops of every span of a video that shows a mouth alone, uint8 (T, size, size, 3). Raises MediaError.

    None for a span after its end. spans: as in `cut_sound`.
    """
    kept: list[np.ndarray] = []
    offset = 0
    frames = stream_video(path, size=size, with_sound=str(audio_path(path)) == str(path))
    for span in spans:
        first, end = frames_of(span)
        drop = max(0, min(first - offset, len(kept)))
        kept, offset = kept[drop:], offset + drop
        while offset + len(kept) < end and (frame := next(frames, None)) is not None:
            if offset < first:
                offset += 1
            else:
                kept.append(frame)
        yield np.stack(kept[: end - offset]) if kept else None


def new_words(before: Sequence[str], words: Sequence[str]) -> list[str]:
    """What a piece says beyond the piece before, whose last words it may repeat where the two overlap.

    The first word of a piece that begins within speech may be half of one: the repetition may also begin at the second.
    """
    for count in range(min(len(before), len(words)), 0, -1):
        for begin in (0, 1):
            if list(before[-count:]) == list(words[begin : begin + count]):
                return list(words[begin + count :])
    return list(words)
