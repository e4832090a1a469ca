"""Ways to run a backend's kernels: as PTX on the CPU, interpreted, or on a GPU. Tests are written once, over runners.

A runner yields, inside `running()`, a `llama_smop.ops.backends.Backend`, and moves
tensors to where that backend wants them. `vary(seed)` changes what must not matter: when asynchronous copies land and
the order in which warps run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch

from llama_smop.ops import dispatch
from tests import ptxrun_support

ALL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Runner:
    """A backend on the device it drives; by itself, on a GPU."""

    backend: str = "triton"
    arch: int = 0
    device: str = "cuda"
    dtypes: tuple[torch.dtype, ...] = ALL_DTYPES
    orders: tuple[int, ...] = (0, 4)  # seeds of `vary`, whose results must agree to the bit

    @property
    def module(self) -> ModuleType:
        return dispatch.module(self.backend)

    @contextmanager
    def running(self) -> Iterator[ModuleType]:
        yield self.module

    def vary(self, seed: int, races: bool = False) -> None:
        """Choose another order of everything asynchronous, and look for data races, if this runner can."""


@dataclass(frozen=True)
class TritonPtx(Runner):
    """Triton's PTX for `arch`, run on the CPU with unchanged launchers."""

    arch: int = 90
    device: str = "cpu"

    @contextmanager
    def running(self) -> Iterator[ModuleType]:
        from triton.compiler.compiler import max_shared_mem

        driver = ptxrun_support.load("ptxrun.triton_driver")
        with driver.active(arch=self.arch, mode="early", seed=0, strict=True):
            max_shared_mem.cache_clear()  # Triton keeps it by device number, whatever the device is
            yield self.module

    def vary(self, seed: int, races: bool = False) -> None:
        from triton.runtime.driver import driver

        driver.active.options.update(mode=("early", "late", "mixed")[seed % 3], seed=seed, races=races)


@dataclass(frozen=True)
class Interpreted(Runner):
    """Triton's interpreter (TRITON_INTERPRET=1), which has one order; bfloat16 is wrong there."""

    device: str = "cpu"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16)
    orders: tuple[int, ...] = (0,)


def triton_params(*cases: tuple) -> list:
    """pytest parameters (runner, name) for cases (name, arch, …): as PTX for each arch, and on the GPU.

    Under TRITON_INTERPRET=1 the interpreter takes their place.
    """
    import triton

    if triton.knobs.runtime.interpret:
        return [pytest.param(Interpreted(), name, id=f"{name}-interpreted") for name, *_ in cases]
    missing = ptxrun_support.missing()
    absent = pytest.mark.skipif(missing is not None, reason=str(missing))
    on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    params = []
    for name, *archs in cases:
        params += [pytest.param(TritonPtx(arch=arch), name, id=f"{name}-sm{arch}", marks=absent) for arch in archs]
        params.append(pytest.param(Runner(), name, id=f"{name}-gpu", marks=on_gpu))
    return params


def slow(params: list) -> list:
    """The same, among the slow tests."""
    return [one._replace(marks=[*one.marks, pytest.mark.slow]) for one in params]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors come filled with NaN (integers: the largest), so an element nobody writes is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
