"""Voices to drown a recording in."""

import os
from itertools import islice
from pathlib import Path

import numpy as np

from llama_smop.data.media import stream_audio
from llama_smop.data.noise import Babble, NoiseFile, NoiseSource

ENDINGS = (".mp4", ".wav", ".flac", ".mkv", ".webm", ".mov", ".m4a", ".mp3", ".ogg", ".opus")
CLIPS = 500  # of a folder, at most
OWN_SAMPLES = 60 * 16_000  # of the recording itself
SPEAKERS = 6


class OwnVoice:
    """Several stretches of a recording's own sound at once, played backwards: speech that says nothing."""

    def __init__(self, path: str | os.PathLike):
        """Raises MediaError."""
        blocks, samples = [], 0
        for block in stream_audio(path):
            blocks.append(block)
            samples += len(block)
            if samples >= OWN_SAMPLES:
                break
        self._backwards = np.concatenate(blocks)[OWN_SAMPLES - 1 :: -1] if blocks else np.zeros(1, np.float32)

    def sample(self, samples: int, rng: np.random.Generator) -> np.ndarray:
        """Noise float32 (samples,)."""
        starts = rng.integers(len(self._backwards), size=SPEAKERS)
        places = (starts[:, None] + np.arange(samples)) % len(self._backwards)
        return self._backwards[places].sum(axis=0, dtype=np.float32)


def noise_source(place: str | os.PathLike) -> NoiseSource:
    """Babble of the clips below a folder, or the noise of a file.

    Raises:
        ValueError: a folder without a clip. MediaError: a file that cannot be read.
    """
    place = Path(place)
    if not place.is_dir():
        return NoiseFile(place)
    clips = list(islice((file for file in sorted(place.rglob("*")) if file.suffix.lower() in ENDINGS), CLIPS))
    if not clips:
        raise ValueError(f"{place}: holds no clip to make babble of ({', '.join(ENDINGS)})")
    return Babble(clips, SPEAKERS)
