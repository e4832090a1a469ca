"""Batches by total frames: clips of like length together, every clip once an epoch, seeded, split over ranks."""

import heapq
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from torch.utils.data import Sampler


def split_fullest(sizes: Sequence[int], count: int) -> list[int]:
    """Halves the largest of `sizes`, in place, until there are `count` of them; the sum stays."""
    if sum(sizes) < count:
        raise ValueError(f"{sum(sizes)} clips cannot be shared out over {count} batches")
    parts = [[size] for size in sizes]
    heap = [(-size, i) for i, size in enumerate(sizes)]
    heapq.heapify(heap)
    for _ in range(count - len(sizes)):
        size, i = heapq.heappop(heap)
        halves = [-size - (-size // 2), -size // 2]
        at = parts[i].index(-size)
        parts[i][at : at + 1] = halves
        for half in halves:
            heapq.heappush(heap, (-half, i))
    return [size for part in parts for size in part]


def nearest_in_length(lengths: Sequence[int], index: int) -> Iterator[int]:
    """The other clips, the nearest in length first."""
    order = np.argsort(np.abs(np.asarray(lengths) - lengths[index]), kind="stable")
    return (int(i) for i in order if i != index)


class EpochBatches(Protocol):
    """Batches of clip numbers, in an order that depends on the epoch."""

    def set_epoch(self, epoch: int) -> None: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[list[int]]: ...


class FrameBatchSampler(Sampler[list[int]]):
    """Yields lists of clip indices whose padded size, clips × longest, is at most `max_frames`.

    lengths: frames of each clip. Clips are put into `num_buckets` buckets of like length, shuffled within them, cut
    into batches in order of length, and the batches are shuffled. A clip counts as long as the longest of its bucket,
    so the number of batches is the same in every epoch. A clip longer than `max_frames` is a batch of its own.
    max_clips: at most this many clips a batch; with max_frames None, batches of a fixed number of clips.
    rank, world: this process's share. All ranks get equally many batches and together every clip exactly once; where
    the batches do not divide evenly, the fullest are split.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        max_frames: int | None = None,
        num_buckets: int = 400,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
        max_clips: int | None = None,
    ):
        self.lengths = np.asarray(lengths, dtype=np.int64)
        if not len(self.lengths) or self.lengths.min() < 1:
            raise ValueError("expected at least one clip and positive lengths")
        if max_frames is None and max_clips is None:
            raise ValueError("expected max_frames, max_clips, or both")
        if not 0 <= rank < world:
            raise ValueError(f"expected 0 ≤ rank < world, got rank {rank}, world {world}")
        if world > len(self.lengths):
            raise ValueError(f"{len(self.lengths)} clips cannot be shared out over {world} processes")
        for name, value in (("max_frames", max_frames), ("max_clips", max_clips), ("num_buckets", num_buckets)):
            if value is not None and value < 1:
                raise ValueError(f"expected {name} ≥ 1, got {value}")
        self.max_frames, self.max_clips = max_frames, max_clips
        self.seed, self.shuffle = seed, shuffle
        self.rank, self.world = rank, world
        self.epoch = 0

        by_length = np.argsort(self.lengths, kind="stable")
        self._buckets = [b for b in np.array_split(by_length, min(num_buckets, len(by_length))) if len(b)]
        self._sizes = self._batch_sizes()

    def _batch_sizes(self) -> list[int]:
        """The number of clips in each batch, in order of length; the same in every epoch."""
        ceilings = np.concatenate([np.full(len(b), self.lengths[b[-1]]) for b in self._buckets])
        sizes, count = [], 0
        for ceiling in ceilings:  # ascending, so the last clip of a batch is the longest
            too_long = self.max_frames is not None and (count + 1) * ceiling > self.max_frames
            too_many = self.max_clips is not None and count == self.max_clips
            if count and (too_long or too_many):
                sizes.append(count)
                count = 0
            count += 1
        sizes.append(count)
        return split_fullest(sizes, -(-len(sizes) // self.world) * self.world)

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank."""
        return len(self._sizes) // self.world

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, which seeds the order."""
        self.epoch = epoch

    def _epoch_batches(self) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = np.concatenate([rng.permutation(b) if self.shuffle else b for b in self._buckets])
        batches = np.split(order, np.cumsum(self._sizes)[:-1])
        # Neighbours in length go to the ranks of one step, which then wait little for each other.
        steps = np.arange(len(self))
        if self.shuffle:
            rng.shuffle(steps)
        return [batches[step * self.world + self.rank] for step in steps]

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._epoch_batches():
            yield batch.tolist()
