"""Which configuration a problem gets.

Nothing is timed at import or at the first call. `tables.py` is the shipped table; `python -m benchmarks tune` measures
the candidates on a GPU and writes it anew.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from .tables import TABLE
from .tiles import MACHINES, GroupedShape, TileConfig


class RouterConfig(NamedTuple):
    block_t: int
    block_d: int
    num_warps: int
    num_stages: int


ROUTER_TOKENS = 16  # tokens a block of the router
FALLBACK = TileConfig(64, 64, 32, num_warps=4, num_stages=2)


def kind(dtype: torch.dtype, precision: str) -> str:
    """The row of the table: "half" (bfloat16 and float16 take the same instructions), "tf32" or "ieee"."""
    return "half" if dtype.itemsize == 2 else precision


def table_arch(arch: int) -> int:
    """The architecture whose table serves `arch`: the newest of those not newer than it."""
    return max((a for a in (80, 90, 100) if a <= arch), default=80)


def gemm_shape(rows: int, groups: int, n: int, k: int) -> GroupedShape:
    """(rows, k) × (groups, k, n)."""
    return GroupedShape(rows, groups, -(-rows // groups), n, k)


def wgrad_shape(rows: int, groups: int, m: int, n: int) -> GroupedShape:
    """The (groups, m, n) gradients, summed over rows."""
    return GroupedShape(rows, groups, m, n, -(-rows // groups))


@lru_cache(maxsize=4096)
def gemm_config(arch: int, dtype: torch.dtype, precision: str, rows: int, groups: int, n: int, k: int) -> TileConfig:
    return entry("gemm", arch, dtype, precision, gemm_shape(rows, groups, n, k))[1]


@lru_cache(maxsize=4096)
def wgrad_config(arch: int, dtype: torch.dtype, precision: str, rows: int, groups: int, m: int, n: int) -> TileConfig:
    return entry("wgrad", arch, dtype, precision, wgrad_shape(rows, groups, m, n))[1]


# Multiply-adds. Describing boxes takes the host some microseconds; so large a product takes an H100 25 or more.
SMALLEST_BY_BOXES = 1 << 33


def by_boxes(arch: int, dtype: torch.dtype, config: TileConfig, multiply_adds: int) -> bool:
    """Whether operands come by TMA (`boxes`), not by pointers.

    Two blocks on a multiprocessor load while the other one multiplies, and have no registers for barriers. Float32
    would pass through registers on its way to tensor cores.
    """
    return arch >= 90 and dtype.itemsize == 2 and config.blocks == 1 and multiply_adds >= SMALLEST_BY_BOXES


def tile_by_boxes(arch: int, dtype: torch.dtype, precision: str) -> TileConfig | None:
    """The tile of products so large that they take their operands by TMA; None where none does."""
    tile = gemm_config(arch, dtype, precision, rows=1 << 16, groups=1, n=1 << 12, k=1 << 12)
    return tile if by_boxes(arch, dtype, tile, SMALLEST_BY_BOXES) else None


def entry(op: str, arch: int, dtype: torch.dtype, precision: str, shape: GroupedShape) -> tuple[float, TileConfig]:
    """The table's (factor, tile) for a product: the least cost among those that fit."""
    row = kind(dtype, precision)
    fits = [e for e in TABLE[op, table_arch(arch), row] if e[1].supports(shape, dtype, arch)]
    return min(fits, key=lambda e: e[0] * cost(op, arch, dtype, precision, shape, e[1]), default=(1.0, FALLBACK))


def cost(op: str, arch: int, dtype: torch.dtype, precision: str, shape: GroupedShape, config: TileConfig) -> float:
    """Modelled cycles of a product with a tile."""
    return config.cost(op, shape, dtype, MACHINES[table_arch(arch)], kind(dtype, precision))


def router_config(columns: int, itemsize: int) -> RouterConfig:
    """As wide a slice of D as 64 KiB hold, loaded at once: all of 1024 features of 16 bits for up to 16 columns.

    Many columns leave no registers for that: narrow slices then, three of them in flight.
    """
    if columns > 32:
        return RouterConfig(ROUTER_TOKENS, max(32, 4096 // columns), num_warps=4, num_stages=3)
    width = 65_536 // ((ROUTER_TOKENS + columns) * itemsize)
    return RouterConfig(ROUTER_TOKENS, 1 << (width.bit_length() - 1), num_warps=4, num_stages=1)


def router_bwd_config(columns: int) -> RouterConfig:
    """More tokens at once where the routers' columns are few: a step waits for loads, however few they are."""
    return RouterConfig(max(16, min(32, 512 // columns)), max(32, min(128, 4096 // columns)), 4, 2)


def router_splits(tokens: int) -> int:
    """Splits of the tokens over programs in the gate's gradient: its partial sums are this many times the gate."""
    return max(1, min(64, -(-tokens // 64)))


def schedule_items() -> int:
    """Choices one program of the schedule places."""
    return 256


def combine_rows(rows: int) -> int:
    """Rows one program of combine's backward walks: two programs or more for each multiprocessor of an H100."""
    return max(2, min(32, -(-rows // 264)))


COMBINE_ELEMENTS = 8192  # of a token's rows that combine's forward holds at once


def combine_fwd_warps(elements: int) -> int:
    """32 elements a thread: a row's loads are all in flight, and few warps wait for each other in its sums."""
    return max(1, min(8, elements // 1024))


def combine_bwd_warps(elements: int) -> int:
    """16 elements a thread: beside the row it holds five vectors of that length."""
    return max(1, min(16, elements // 512))
