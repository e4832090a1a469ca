"""Sources of training clips: their protocol, and the one that reads the LRS3 layout."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from llama_smop.data.batching import EpochBatches, FrameBatchSampler, nearest_in_length
from llama_smop.data.lrs3 import load_clip, read_labels
from llama_smop.data.noise import Babble
from llama_smop.models.units import STREAMS, streams_of


@dataclass(frozen=True)
class LoadedClip:
    """A decoded clip. audio: float32 (samples,) at 16 kHz or None; video: uint8 RGB (T, 96, 96, 3) or None."""

    id: str
    text: str
    audio: np.ndarray | None
    video: np.ndarray | None


class ClipSource(Protocol):
    """Clips by number, from 0: their lines in the label file."""

    texts: Sequence[str]  # together they hold every word of the corpus
    babble: Babble  # noise made of these clips

    def __len__(self) -> int: ...

    def load(self, number: int, modality: str, epoch: int) -> LoadedClip:
        """Decodes what a modality needs. Raises MediaError naming a clip that cannot be used."""

    def nearest(self, number: int) -> Iterator[int]:
        """Other clips that could take this one's place, the nearest in length first."""

    def batches(self, rank: int, world: int, **settings) -> EpochBatches:
        """One rank's batches of numbers; `settings` as of `FrameBatchSampler`."""


class FolderClips:
    """The clips of a label file, in the LRS3 layout (lrs3.py).

    seed: draws the batches. keep_decoded: hold decoded clips in memory, about 0.7 MB a second of video; for corpora of
    minutes, not hours.
    """

    def __init__(self, root: str | os.PathLike, label_file: str, seed: int = 0, keep_decoded: bool = False):
        self.root, self.seed = Path(root), seed
        self.clips = read_labels(root, label_file)
        self._decoded: dict[tuple[int, str], np.ndarray | None] | None = {} if keep_decoded else None

    def __len__(self) -> int:
        return len(self.clips)

    @cached_property
    def babble(self) -> Babble:
        return Babble([clip.video_path(self.root) for clip in self.clips])

    @property
    def texts(self) -> list[str]:
        return [clip.text for clip in self.clips]

    @property
    def lengths(self) -> list[int]:
        """Frames, as the labels say."""
        return [clip.n_frames for clip in self.clips]

    def batches(self, rank: int = 0, world: int = 1, **settings) -> FrameBatchSampler:
        return FrameBatchSampler(self.lengths, seed=self.seed, rank=rank, world=world, **settings)

    def nearest(self, number: int) -> Iterator[int]:
        return nearest_in_length(self.lengths, number)

    def load(self, number: int, modality: str, epoch: int = 0) -> LoadedClip:
        clip = self.clips[number]
        return LoadedClip(clip.id, clip.text, *self._streams(number, modality))

    def _streams(self, number: int, modality: str) -> tuple[np.ndarray | None, np.ndarray | None]:
        path = self.clips[number].video_path(self.root)
        if self._decoded is None:
            return load_clip(path, modality)
        streams = streams_of(modality)
        for stream in streams:
            if (number, stream) not in self._decoded:
                self._decoded[number, stream] = load_clip(path, stream)[STREAMS.index(stream)]
        audio, video = (self._decoded[number, s] if s in streams else None for s in STREAMS)
        return audio, video
