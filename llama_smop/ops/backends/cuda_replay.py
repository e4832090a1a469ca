"""Calls of the same shapes launch the same kernels: from the third call on, the launches of the second are replayed.

Sizes, the tensors that are made and the order of launches follow from shapes, dtypes, strides and options, never from
values. Naming every argument of every launch takes the host longer than the launches take a GPU that has few tokens. A
replay hands the extension addresses and the stream, once; it still chooses kernels by alignment at every launch.
`llama_smop.triton_kernels.replay` does the same for the launches of Triton.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from llama_smop.ops.backends import cuda_extension
from llama_smop.triton_kernels.calls import (  # imports no Triton
    dtype_and_shape,
    flattened,
    have_their_own_memory,
    picker,
    pickers,
    remember,
    without_memory,
)

MOST_SHAPES = 1024  # the oldest makes room
ALIGNMENT = 256  # bytes, of tensors that share memory; more than any kernel asks for

_known: dict[tuple, "Plan | None"] = {}  # by the first tensor's shape, None: it has come; by all of a call: its plan
_inside: set[int] = set()  # threads that are in a sequence
_noted: dict[int, list[Tensor]] = {}  # by thread whose launches are noted: the tensors that they were given


class launches:
    """Makes the device of a tensor current and holds its stream: `with launches(x) as stream:`."""

    def __init__(self, tensor: Tensor):
        self.device = tensor.device
        self.guard = torch.cuda.device(self.device) if tensor.is_cuda else None

    def __enter__(self) -> int:
        if self.guard is None:
            return 0
        self.guard.__enter__()
        return torch._C._cuda_getCurrentRawStream(self.device.index)

    def __exit__(self, *error) -> None:
        if self.guard is not None:
            self.guard.__exit__(*error)


def address(tensor: Tensor | None) -> int:
    """As a launch takes it: 0 for what is absent or empty."""
    if tensor is None:
        return 0
    if _noted and (noted := _noted.get(get_ident())) is not None:
        noted.append(tensor)  # kept, so that no later one of the call gets its memory
    return tensor.data_ptr()


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    """As a replay takes them."""
    return [*map(Tensor.data_ptr, tensors)]


@dataclass(frozen=True, repr=False)  # printing tensors without memory would read it
class Plan:
    """What a call does. Launches and results pick from: None, its arguments, the tensors it makes."""

    launches: Any  # the extension's Plan
    made: tuple[Tensor, ...]  # tensors without memory, like those; the last holds all that is no result
    given: Callable[[Sequence], tuple]  # to the launches
    results: Callable[[Sequence], tuple]

    def run(self, flat: list) -> tuple:
        values = [None, *flat, *map(torch.empty_like, self.made)]
        with launches(flat[0]) as stream:
            cuda_extension.extension().run(plan=self.launches, arrays=addresses(self.given(values)), stream=stream)
        return self.results(values)


@cache
def replayed(sequence: Callable[..., tuple]) -> Callable[..., tuple]:
    """For a function that does nothing but make empty tensors and launch on them, and reads no value.

    A tensor is its first argument, a tuple its result.
    """

    @wraps(sequence)
    def call(*args) -> tuple:
        thread = get_ident()  # each GPU has one for its backward passes
        if thread in _inside:  # part of a longer sequence
            return sequence(*args)
        shape = (sequence, args[0].shape)
        if shape not in _known:  # most shapes of a training run come once
            remember(_known, shape, None, MOST_SHAPES)
            return _within(thread, sequence, args)
        flat = flattened(args)
        key = (sequence, *_described(flat))
        plan = _known.get(key)
        if plan is not None:
            return plan.run(flat)
        noting, noted = cuda_extension.extension().Plan(), _noted.setdefault(thread, [])
        try:
            with noting:
                results = _within(thread, sequence, args)
        finally:
            del _noted[thread]
        remember(_known, key, _plan(flat, noting, noted, results), MOST_SHAPES)
        return results

    return call


def _within(thread: int, sequence: Callable[..., tuple], args: tuple) -> tuple:
    _inside.add(thread)
    try:
        return sequence(*args)
    finally:
        _inside.remove(thread)


def _described(flat: list) -> list:
    """All that a call's launches depend on, and which of its tensors are one and the same."""
    kinds = tuple(map(type, flat))
    pick_tensors, pick_others = _by_kind(kinds)
    tensors = pick_tensors(flat)
    found = [cuda_extension.extension(), tensors[0].device, kinds, pick_others(flat)]
    found += map(dtype_and_shape, tensors)
    found += map(Tensor.stride, tensors)
    where = [*map(Tensor.data_ptr, tensors)]
    if len(set(where)) < len(where):
        found += map(where.index, where)
    return found


@cache
def _by_kind(kinds: tuple[type, ...]) -> tuple[Callable, ...]:
    """What picks the tensors, and the other arguments, from arguments of these types."""
    return pickers(kinds, Tensor)


def _plan(flat: list, noting: Any, noted: list[Tensor], results: tuple) -> Plan | None:
    values: list[Any] = [None, *flat]
    made = [r for r in results if isinstance(r, Tensor) and all(r is not value for value in flat)]
    launched = noting.addresses
    if any(r.numel() and r.data_ptr() not in launched for r in made):
        return None  # no launch was given it: something else has filled it
    if not have_their_own_memory(results, flat):
        return None
    values += made
    where = [value.data_ptr() if isinstance(value, Tensor) else None for value in values]
    scratch = {tensor.data_ptr(): tensor for tensor in noted}
    places, used = [], 0  # of each address: its value, bytes behind it
    for one in launched:
        if one in where:
            places.append((where.index(one), 0))
            continue
        assert scratch[one].storage_offset() == 0, "a launch was given part of a tensor"
        places.append((len(values), used))
        used += -(-scratch[one].untyped_storage().nbytes() // ALIGNMENT) * ALIGNMENT
    given = sorted({value for value, _ in places})
    noting.place([(given.index(value), offset) for value, offset in places])
    likes = [without_memory(r, r.shape, r.dtype) for r in made]
    if used:
        likes.append(without_memory(flat[0], (used,), torch.uint8))
    result_places = [next(i for i, value in enumerate(values) if value is r) for r in results]
    return Plan(noting, tuple(likes), picker(given), picker(result_places))
