"""What a training run draws, step by step: which clips, in which epoch of theirs, as audio, video or both.

The plan is a function of its seed alone, so a run that resumes at step n draws what it would have drawn, and a data
worker needs no state: everything a clip's augmentation depends on is in its `Draw`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice

import numpy as np
from torch.utils.data import Dataset, Sampler

from .batching import FrameBatchSampler
from .lrs3 import Lrs3Dataset, load_clip
from .transforms import clip_rng


@dataclass(frozen=True)
class Draw:
    """One clip in one batch."""

    index: int
    epoch: int
    modality: str
    noisy: bool


@dataclass(frozen=True)
class Stage:
    """What is drawn before step `until`: modalities by their relative frequency, with noise or clean."""

    until: int
    modalities: Mapping[str, float]
    noisy: bool


class TrainingPlan(Sampler[list[Draw]]):
    """Batches up to the last stage's end, over as many epochs as that takes; each batch is of one modality."""

    def __init__(self, batches: FrameBatchSampler, stages: Sequence[Stage], seed: int = 0):
        self.batches, self.stages, self.seed = batches, tuple(stages), seed

    def __len__(self) -> int:
        return self.stages[-1].until

    def __iter__(self) -> Iterator[list[Draw]]:
        rng = np.random.default_rng([self.seed, 0x5A])
        for step, (epoch, batch) in enumerate(islice(self._epochs(), len(self))):
            stage = next(stage for stage in self.stages if step < stage.until)
            names = sorted(stage.modalities)
            shares = np.array([stage.modalities[name] for name in names])
            modality = names[rng.choice(len(names), p=shares / shares.sum())]
            yield [Draw(index, epoch, modality, stage.noisy) for index in batch]

    def _epochs(self) -> Iterator[tuple[int, list[int]]]:
        for epoch in count():
            self.batches.load_state_dict(self.batches.state_dict() | {"epoch": epoch, "batch": 0})
            for batch in self.batches:
                yield epoch, batch


class DrawnClips(Dataset):
    """The items of a `Lrs3Dataset`, asked for by `Draw`.

    keep_decoded: hold decoded clips in memory, about 0.7 MB a second of video; for corpora of minutes, not hours.
    """

    def __init__(self, clips: Lrs3Dataset, keep_decoded: bool = False):
        self.clips = clips
        self._decoded: dict[tuple[int, str], np.ndarray] | None = {} if keep_decoded else None

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, draw: Draw) -> dict:
        audio, video = self._load(draw.index, draw.modality)
        rng = clip_rng(self.clips.seed, draw.epoch, draw.index)
        audio, video = self.clips.transform(audio, video, rng, self.clips.noise if draw.noisy else None)
        clip = self.clips.clips[draw.index]
        return {"audio": audio, "video": video, "text": clip.text, "id": clip.id}

    def _load(self, index: int, modality: str) -> tuple[np.ndarray | None, np.ndarray | None]:
        path = self.clips.clips[index].video_path(self.clips.root)
        if self._decoded is None:
            return load_clip(path, modality)
        streams = ("audio", "video") if modality == "audiovisual" else (modality,)
        for stream in streams:
            if (index, stream) not in self._decoded:
                both = load_clip(path, stream)
                self._decoded[index, stream] = both[0] if stream == "audio" else both[1]
        return tuple(self._decoded[index, s] if s in streams else None for s in ("audio", "video"))
