"""Weights on their way into the L2 while the launches before the one that reads them leave DRAM idle.

With few tokens a product waits for its weights, and router, schedule and combine for latencies. So the router's launch
has programs more that bring W1, the first product's programs bring W2, and combine's backward has programs more for W2.
They ask for lines of memory and wait for nothing; no result depends on it.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import INTERPRETED
from .segments import block_of, ceil_div, expert_segment

FEW_ROWS = 1024  # up to here reading the weights is most of a product's time
ROWS_AN_EXPERT = 4  # on average, and even routing leaves an expert without rows once in 50 times
SMALLEST_L2 = 50 << 20  # of a GPU that is not there: an H100's
PROGRAM_BYTES = 128 << 10  # that one program asks for

_LINE = tl.constexpr(128)
_PROGRAM_BYTES = tl.constexpr(PROGRAM_BYTES)
_BRINGS = tl.constexpr(not INTERPRETED)  # the interpreter has no assembler
_PREFETCH = tl.constexpr("""{
    .reg .pred inside;
    setp.ne.s32 inside, $2, 0;
    @inside prefetch.global.L2 [$1];
    mov.u32 $0, 0;
}""")


class Ahead(NamedTuple):
    """What is brought: the first `size` bytes of each expert's weights."""

    weights: Tensor  # (X, …), contiguous
    size: int

    @property
    def numbers(self) -> tuple[int, int]:
        """For the kernels: `size`, and the bytes from expert to expert."""
        return self.size, self.weights.nbytes // self.weights.shape[0]

    @property
    def programs(self) -> int:
        """How many programs bring it, a piece each (`bring_piece`)."""
        return self.weights.shape[0] * ceil_div(self.size, PROGRAM_BYTES)

    def lines_a_step(self, parts: int, steps: int, threads: int) -> int:
        """So many that in its steps a program brings all of its part of an expert's; one a thread, or more."""
        lines = ceil_div(ceil_div(self.size, _LINE.value), parts)
        return block_of(ceil_div(lines, max(steps, 1)), least=threads)  # a product of K 0 has none, and brings nothing


def worth_bringing(weights: Tensor | None, rows: int, least_rows: int = 1) -> Ahead | None:
    """What a launch that reads `weights` (X, …) for `rows` choices of tokens is to find of them in the L2, if anything.

    `least_rows`: for a launch that does not know which experts have rows; with fewer many would have none.
    """
    if weights is None or weights.numel() == 0 or not least_rows <= rows <= FEW_ROWS or not weights.is_contiguous():
        return None
    X = weights.shape[0]
    return Ahead(weights, min(weights.nbytes // X, _room(weights.device) // X // _LINE.value * _LINE.value))


def is_brought_in_loops(arch: int) -> bool:
    """Whether the loop of a product may hold a prefetch.

    On compute capability 10 and 11 products use tensor memory, and Triton refuses to pipeline an assembler statement.
    """
    return arch // 10 not in (10, 11)


@cache
def _room(device: torch.device) -> int:
    """Bytes that are brought: they stay in the L2 beside all else that is read, and DRAM brings no more in the time."""
    of_gpu = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else SMALLEST_L2
    return of_gpu // 3


@triton.jit
def bring(ptr, begin, end, LINES: tl.constexpr):
    """Of the lines from byte `begin` on the first `LINES`, where they start before byte `end`."""
    if _BRINGS:
        at = begin + tl.arange(0, LINES) * _LINE
        lines = ptr.to(tl.pointer_type(tl.int8)) + at
        inside = (at < end).to(tl.int32)
        tl.inline_asm_elementwise(_PREFETCH, "=r,l,r", [lines, inside], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def expert_weights(ptr, expert, stride):
    """Where an expert's start, `stride` bytes behind those of the one before."""
    return ptr.to(tl.pointer_type(tl.int8)) + expert.to(tl.int64) * stride


@triton.jit
def program_ahead(size, num_experts):
    """Which of the last programs of a grid, those that `bring_piece`, this one is; negative for the others."""
    return tl.program_id(0) - tl.num_programs(0) + num_experts * tl.cdiv(size, _PROGRAM_BYTES)


@triton.jit
def bring_piece(ptr, size, stride, number, offs_ptr, rows):
    """Piece `number` of all experts' first `size` bytes; with `offs_ptr` of those alone that have rows."""
    pieces = tl.cdiv(size, _PROGRAM_BYTES)
    expert = number // pieces
    end = size
    if offs_ptr is not None:
        first_row, last_row = expert_segment(expert, offs_ptr, rows)
        end = tl.where(first_row < last_row, size, 0)
    bring(expert_weights(ptr, expert, stride), number % pieces * _PROGRAM_BYTES, end, _PROGRAM_BYTES // _LINE)


@triton.jit
def part_of(size, number, count):
    """→ (begin, end) of part `number` of `count` of so many bytes, in whole lines."""
    part = tl.cdiv(tl.cdiv(size, _LINE), count) * _LINE
    return number * part, tl.minimum(number * part + part, size)
