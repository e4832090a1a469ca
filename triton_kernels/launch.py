"""One kernel launch as a value: built by the file that holds the kernel, run by `projection`, watched by the tests.

Building is apart from running, so that what a test compiles for another architecture is what an operator launches.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton

INTERPRETED = triton.knobs.runtime.interpret  # as it was when the kernels were decorated


class Launch(NamedTuple):
    kernel: Any  # triton.JITFunction
    grid: tuple[int, ...]
    args: tuple  # run-time arguments, in the kernel's order; None for an absent tensor
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int = 2

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def run(self) -> None:
        for recorder in _recorders:
            recorder.launches.append(self)
        if _held_back or 0 in self.grid:
            return
        if INTERPRETED or self.kernel.pre_run_hooks:
            self._run_by_name()
            return
        active = triton.runtime.driver.active
        device = active.get_current_device()
        constants = *self.constexprs.values(), self.num_warps, self.num_stages
        key = id(self.kernel), device, constants, _specialization(self.args)
        known = _compiled_for(active)
        compiled = known.get(key)
        if compiled is None:
            known[key] = self._run_by_name()
        else:
            grid = (*self.grid, 1, 1)[:3]
            compiled[grid](*self.args, *self.constexprs.values(), stream=active.get_current_stream(device))

    def _run_by_name(self):
        return self.kernel[self.grid](
            *self.args, **self.constexprs, num_warps=self.num_warps, num_stages=self.num_stages
        )

    def compile(self):
        """Compile for the driver's target without launching; tensors may be on the meta device."""
        return self.kernel.warmup(
            *self.args, grid=self.grid, **self.constexprs, num_warps=self.num_warps, num_stages=self.num_stages
        )


# Compiled kernels by what Triton specialises them on. Its own look-up binds and describes all arguments anew, at every
# launch, and takes twice the time of this one, for which a step of few tokens waits. A new driver empties the table.
_compiled: dict[tuple, Any] = {}
_driver: Any = None


def _compiled_for(active: Any) -> dict[tuple, Any]:
    global _driver
    if active is not _driver:
        _compiled.clear()
        _driver = active
    return _compiled


def _specialization(args: tuple) -> tuple:
    """At least what Triton tells arguments apart by.

    A tensor's dtype and alignment to 16 bytes; whether an integer is 1, a multiple of 16, wider than 32 bits.
    """
    found: list[Any] = []
    for arg in args:
        if type(arg) is int:
            found.append(1 if arg == 1 else (arg % 16 == 0, arg.bit_length() > 31))
        elif isinstance(arg, torch.Tensor):
            found.append((arg.dtype, arg.data_ptr() % 16 == 0))
        else:
            found.append(type(arg))
    return tuple(found)


class Recorder:
    def __init__(self, execute: bool):
        self.execute = execute
        self.launches: list[Launch] = []

    def names(self) -> list[str]:
        return [launch.name for launch in self.launches]


_recorders: list[Recorder] = []
_held_back = 0


@contextmanager
def recording(execute: bool = True) -> Iterator[Recorder]:
    """Record every launch made inside; with `execute=False` none of them reaches the driver."""
    global _held_back
    recorder = Recorder(execute)
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
