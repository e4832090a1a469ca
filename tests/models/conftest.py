"""A tiny untrained model and made-up clips of different lengths."""

import pytest
import torch

from llama_smop.models.tiny import build_tiny
from llama_smop.models.units import STREAMS, streams_of

GRAMMAR = "bin lay place set blue green red at by with f g two three now please again soon"
WORDS = GRAMMAR.split()


def clip(frames: int, seed: int):
    """(audio, video) of `frames` video frames; noise, which leaves no boundary effect unseen."""
    generator = torch.Generator().manual_seed(seed)
    audio = torch.randn(frames * 640, generator=generator) * 0.3
    return audio, torch.randn(frames, 1, 88, 88, generator=generator)


def chosen(clips, modality: str) -> dict:
    """The processor's arguments for "audio", "video" or "audiovisual"."""
    return {m: [c[i] for c in clips] for i, m in enumerate(STREAMS) if m in streams_of(modality)}


@pytest.fixture(scope="session")
def pair():
    torch.manual_seed(0)
    model, processor = build_tiny(WORDS, max_seconds=2.0)
    return model.eval(), processor


@pytest.fixture
def model(pair):
    return pair[0]


@pytest.fixture
def processor(pair):
    return pair[1]
