"""What a training run draws, step by step: which clips, in which epoch of theirs, as audio, video or both.

The plan is a function of its seed alone, so a run that resumes at step n draws what it would have drawn, and a data
worker needs no state: everything a clip's augmentation depends on is in its `Draw`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

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


class TrainingPlan(Sampler[list[Draw]]):
    """`steps` batches over as many epochs as that takes; each batch is of one modality.

    batches: the clips' batch sampler. modalities: their relative frequency. clean_steps: steps at the start without
    noise.
    """

    def __init__(
        self,
        batches: FrameBatchSampler,
        steps: int,
        modalities: Mapping[str, float] | None = None,
        clean_steps: int = 0,
        seed: int = 0,
    ):
        self.batches, self.steps, self.clean_steps, self.seed = batches, steps, clean_steps, seed
        shares = dict(modalities or {"audiovisual": 1.0})
        self.names = sorted(shares)
        self.shares = np.array([shares[n] for n in self.names]) / sum(shares.values())

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[Draw]]:
        rng = np.random.default_rng([self.seed, 0x5A])
        step, epoch = 0, 0
        while step < self.steps:
            self.batches.set_epoch(epoch)
            for batch in self.batches:
                modality = self.names[rng.choice(len(self.names), p=self.shares)]
                yield [Draw(index, epoch, modality, step >= self.clean_steps) for index in batch]
                step += 1
                if step == self.steps:
                    self.batches.load_state_dict(self.batches.state_dict() | {"batch": 0})
                    return
            epoch += 1


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
