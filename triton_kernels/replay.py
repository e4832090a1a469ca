"""Calls of the same shapes launch the same kernels: from the third call on, the launches of the second are replayed.

Tiles, grids, sizes of results and the choice of compiled kernels follow from shapes, dtypes, alignments and options,
never from values. Working them out takes the host longer than the launches take a GPU that has few tokens.
"""

from collections.abc import Callable
from functools import cache, wraps
from threading import get_ident
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import launch
from .boxes import pointed_at, tensor_of
from .calls import dtype_and_shape, flattened, have_their_own_memory, picker, remember, without_memory

MOST_PLANS = 1024  # the oldest makes room


class Plan(NamedTuple):
    """What a call does. Launches and results pick from: its arguments, the tensors it makes, constants."""

    made: tuple[Tensor, ...]  # tensors without memory, like those
    constants: tuple
    boxes: tuple[tuple[int, int], ...]  # which of the constants is a descriptor, and of which tensor
    launches: tuple[tuple[Callable, Callable], ...]  # a compiled kernel with its grid, and its arguments
    results: Callable
    hooks: tuple[list, ...]  # of the kernels: functions that Triton is to call before a launch

    def run(self, flat: list, stream: int) -> tuple:
        values = [*flat, *map(torch.empty_like, self.made), *self.constants]
        for place, tensor in self.boxes:
            values[place] = pointed_at(values[place], values[tensor])
        for compiled, arguments in self.launches:
            compiled(*arguments(values), stream=stream)
        return self.results(values)


@cache
def replayed(sequence: Callable[..., tuple]) -> Callable[..., tuple]:
    """For a function that does nothing but make empty tensors and launch kernels on them, and reads no value.

    A tensor is its first argument, a tuple its result.
    """

    @wraps(sequence)
    def call(*args) -> tuple:
        if launch.watched():
            return sequence(*args)
        flat = flattened(args)
        active = triton.runtime.driver.active
        device = active.get_current_device()
        plans = launch.plans_for(active)
        key = (sequence, device, *_described(flat))
        plan = plans.get(key)
        if plan is not None and not any(plan.hooks):
            return plan.run(flat, active.get_current_stream(device))
        if plan is not None or key not in plans:  # most shapes of a training run come once
            remember(plans, key, plan, MOST_PLANS)
            return sequence(*args)
        with launch.recording(thread=get_ident()) as recorder:  # each GPU has a thread for its backward passes
            results = sequence(*args)
        remember(plans, key, _plan(flat, recorder.launches, results), MOST_PLANS)
        return results

    return call


def _described(flat: list) -> list:
    """All that a call's launches depend on, and which of its tensors are one and the same."""
    kinds = tuple(map(type, flat))
    pick_tensors, _, pick_others = launch.by_kind(kinds)
    tensors = pick_tensors(flat)
    addresses = [*map(Tensor.data_ptr, tensors)]
    found = [launch.dot_precision(tensors[0].dtype), kinds, pick_others(flat)]
    found += map(dtype_and_shape, tensors)
    found += map(Tensor.stride, tensors)
    found += map(launch.misalignment, addresses)
    if len(set(addresses)) < len(addresses):
        found += map(addresses.index, addresses)
    return found


def _plan(flat: list, launches: list[launch.Launch], results: tuple) -> Plan | None:
    launches = [one for one in launches if 0 not in one.grid]
    compiled = [one.compiled() for one in launches]
    if None in compiled or not have_their_own_memory(results, flat):
        return None  # launched by Triton's own means: somebody looks on; or a result is a view
    tensors, constants, boxes = list(flat), [], []

    def place_of(value: Tensor) -> int:
        for i, other in enumerate(tensors):
            if value is other or (isinstance(other, Tensor) and 0 != value.data_ptr() == other.data_ptr()):
                return i  # itself, or a view of it: kernels are given shapes and strides as numbers
        assert value.storage_offset() == 0, "a kernel was given part of a tensor"
        tensors.append(value)
        return len(tensors) - 1

    def place(value: Any) -> int:  # it must not call itself: a function that does lives, with all tensors, until gc
        if isinstance(value, Tensor):
            return place_of(value)
        constants.append(pointed_at(value, None) if isinstance(value, TensorDescriptor) else value)
        at = -len(constants)  # they are counted from the end
        if isinstance(value, TensorDescriptor):  # a plan keeps no tensor alive
            boxes.append((at, place_of(value.base)))
        return at

    picked = picker([*map(place, results)])  # first: a kernel may have been given another view of one
    picks = [picker([*map(place, (*one.args, *one.constexprs.values()))]) for one in launches]
    given = [tensor_of(arg) for one in launches for arg in one.args]
    launched = {arg.data_ptr() for arg in given if isinstance(arg, Tensor)}
    made = tensors[len(flat) :]
    if any(tensor.numel() and tensor.data_ptr() not in launched for tensor in made):
        return None  # no kernel was given it: something else has filled it
    return Plan(
        tuple(without_memory(tensor, tensor.shape, tensor.dtype) for tensor in made),
        tuple(reversed(constants)),
        tuple(boxes),
        tuple((kernel[one.whole_grid], pick) for kernel, one, pick in zip(compiled, launches, picks, strict=True)),
        picked,
        tuple(one.kernel.pre_run_hooks for one in launches),
    )
