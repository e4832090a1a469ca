"""Large CPU tensors in memory that is kept and used again.

Stacked weight gradients are tens of megabytes, fresh in every backward. PyTorch's CPU allocator gives such blocks back
to the system at once, and faulting them in anew costs more than the matrix product that fills them at few tokens. So
large tensors live in anonymous mappings on huge pages. A mapping whose last tensor is gone waits for the next tensor of
its size; at most `KEPT_BYTES` wait. Elsewhere than on Linux this is `new_empty`.
"""

import mmap
import weakref
from collections import deque
from math import prod

import torch
from torch import Tensor

MIN_BYTES = 1 << 20
KEPT_BYTES = 512 << 20

_HUGE_PAGE = 2 << 20
_SUPPORTED = hasattr(mmap, "MAP_ANONYMOUS") and hasattr(mmap, "MADV_HUGEPAGE")
# Weak references to buffers that tensors use, each with its mapping. A dying buffer moves its mapping to `_free`;
# single operations on a dict and a deque are atomic, so threads and the garbage collector need no lock.
_used: dict[int, tuple[weakref.ref, mmap.mmap]] = {}
_free: deque[mmap.mmap] = deque()  # longest unused first


def empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """`like.new_empty(shape)`; a large CPU tensor comes from kept memory."""
    count = prod(shape)
    size = count * like.element_size()
    if size < MIN_BYTES or like.device.type != "cpu" or not _SUPPORTED:
        return like.new_empty(shape)
    mapping = _take(size)
    buffer = memoryview(mapping)  # lives as long as the storage made of it
    watch = weakref.ref(buffer, _give_back)
    _used[id(watch)] = watch, mapping
    return torch.frombuffer(buffer, dtype=like.dtype, count=count).view(shape)


def release() -> None:
    """Return the memory that no tensor uses to the system."""
    _free.clear()


def _take(size: int) -> mmap.mmap:
    granule = max(_HUGE_PAGE, 1 << (size.bit_length() - 3))  # token counts vary: sizes within a quarter share
    size = -(-size // granule) * granule
    passed = []
    try:
        while True:
            mapping = _free.pop()
            if len(mapping) == size:
                return mapping
            passed.append(mapping)
    except IndexError:  # nothing left that fits
        mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        mapping.madvise(mmap.MADV_HUGEPAGE)
        return mapping
    finally:
        _free.extend(reversed(passed))


def _give_back(watch: weakref.ref) -> None:
    _free.append(_used.pop(id(watch))[1])
    kept = []
    try:
        while True:
            kept.append(_free.pop())
            if sum(map(len, kept)) > KEPT_BYTES:
                kept.pop()
                _free.clear()
    except IndexError:
        _free.extend(reversed(kept))
