"""A tile configuration: what it is, what it takes, and where it can run."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

# Shared memory a block may ask for, bytes, by compute capability (CUDA programming guide, technical specifications).
SHARED_MEMORY = {80: 166_912, 86: 101_376, 87: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448}
SMALLEST_SHARED_MEMORY = 101_376


class GroupedShape(NamedTuple):
    """A grouped product: `rows` in all, over `groups`; (rows, k) × (groups, k, n), or the (m, n) gradients of it."""

    rows: int
    groups: int
    m: int  # rows of one output tile's matrix: the rows of a group on average, or a weight gradient's first dimension
    n: int
    k: int  # the dimension summed over


@dataclass(frozen=True)
class TileConfig:
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8  # row tiles that go through all columns together, so that they share weights in L2

    def shared_memory(self, dtype: torch.dtype) -> int:
        """Bytes of the pipelined operand tiles; the epilogue's layout change reuses them."""
        operands = (self.block_m + self.block_n) * self.block_k * dtype.itemsize * self.num_stages
        return max(operands, self.block_m * self.block_n * dtype.itemsize)

    def accumulators(self) -> int:
        """Float32 accumulator registers a thread."""
        return self.block_m * self.block_n // (32 * self.num_warps)

    def supports(self, shape: GroupedShape, dtype: torch.dtype, arch: int) -> bool:
        """Whether this tile fits the device, without spills, and does not mostly compute padding."""
        fits = self.shared_memory(dtype) <= SHARED_MEMORY.get(arch, SMALLEST_SHARED_MEMORY)
        # Above 128 accumulators a thread, operands and addresses spill; wgmma needs 64 rows for its warp group.
        registers = self.accumulators() <= 128
        wgmma = arch != 90 or self.block_m >= 64
        padding = self.block_n <= max(64, 2 * shape.n)
        return fits and registers and wgmma and padding
