"""Which data worker reads which shards, and the batches made of them: functions of a seed and the epoch's number.

A consumer is one data worker of one process. It is dealt whole shards and reads them in order, a window of several at a
time; every batch is made of clips of one window.
"""

import heapq
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from llama_smop.data.batching import FrameBatchSampler, split_fullest
from llama_smop.data.shards.index import Shard, ShardError

CLIPS_A_BUCKET = 10  # with fewer, the same clips would share a batch in every epoch


class Deal:
    """Deals the shards out in an order drawn anew in each epoch, always to the consumer with the fewest frames.

    window: as many shards are held in memory together as it takes to hold this many clips.
    """

    def __init__(self, shards: Sequence[Shard], consumers: int, window: int = 512, seed: int = 0):
        if len(shards) < consumers:
            raise ShardError(
                f"{len(shards)} shards cannot keep {consumers} data workers busy: write smaller shards or use fewer "
                "workers"
            )
        self.shards, self.consumers = tuple(shards), consumers
        self.window, self.seed = window, seed
        self._clips = [len(shard.numbers) for shard in shards]
        self._frames = [sum(shard.frames) for shard in shards]

    def windows(self, epoch: int) -> list[list[tuple[int, ...]]]:
        """For each consumer its windows of an epoch, in order: places in `shards`."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.shards))
        windows: list[list[tuple[int, ...]]] = [[] for _ in range(self.consumers)]
        open_windows: list[list[int]] = [[] for _ in range(self.consumers)]
        loads = [(0, consumer) for consumer in range(self.consumers)]
        for place in order.tolist():
            load, consumer = loads[0]
            heapq.heapreplace(loads, (load + self._frames[place], consumer))
            held = open_windows[consumer]
            held.append(place)
            if sum(self._clips[p] for p in held) >= self.window:
                windows[consumer].append(tuple(held))
                held.clear()
        for consumer, held in enumerate(open_windows):
            if held:
                windows[consumer].append(tuple(held))
        return windows


class ShardBatches(Sampler[list[int]]):
    """Yields one process's batches of an epoch, lists of clip numbers, made in each window as by `FrameBatchSampler`.

    They go round the process's consumers, as a DataLoader goes round its workers: batch n is made of shards of consumer
    n mod (consumers of the process). All consumers have equally many, and together every clip exactly once; where they
    would not, the fullest are split. So an epoch's length may differ from another's by a few batches.
    """

    def __init__(
        self,
        deal: Deal,
        max_frames: int | None = None,
        num_buckets: int = 400,
        max_clips: int | None = None,
        rank: int = 0,
        world: int = 1,
    ):
        if not 0 <= rank < world or deal.consumers % world:
            raise ValueError(f"expected 0 ≤ rank < world, a divisor of {deal.consumers}, got {rank} and {world}")
        if max_frames is None and max_clips is None:
            raise ValueError("expected max_frames, max_clips, or both")
        self.deal, self.max_frames, self.num_buckets, self.max_clips = deal, max_frames, num_buckets, max_clips
        own = deal.consumers // world
        self.own = range(rank * own, (rank + 1) * own)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, which decides who reads which shards, and in which order."""
        self.epoch = epoch
        self._samplers: list[list[tuple[list[int], FrameBatchSampler]]] | None = None

    def __len__(self) -> int:
        """Batches of the chosen epoch on this rank."""
        return len(self.own) * self._batches_per_consumer()

    def __iter__(self) -> Iterator[list[int]]:
        most = self._batches_per_consumer()
        plans = [self._batches(self._plan()[consumer], most) for consumer in self.own]
        for turn in zip(*plans, strict=True):
            yield from turn

    def _plan(self) -> list[list[tuple[list[int], FrameBatchSampler]]]:
        if self._samplers is None:
            self._samplers = [[self._sampler(w) for w in windows] for windows in self.deal.windows(self.epoch)]
        return self._samplers

    def _sampler(self, window: tuple[int, ...]) -> tuple[list[int], FrameBatchSampler]:
        """The numbers of a window's clips, and what makes batches of places in them."""
        shards = [self.deal.shards[place] for place in window]
        numbers = [number for shard in shards for number in shard.numbers]
        sampler = FrameBatchSampler(
            [frames for shard in shards for frames in shard.frames],
            self.max_frames,
            min(self.num_buckets, -(-len(numbers) // CLIPS_A_BUCKET)),
            seed=int(np.random.SeedSequence([self.deal.seed, *numbers[:2]]).generate_state(1)[0]),
            max_clips=self.max_clips,
        )
        sampler.set_epoch(self.epoch)
        return numbers, sampler

    def _batches_per_consumer(self) -> int:
        """Batches of the consumer that needs most of them."""
        plan = self._plan()
        most = max(sum(len(sampler) for _, sampler in windows) for windows in plan)
        if min(sum(len(numbers) for numbers, _ in windows) for windows in plan) < most:
            raise ShardError(
                "a data worker's shards hold fewer clips than another has batches: write shards of like size"
            )
        return most

    @staticmethod
    def _batches(windows: list[tuple[list[int], FrameBatchSampler]], count: int) -> Iterator[list[int]]:
        """A consumer's batches, the fullest halved until there are `count`; none reaches into another window."""
        made = [(numbers, list(sampler)) for numbers, sampler in windows]
        sizes = iter(split_fullest([len(batch) for _, batches in made for batch in batches], count))
        for numbers, batches in made:
            clips = [numbers[place] for batch in batches for place in batch]
            while clips:
                size = next(sizes)
                yield clips[:size]
                del clips[:size]
