"""The draws of a training run, step by step: which clips, of which epoch, as audio, video or both.

The plan is a function of its seed alone, so a run that resumes at step n draws what it would have drawn, and a data
worker needs no state: everything a clip's augmentation depends on is in its `Draw`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice

import numpy as np
from torch.utils.data import Dataset, Sampler

from llama_smop.data.batching import EpochBatches
from llama_smop.data.noise import Noise
from llama_smop.data.sources import ClipSource
from llama_smop.data.transforms import ClipTransform, clip_rng


@dataclass(frozen=True)
class Draw:
    """One clip in one batch."""

    index: int
    epoch: int
    modality: str
    noise: bool
    rate: tuple[int, int] | None = None  # of a model for several rates


@dataclass(frozen=True)
class Stage:
    """The draws before step `until`: modalities by their relative frequency, with noise or clean."""

    until: int
    modalities: Mapping[str, float]
    noise: bool


class TrainingPlan(Sampler[list[Draw]]):
    """Batches up to the last stage's end, over as many epochs as that takes; each batch is of one modality and, where
    there are several compression `rates`, of one of them, all equally often."""

    def __init__(
        self,
        batches: EpochBatches,
        stages: Sequence[Stage],
        seed: int = 0,
        rates: Sequence[tuple[int, int]] | None = None,
    ):
        self.batches, self.stages, self.seed, self.rates = batches, tuple(stages), seed, rates

    def __len__(self) -> int:
        return self.stages[-1].until

    def __iter__(self) -> Iterator[list[Draw]]:
        rng = np.random.default_rng([self.seed, 0x5A])
        rates_rng = np.random.default_rng([self.seed, 0x5B])  # of its own: rates do not change the other draws
        for step, (epoch, batch) in enumerate(islice(self._epochs(), len(self))):
            stage = next(stage for stage in self.stages if step < stage.until)
            names = sorted(stage.modalities)
            shares = np.array([stage.modalities[name] for name in names])
            modality = names[rng.choice(len(names), p=shares / shares.sum())]
            rate = self.rates[int(rates_rng.integers(len(self.rates)))] if self.rates else None
            yield [Draw(index, epoch, modality, stage.noise, rate) for index in batch]

    def _epochs(self) -> Iterator[tuple[int, list[int]]]:
        for epoch in count():
            self.batches.set_epoch(epoch)
            for batch in self.batches:
                yield epoch, batch


def batches_in(batches: EpochBatches, epochs: float) -> int:
    """The number of batches in the first `epochs` epochs, whose lengths may differ."""
    part, whole = math.modf(epochs)
    lengths = []
    for epoch in range(int(whole) + bool(part)):
        batches.set_epoch(epoch)
        lengths.append(len(batches))
    last = part * lengths.pop() if part else 0
    return math.ceil(sum(lengths) + last)


class DrawnClips(Dataset):
    """The items of a source, asked for by `Draw`: dicts of `audio`, `video`, `text` and `id` as of `Lrs3Dataset`, and
    of the draw's `rate`.

    What a clip's augmentation draws depends on (seed, epoch, number of the clip) alone.
    """

    def __init__(self, source: ClipSource, transform: ClipTransform, noise: Noise | None = None, seed: int = 0):
        self.source, self.transform, self.noise, self.seed = source, transform, noise, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, draw: Draw) -> dict:
        clip = self.source.load(draw.index, draw.modality, draw.epoch)
        rng = clip_rng(self.seed, draw.epoch, draw.index)
        audio, video = self.transform(clip.audio, clip.video, rng, self.noise if draw.noise else None)
        return {"audio": audio, "video": video, "text": clip.text, "id": clip.id, "rate": draw.rate}
