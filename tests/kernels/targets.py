"""A Triton driver that has a target and nothing else: kernels are compiled for it, from meta tensors, and never run."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver


class CompileOnly:
    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # a device of its own for each target: compiled kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextmanager
def driven_by(stand_in: CompileOnly) -> Iterator[None]:
    before = driver._active  # reset_active() would look for a GPU
    driver.set_active(stand_in)
    try:
        yield
    finally:
        driver._active = before


def compiling_for(arch: int) -> AbstractContextManager[None]:
    return driven_by(CompileOnly(arch))
