"""Tile configurations: what a configuration is, where it can run, and which one a problem gets.

Nothing is timed at import or at the first call. `tables.py` is the shipped table; `python -m benchmarks tune` measures
the candidates on a GPU and writes it anew.
"""

from dataclasses import dataclass
from functools import lru_cache
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
        """Whether this tile fits the device and does not mostly compute padding.

        A quarter of a block's shared memory or of its registers left over is not this function's business: what is
        slower is for `tune` to say.
        """
        fits = self.shared_memory(dtype) <= SHARED_MEMORY.get(arch, SMALLEST_SHARED_MEMORY)
        # Above 128 accumulators a thread, operands and addresses spill; wgmma needs 64 rows for its warp group.
        registers = self.accumulators() <= 128
        wgmma = arch != 90 or self.block_m >= 64
        padding = self.block_n <= max(64, 2 * shape.n)
        return fits and registers and wgmma and padding


class RouterConfig(NamedTuple):
    block_t: int
    block_d: int
    num_warps: int
    num_stages: int


FALLBACK = TileConfig(64, 64, 32, num_warps=4, num_stages=2)


def kind(dtype: torch.dtype, precision: str) -> str:
    """The row of the table: "half" (bfloat16 and float16 take the same instructions), "tf32" or "ieee"."""
    return "half" if dtype.itemsize == 2 else precision


def table_arch(arch: int) -> int:
    """The architecture whose table serves `arch`: the newest of those not newer than it."""
    return max((a for a in (80, 90, 100) if a <= arch), default=80)


@lru_cache(maxsize=4096)
def gemm_config(arch: int, dtype: torch.dtype, precision: str, rows: int, groups: int, n: int, k: int) -> TileConfig:
    """The tile for (rows, k) × (groups, k, n), chosen by the mean number of rows of a group."""
    shape = GroupedShape(rows, groups, -(-rows // groups), n, k)
    return _choose("gemm", shape, dtype, precision, arch, shape.m)


@lru_cache(maxsize=4096)
def wgrad_config(arch: int, dtype: torch.dtype, precision: str, rows: int, groups: int, m: int, n: int) -> TileConfig:
    """The tile for the (groups, m, n) gradients, chosen by the mean number of rows of a group, which is summed over."""
    shape = GroupedShape(rows, groups, m, n, -(-rows // groups))
    return _choose("wgrad", shape, dtype, precision, arch, shape.k)


def _choose(op: str, shape: GroupedShape, dtype: torch.dtype, precision: str, arch: int, group_rows: int) -> TileConfig:
    from .tables import TABLE

    entries = TABLE[op, table_arch(arch), kind(dtype, precision)]
    # The entry made for this many rows first; then the smaller ones.
    made_for = next((i for i, (up_to, _) in enumerate(entries) if up_to is None or group_rows <= up_to), -1)
    for _, config in reversed(entries[: made_for + 1]):
        if config.supports(shape, dtype, arch):
            return config
    return FALLBACK


def router_config() -> RouterConfig:
    return RouterConfig(block_t=16, block_d=128, num_warps=4, num_stages=3)


def router_splits(tokens: int) -> int:
    """Splits of the tokens over programs in the gate's gradient: its partial sums are this many times the gate."""
    return max(1, min(32, -(-tokens // 64)))


def schedule_items() -> int:
    """Choices one program of the schedule places."""
    return 256


def combine_rows(rows: int) -> int:
    """Rows one program of combine's backward walks: few when rows are few, so that all multiprocessors have work."""
    return 8 if rows <= 4096 else 32


def row_warps(block: int) -> int:
    """Warps for a program that holds a row of `block` elements: 8 elements a thread, 1 to 16 warps."""
    return max(1, min(16, block // 256))
