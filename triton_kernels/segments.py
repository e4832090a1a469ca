"""Which rows an expert owns, and which rows a program works on, found on the device from `offs`.

Rows of the intermediates are the T·K choices in expert order; expert e owns rows offs[e-1] to offs[e].
A kernel's grid is the worst case over all routings; each program finds its own tile, and surplus programs leave.
"""

import triton
import triton.language as tl


def ceil_div(a: int, b: int) -> int:
    """As triton.cdiv, which on the host costs a microsecond for being a constexpr function too."""
    return -(-a // b)


def max_tiles(rows: int, segments: int, block_rows: int) -> int:
    """The most tiles of `block_rows` that `segments` segments holding `rows` rows in all can need."""
    return min(rows, (rows + segments * (block_rows - 1)) // block_rows)


def block_of(size: int, least: int = 16) -> int:
    """The width of a block that covers `size`: a power of two."""
    return max(least, 1 << (size - 1).bit_length())


@triton.jit
def existing(index, last):
    """An entry of `offs`, `order` or `inverse` as it may be used, 0 to `last`.

    A caller's can be anything, and the host does not read it.
    """
    return tl.minimum(tl.maximum(index, 0), last)


@triton.jit
def expert_segment(expert, offs_ptr, rows):
    """→ (begin, end) rows of an expert, of the `rows` that exist."""
    begin = tl.load(offs_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offs_ptr + expert)
    return existing(begin, rows), existing(end, rows)


@triton.jit
def tiles_per_expert(offs_ptr, num_experts, rows, tile_rows, TAIL: tl.constexpr, BLOCK_X: tl.constexpr):
    """→ (begin, end, tiles), each (BLOCK_X,). With TAIL the rows past the last offset count as one expert more."""
    x = tl.arange(0, BLOCK_X)
    begin = tl.load(offs_ptr + x - 1, mask=(x > 0) & (x <= num_experts), other=0)
    end = tl.load(offs_ptr + x, mask=x < num_experts, other=0)
    if TAIL:
        end = tl.where(x == num_experts, rows, end)
    begin, end = existing(begin, rows), existing(end, rows)
    return begin, end, tl.cdiv(tl.maximum(end - begin, 0), tile_rows)


@triton.jit
def tile_segment(tile, offs_ptr, num_experts, rows, tile_rows, TAIL: tl.constexpr, BLOCK_X: tl.constexpr):
    """→ (expert, first row, end of its rows) of a tile. `expert == num_experts` in the tail, greater past the end."""
    begins, ends, tiles = tiles_per_expert(offs_ptr, num_experts, rows, tile_rows, TAIL, BLOCK_X)
    done = tl.cumsum(tiles, 0)
    expert = tl.sum((done <= tile).to(tl.int32), 0)
    mine = tl.arange(0, BLOCK_X) == expert
    first = tl.sum(tl.where(mine, begins + (tile - done + tiles) * tile_rows, 0), 0)
    end = tl.sum(tl.where(mine, ends, 0), 0)
    return expert, first, end
