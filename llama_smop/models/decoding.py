"""Transcribe clips, each under a length limit of its own, and recordings longer than the model's window."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature, StoppingCriteria, StoppingCriteriaList

from llama_smop.models.modeling_llama_smop import LlamaSmopForConditionalGeneration
from llama_smop.models.processing_llama_smop import LlamaSmopProcessor
from llama_smop.models.units import (
    SAMPLES_PER_VIDEO_FRAME,
    SAMPLES_PER_WHISPER_FRAME,
    STREAMS,
    VIDEO_RATE,
    WHISPER_RATE,
)

# Fast speech is about 4.5 words or 7 tokens a second.
TOKENS_PER_SECOND, LEAST_TOKENS = 8, 16
# A quiet moment is judged over this many video frames (0.2 s).
SILENCE_FRAMES = 5


class Piece(NamedTuple):
    """A part of a long recording, in video frames (1/25 s), and what was said in it."""

    start: int
    stop: int
    text: str


class PerClipLimit(StoppingCriteria):
    """Ends each clip at its own limit of new tokens, so that a transcript does not depend on longer clips beside it."""

    def __init__(self, prompt_length: int, limits: Tensor):
        self.prompt_length, self.limits = prompt_length, limits

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        rows = input_ids.shape[0] // len(self.limits)  # beams
        limits = self.limits.to(input_ids.device).repeat_interleave(rows)
        return input_ids.shape[1] - self.prompt_length >= limits


def token_limits(batch: BatchFeature) -> Tensor:
    """(B,) new tokens that each clip's duration leaves room for: 16 + 8 a second."""
    if "audio_mask" in batch:
        seconds = batch["audio_mask"].sum(1) / WHISPER_RATE
    else:
        seconds = batch["video_mask"].sum(1) / VIDEO_RATE
    return LEAST_TOKENS + (seconds * TOKENS_PER_SECOND).ceil().long()


@torch.inference_mode()
def transcribe_batch(
    model: LlamaSmopForConditionalGeneration,
    processor: LlamaSmopProcessor,
    *,
    audio: Sequence | None = None,
    video: Sequence | None = None,
    num_beams: int = 1,
    **settings,
) -> list[str]:
    """Texts of transformed clips, greedy or by beam search, deterministic.

    `settings` go to `generate`; a `max_new_tokens` there replaces the limit that fits each clip's duration.
    """
    batch = processor(audio=audio, video=video).to(model.device)
    prompt = batch["input_ids"].shape[1]
    if "max_new_tokens" not in settings:
        limits = token_limits(batch)
        settings["max_new_tokens"] = int(limits.max())
        settings["stopping_criteria"] = StoppingCriteriaList([PerClipLimit(prompt, limits)])
    generated = model.generate(**batch, num_beams=num_beams, **settings)
    return processor.decode_new(generated, prompt)


def cut_at_silences(samples: np.ndarray | None, frames: int, longest: int) -> list[tuple[int, int]]:
    """Cut a recording into pieces of at most `longest` video frames, at the quietest moments there are.

    Each cut lies in the second half of what a piece may hold, where the sound's energy over 0.2 s is least; without
    sound a piece is as long as it may be.

    Args:
        samples: (N,) at 16 kHz, or None.
        frames: video frames (1/25 s) of the recording.

    Returns:
        [start, stop) of each piece in video frames, without gaps.
    """
    if longest < 2:
        raise ValueError(f"a piece must hold at least 2 video frames, got {longest}")
    energy = None if samples is None else _energy(np.asarray(samples, dtype=np.float64), frames)
    pieces, start = [], 0
    while frames - start > longest:
        stop = start + longest
        if energy is not None:
            earliest = start + (longest + 1) // 2
            # Of equally quiet moments the latest: fewer pieces.
            quiet = energy[earliest : stop + 1][::-1]
            stop -= int(np.argmin(quiet))
        pieces.append((start, stop))
        start = stop
    return [*pieces, (start, frames)]


def _energy(samples: np.ndarray, frames: int) -> np.ndarray:
    """(frames + 1,) mean square round each boundary between video frames."""
    samples = np.pad(samples, (0, max(0, frames * SAMPLES_PER_VIDEO_FRAME - len(samples))))
    squares = (samples[: frames * SAMPLES_PER_VIDEO_FRAME].reshape(frames, -1) ** 2).mean(1)
    total = np.concatenate([[0.0], np.cumsum(squares)])
    boundary = np.arange(frames + 1)
    low, high = np.maximum(boundary - SILENCE_FRAMES // 2, 0), np.minimum(boundary + SILENCE_FRAMES // 2, frames)
    return (total[high] - total[low]) / (high - low)


def transcribe_long(
    model,
    processor,
    *,
    audio: np.ndarray | None = None,
    video: Tensor | None = None,
    transform: Callable[[np.ndarray | None, Tensor | None], tuple] = lambda audio, video: (audio, video),
    num_beams: int = 1,
    longest_seconds: float | None = None,
    pieces_at_once: int = 4,
) -> Iterator[Piece]:
    """Pieces of a recording of any length with their texts, in order; " ".join the texts for all of it.

    Args:
        audio: (N,) raw samples at 16 kHz. video: (T, …) raw frames at 25 Hz. At least one of them.
        transform: raw (audio, video) of one piece to what the processor takes (it normalises each piece by itself).
        longest_seconds: length of a piece; by default the model's audio window.
    """
    if audio is None and video is None:
        raise ValueError("expected audio, video or both, got neither")
    frames = len(video) if video is not None else math.ceil(len(audio) / SAMPLES_PER_VIDEO_FRAME)
    window = processor.audio_window * SAMPLES_PER_WHISPER_FRAME // SAMPLES_PER_VIDEO_FRAME
    longest = window if longest_seconds is None else min(window, round(longest_seconds * VIDEO_RATE))
    cuts = cut_at_silences(audio, frames, longest)
    if len(cuts) > 1 and cuts[-1][1] - cuts[-1][0] < processor.rate_video:
        cuts = cuts[:-1]  # less than one token of speech
    for first in range(0, len(cuts), pieces_at_once):
        spans = cuts[first : first + pieces_at_once]
        clips = [
            transform(
                None if audio is None else audio[a * SAMPLES_PER_VIDEO_FRAME : b * SAMPLES_PER_VIDEO_FRAME],
                None if video is None else video[a:b],
            )
            for a, b in spans
        ]
        streams = {name: [clip[i] for clip in clips] for i, name in enumerate(STREAMS) if clips[0][i] is not None}
        texts = transcribe_batch(model, processor, num_beams=num_beams, **streams)
        yield from (Piece(a, b, text) for (a, b), text in zip(spans, texts, strict=True))
