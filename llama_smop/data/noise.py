"""Noise at a given signal-to-noise ratio: from a file, or babble mixed of other clips."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from llama_smop.data.media import MediaError, audio_path, read_audio

logger = logging.getLogger(__name__)

SUBSTITUTES = 10  # clips tried in place of one that cannot be read
RECIPE_SNRS = (-5, 0, 5, 10, 15, 20, None)


def add_noise(audio: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """audio + noise scaled so that Σ audio² / Σ noise² is `snr_db` decibels; both float (n,). 0 means 0 dB.

    Silent audio or silent noise leaves the audio as it is: no scale would give the ratio.
    """
    if audio.shape != noise.shape:
        raise ValueError(f"expected noise of the audio's shape {audio.shape}, got {noise.shape}")
    signal, disturbance = (float(np.sum(np.square(x, dtype=np.float64))) for x in (audio, noise))
    if signal == 0 or disturbance == 0:
        return audio
    scale = np.sqrt(signal / disturbance) * 10 ** (-snr_db / 20)
    return (audio + scale * noise).astype(np.float32)


def _stretch(noise: np.ndarray, samples: int, rng: np.random.Generator) -> np.ndarray:
    """`samples` of `noise` from a random place; noise that is too short is repeated."""
    if len(noise) < samples:
        noise = np.tile(noise, -(-samples // len(noise)) + 1)
    start = int(rng.integers(len(noise) - samples + 1))
    return noise[start : start + samples]


class NoiseSource(Protocol):
    def sample(self, samples: int, rng: np.random.Generator) -> np.ndarray:
        """Noise of a given length, float32 (samples,), of any level."""


class NoiseFile:
    """Stretches of one recording, read once, resampled to 16 kHz."""

    def __init__(self, path: str | os.PathLike):
        self.samples = read_audio(path)

    def sample(self, samples: int, rng: np.random.Generator) -> np.ndarray:
        return _stretch(self.samples, samples, rng)


@dataclass(frozen=True)
class Sound:
    """A sound file that is in memory already; `path` names it."""

    path: str
    content: bytes


class Babble:
    """`speakers` clips of a corpus talking at once, each as loud as the others."""

    def __init__(self, clips: Sequence[str | os.PathLike | Sound], speakers: int = 6):
        if not clips or speakers < 1:
            raise ValueError(
                f"babble needs clips and at least one speaker, got {len(clips)} clips, {speakers} speakers"
            )
        self.clips = [clip if isinstance(clip, Sound) else Path(clip) for clip in clips]
        self.speakers = speakers

    def sample(self, samples: int, rng: np.random.Generator) -> np.ndarray:
        total = np.zeros(samples, dtype=np.float32)
        for i in rng.integers(len(self.clips), size=self.speakers):
            voice = self._voice(int(i))
            if voice is not None:
                total += _stretch(voice, samples, rng)
        return total

    def _voice(self, first: int) -> np.ndarray | None:
        """The sound of a clip, or of the next one that can be read: damaged clips do not stop the noise.

        Raises:
            MediaError: SUBSTITUTES more cannot be read either.
        """
        clips = [self.clips[(first + n) % len(self.clips)] for n in range(SUBSTITUTES + 1)]
        for clip in clips:
            try:
                return _normalised_voice(clip)
            except MediaError as error:
                if error.path not in _warned_about:
                    logger.warning("%s: %s; in babble the next clip takes its place", error.path, error.reason)
                    _warned_about.add(error.path)
        raise MediaError(
            clips[0].path if isinstance(clips[0], Sound) else clips[0],
            f"this clip and the next {SUBSTITUTES} cannot be read",
        )


_warned_about: set[str] = set()  # damaged clips; a process warns once of each


@lru_cache(maxsize=256)  # as many as a shard has; 80 MB of LRS3
def _normalised_voice(clip: Path | Sound) -> np.ndarray | None:
    """A clip's sound at a level of 1; None where it is silent."""
    voice = read_audio(clip.path, content=clip.content) if isinstance(clip, Sound) else read_audio(audio_path(clip))
    level = float(np.sqrt(np.mean(np.square(voice, dtype=np.float64))))
    return voice / np.float32(level) if level > 0 else None


@dataclass(frozen=True)
class Noise:
    """Adds noise from `source` at an SNR drawn from `snrs`, in decibels; None among them is clean speech."""

    source: NoiseSource
    snrs: tuple[float | None, ...] = RECIPE_SNRS

    def __post_init__(self):
        if not self.snrs:
            raise ValueError("expected at least one SNR in decibels, or None for clean speech")

    def __call__(self, audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        snr = self.snrs[int(rng.integers(len(self.snrs)))]
        if snr is None:
            return audio
        return add_noise(audio, self.source.sample(len(audio), rng), snr)
