"""The processes of torchrun share recordings out: each transcribes its own, the first one tells of all, in order."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

LONGEST_WAIT = timedelta(days=30)  # for the process with the longest recordings


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started; alone it is the first of one.

    device: its own GPU, "cpu" without one; None where it is alone and may choose.
    """

    rank: int = 0
    world: int = 1
    device: str | None = None

    def share(self, paths: Sequence[Path]) -> list[int]:
        """The indices of this process's files, in order: the largest file goes to who has least, and so on."""
        sizes = {index: _size(path) for index, path in enumerate(paths)}
        load, shares = [0] * self.world, [[] for _ in range(self.world)]
        for index in sorted(sizes, key=lambda index: (-sizes[index], index)):
            least = min(range(self.world), key=lambda rank: (load[rank], rank))
            load[least] += sizes[index]
            shares[least].append(index)
        return sorted(shares[self.rank])

    def gathered(self, found: dict) -> dict:
        """The entries that all processes found, in the first; empty in the others. All of them must call this."""
        if self.world == 1:
            return found
        shares: list[dict] | None = [{}] * self.world if self.rank == 0 else None
        dist.gather_object(found, shares)
        return {key: value for share in shares or () for key, value in share.items()}


@contextmanager
def ranks() -> Iterator[Ranks]:
    """This process's place, from torchrun's environment."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        yield Ranks()
        return
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = f"cuda:{local % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("gloo", timeout=LONGEST_WAIT)  # what is exchanged is text
    try:
        yield Ranks(dist.get_rank(), world, device)
    finally:
        dist.destroy_process_group()


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0
