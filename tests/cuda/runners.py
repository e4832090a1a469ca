"""The CUDA backend as a runner of tests/kernels: nvcc's PTX on the CPU, or the installed extension on a GPU."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from unittest import mock

import pytest
import torch

from llama_smop.ops.backends import cuda as cuda_backend
from llama_smop.ops.backends import cuda_extension, cuda_replay
from tests import ptxrun_support
from tests.cuda import extension
from tests.kernels.runners import Runner


class Launches:
    """What runs under ptxrun, in one order after another; `log` has a dict a launch of the current order."""

    def __init__(self, **options):
        self.options = options
        self.session, self.log = None, []

    def start(self, mode: str, seed: int) -> None:
        self.stop()
        self.session = ptxrun_support.load("ptxrun.cuda").active(mode=mode, seed=seed, strict=True, **self.options)
        self.log = self.session.__enter__()

    def stop(self, *error) -> None:
        """Ends the order; raises what its launches did wrong, if nothing has been raised yet."""
        if self.session is not None:
            session, self.session = self.session, None
            session.__exit__(*(error or (None, None, None)))

    def reach(self, tensor: torch.Tensor) -> None:
        """Kernels under ptxrun reach the tensors they are told of, to the byte, and nothing else."""
        self.session.tensors.append((f"{tuple(tensor.shape)} {tensor.dtype}", tensor))

    @property
    def kernels(self) -> list[str]:
        """Names of the launched kernels, without namespaces and arguments."""
        return [launch["name"].split("(anonymous namespace)::")[1].split("(")[0] for launch in self.log]


launches: Launches | None = None  # inside CudaPtx.running()


@dataclass(frozen=True)
class CudaPtx(Runner):
    """PTX of the extension for `arch`, run on CPU tensors.

    `sms` is the number of SMs the launchers see (0: those of the usual card): with few, the persistent kernels walk
    many tiles and take wide ones. `races` looks for unordered accesses to shared memory.
    """

    backend: str = "cuda"
    arch: int = 90
    device: str = "cpu"
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    sms: int = 0
    races: bool = False

    @contextmanager
    def running(self) -> Iterator[ModuleType]:
        global launches
        module, address, addresses = extension.on_ptxrun(), cuda_backend._ptr, cuda_replay.addresses
        launches = Launches(arch=self.arch, sms=self.sms, races=self.races)

        def reached_address(tensor: torch.Tensor | None) -> int:
            if tensor is not None and tensor.numel():
                launches.reach(tensor)
            return address(tensor)

        def reached_addresses(tensors: Sequence[torch.Tensor]) -> list[int]:
            for tensor in tensors:
                if tensor.numel():
                    launches.reach(tensor)
            return addresses(tensors)

        reached = mock.patch.multiple(cuda_backend, _ptr=reached_address, extension=lambda: module)
        # No plan of another test: the first two calls of a shape are launched one by one.
        replays = mock.patch.multiple(cuda_replay, addresses=reached_addresses, _known={})
        cpu_counts_as_gpu = mock.patch.multiple(
            cuda_extension, unsupported_device=lambda device: None, extension=lambda: module
        )
        with cpu_counts_as_gpu, reached, replays:
            launches.start("early", 0)
            try:
                yield cuda_backend
            except BaseException as error:
                launches.stop(type(error), error, error.__traceback__)
                raise
            launches.stop()

    def vary(self, seed: int) -> None:
        launches.start(("early", "late", "mixed")[seed % 3], seed)

    def __str__(self) -> str:
        return f"sm{self.arch}" + (f"-{self.sms}sms" if self.sms else "") + ("-races" if self.races else "")


ON_PTX = pytest.mark.skipif(extension.missing_for_ptx() is not None, reason=str(extension.missing_for_ptx()))


def gpu_reason() -> str | None:
    """Why the installed extension cannot be run on a GPU here, or None when it can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    return cuda_backend.unsupported(torch.bfloat16, torch.device("cuda"), 1, 1)


def params(*runners: CudaPtx) -> list:
    """pytest parameters: the given runners, and the GPU."""
    reason = gpu_reason()
    on_gpu = [pytest.mark.gpu, pytest.mark.skipif(reason is not None, reason=str(reason))]
    gpu = Runner(backend="cuda", dtypes=CudaPtx.dtypes)
    return [pytest.param(r, id=str(r), marks=ON_PTX) for r in runners] + [pytest.param(gpu, id="gpu", marks=on_gpu)]


def cases(*named: tuple) -> list:
    """As `params`, for cases (name, runner, …): parameters (runner, name)."""
    return [
        pytest.param(p.values[0], name, id=f"{name}-{p.id}", marks=p.marks)
        for name, *runners in named
        for p in params(*runners)
    ]
