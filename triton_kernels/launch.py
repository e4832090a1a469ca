"""One kernel launch as a value: built by the file that holds the kernel, run by `projection`, watched by the tests.

Building is apart from running, so that what a test compiles for another architecture is what an operator launches.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from operator import attrgetter
from threading import get_ident
from typing import Any, NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from .calls import forget, pickers

INTERPRETED = triton.knobs.runtime.interpret  # as it was when the kernels were decorated


class Launch(NamedTuple):
    kernel: Any  # triton.JITFunction
    grid: tuple[int, ...]
    args: tuple  # run-time arguments, in the kernel's order; None for an absent tensor
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int = 2
    max_registers: int | None = None  # a thread
    dependent: bool = False  # may start while the launch before it ends: programmatic dependent launch

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def run(self) -> None:
        for recorder in _recorders:
            if recorder.thread in (None, get_ident()):
                recorder.launches.append(self)
        if _held_back or 0 in self.grid:
            return
        if INTERPRETED or self.kernel.pre_run_hooks:
            self._run_by_name()
            return
        active = triton.runtime.driver.active
        device = active.get_current_device()
        _forget_other_drivers(active)
        key = self._key(device)
        compiled = _compiled.get(key)
        if compiled is None:
            _compiled[key] = self._run_by_name()
        else:
            stream = active.get_current_stream(device)
            compiled[self.whole_grid](*self.args, *self.constexprs.values(), stream=stream)

    @property
    def whole_grid(self) -> tuple[int, int, int]:
        x, y, z = (*self.grid, 1, 1)[:3]
        return x, y, z

    def compiled(self) -> Any:
        """The compiled kernel that `run` has launched on the current device; None where Triton chose it by itself."""
        return _compiled.get(self._key(triton.runtime.driver.active.get_current_device()))

    def _key(self, device: int) -> tuple:
        constants = *self.constexprs.values(), self.num_warps, self.num_stages, self.max_registers, self.dependent
        return id(self.kernel), device, constants, _specialization(self.args)

    def _run_by_name(self):
        return self.kernel[self.grid](*self.args, **self._keywords())

    def compile(self):
        """Compile for the driver's target without launching; tensors may be on the meta device."""
        return self.kernel.warmup(*self.args, grid=self.grid, **self._keywords())

    def _keywords(self) -> dict[str, Any]:
        options = {}
        if not INTERPRETED:
            options["maxnreg"] = self.max_registers
            options["launch_pdl"] = self.dependent and target_arch() >= 90
        return {**self.constexprs, "num_warps": self.num_warps, "num_stages": self.num_stages, **options}


class Sequence:
    """Runs the launches of one operator: each but the first may start while the one before it ends.

    The first waits for all that is in the stream, whoever launched it: an optimiser may just have written the weights.
    """

    def __init__(self) -> None:
        self.begun = False

    def __call__(self, launch: Launch) -> None:
        launch._replace(dependent=self.begun).run()
        self.begun = self.begun or 0 not in launch.grid


# Compiled kernels by what Triton specialises them on. Its own look-up binds and describes all arguments anew, at every
# launch, and takes twice the time of this one, for which a step of few tokens waits. A new driver empties both tables.
_compiled: dict[tuple, Any] = {}
_plans: dict[tuple, Any] = {}  # of whole sequences: `replay`
_driver: Any = None


def _forget_other_drivers(active: Any) -> None:
    global _driver
    if active is not _driver:
        _compiled.clear()
        forget(_plans)
        _driver = active


def forget_plans() -> None:
    """Sequences are worked out anew: something that their launches depended on has changed."""
    forget(_plans)


def plans_for(active: Any) -> dict[tuple, Any]:
    _forget_other_drivers(active)
    return _plans


misalignment, _dtype = (15).__and__, attrgetter("dtype")  # for `map`, which costs no Python for each tensor


def _specialization(args: tuple) -> tuple:
    """At least what Triton tells arguments apart by: types, dtypes, alignment to 16 bytes, integers, boxes."""
    kinds = tuple(map(type, args))
    pick_tensors, pick_boxes, pick_others = by_kind(kinds)
    tensors = pick_tensors(args)
    alignments = map(misalignment, map(torch.Tensor.data_ptr, tensors))
    return kinds, *map(_dtype, tensors), *alignments, *map(_integer, pick_others(args)), *map(_box, pick_boxes(args))


@cache
def by_kind(kinds: tuple[type, ...]) -> tuple[Callable, ...]:
    """What picks the tensors, the descriptors, and the other arguments, from arguments of these types."""
    return pickers(kinds, torch.Tensor, TensorDescriptor)


@lru_cache(maxsize=4096, typed=True)
def _integer(value: Any) -> tuple[bool, bool, bool] | None:
    """Whether an integer is 1, a multiple of 16, wider than 32 bits."""
    return (value == 1, value % 16 == 0, value.bit_length() > 31) if type(value) is int else None


def _box(boxes: TensorDescriptor) -> tuple:
    return boxes.base.dtype, *boxes.block_shape


class Recorder:
    def __init__(self, execute: bool, thread: int | None):
        self.execute, self.thread = execute, thread
        self.launches: list[Launch] = []

    def names(self) -> list[str]:
        return [launch.name for launch in self.launches]


_recorders: list[Recorder] = []
_held_back = 0


def watched() -> bool:
    """Whether somebody looks at each launch, or Triton interprets them."""
    return bool(INTERPRETED or _recorders)


@contextmanager
def recording(execute: bool = True, thread: int | None = None) -> Iterator[Recorder]:
    """Record every launch made inside, or those of one thread; with `execute=False` none of them reaches the driver."""
    global _held_back
    recorder = Recorder(execute, thread)
    _recorders.append(recorder)
    _held_back += not execute
    try:
        yield recorder
    finally:
        _recorders.remove(recorder)
        _held_back -= not execute


def target_arch() -> int:
    """Compute capability × 10 of the device Triton drives, e.g. 90."""
    return 80 if INTERPRETED else triton.runtime.driver.active.get_current_target().arch


def device_type() -> str:
    """Where tensors must live for a launch: "cuda" on a GPU; the driver decides."""
    return "cpu" if INTERPRETED else triton.runtime.driver.active.get_active_torch_device().type


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of float32 products, as PyTorch's own on a GPU: every way of setting it shows in this one."""
    tf32 = dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"
