"""A tile configuration: what it is, what it takes, where it can run, and how long a product would take with it."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

# Shared memory a block may ask for, bytes, by compute capability (CUDA programming guide, technical specifications).
SHARED_MEMORY = {80: 166_912, 86: 101_376, 87: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448}
SMALLEST_SHARED_MEMORY = 101_376
REGISTERS = 65_536  # of a multiprocessor

# Cycles of a block outside of its main loop, as read from the machine code for sm_90: finding its tile and filling the
# pipeline, and a part that grows with the elements it stores.
BLOCK_CYCLES, ELEMENTS_A_CYCLE = 3500, 16


class Machine(NamedTuple):
    """What the cost of a tile is reckoned with; rates are of one multiprocessor, in a cycle."""

    multiprocessors: int
    flops: dict[str, int]  # by kind of product
    l2_bytes: float  # when all read at once
    shared_bytes: int = 128


MACHINES = {
    80: Machine(108, {"half": 2048, "tf32": 1024, "ieee": 128}, 47.0),
    90: Machine(132, {"half": 4096, "tf32": 2048, "ieee": 256}, 46.6),
    100: Machine(148, {"half": 8192, "tf32": 4096, "ieee": 256}, 46.6),
}


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
    blocks: int = 1  # resident on a multiprocessor of the table's architecture: registers are limited so that they fit

    def shared_memory(self, dtype: torch.dtype) -> int:
        """Bytes of the pipelined operand tiles; the epilogue's layout change reuses them."""
        operands = (self.block_m + self.block_n) * self.block_k * dtype.itemsize * self.num_stages
        return max(operands, self.block_m * self.block_n * dtype.itemsize)

    def accumulators(self) -> int:
        """Float32 accumulator registers a thread."""
        return self.block_m * self.block_n // (32 * self.num_warps)

    @property
    def max_registers(self) -> int | None:
        """Registers a thread may take, or None where the hardware's own limit is no higher."""
        limit = REGISTERS // (32 * self.num_warps * self.blocks)
        return limit if limit < 255 else None

    def supports(self, shape: GroupedShape, dtype: torch.dtype, arch: int) -> bool:
        """Whether this tile fits the device, without spills, and does not mostly compute padding."""
        fits = self.shared_memory(dtype) <= SHARED_MEMORY.get(arch, SMALLEST_SHARED_MEMORY)
        # Above 128 accumulators a thread, operands and addresses spill; wgmma needs 64 rows for its warp group.
        registers = self.accumulators() <= 128
        wgmma = arch != 90 or self.block_m >= 64
        padding = self.block_n <= max(64, 2 * shape.n)
        return fits and registers and wgmma and padding

    def cycles(self, dtype: torch.dtype, machine: Machine, kind: str) -> float:
        """Of one step of the main loop on a full multiprocessor: a soft maximum of what it needs at once."""
        m, n, k = self.block_m, self.block_n, self.block_k
        loaded = (m + n) * k * dtype.itemsize
        read = (m + n * max(1, m // 64)) * k * dtype.itemsize  # every 64 rows read the other operand anew
        terms = (
            2 * m * n * k / machine.flops[kind],
            (loaded + read) / machine.shared_bytes,
            loaded / machine.l2_bytes,
        )
        return sum(t**5 for t in terms) ** 0.2

    def cost(self, op: str, shape: GroupedShape, dtype: torch.dtype, machine: Machine, kind: str) -> float:
        """Cycles of a whole product: tiles a multiprocessor × steps, and what its blocks do outside of them."""
        rows = shape.m / self.block_m + 0.5 if op == "gemm" else -(-shape.m // self.block_m)  # half a tile hangs over
        tiles = min(shape.groups * rows, max(shape.rows, 1)) * -(-shape.n // self.block_n)
        each = math.ceil(tiles / machine.multiprocessors)
        steps = each * -(-shape.k // self.block_k) * self.cycles(dtype, machine, kind)
        return steps + -(-each // self.blocks) * (BLOCK_CYCLES + self.block_m * self.block_n / ELEMENTS_A_CYCLE)
