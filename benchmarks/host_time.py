"""`python -m benchmarks host-time`: what a training step of few tokens costs the host, by backend.

No kernel runs: what launches it does nothing, on CPU tensors. All else is as in a training: the module, autograd, the
choice of kernels, the tensors. Several revisions of the Triton backend take turns, and this checkout's CUDA C++ backend
where there is an nvcc, each in processes of its own.
"""

import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

TOKENS, SIZES = 100, {"in_features": 48, "hidden_features": 64, "out_features": 40, "num_experts": 4, "top_k": 2}
ROUNDS, STEPS, WARM_UP = 5, 2000, 50


def run(
    path: Path | None = None,
    against: tuple[str, ...] = (),
    quick: bool = False,
    say: Callable[[str], None] = print,
) -> dict:
    """Measure this checkout and the git revisions `against`. Raises ValueError: a revision is not there."""
    import torch

    from benchmarks import no_launches, results
    from benchmarks.environment import ROOT, describe

    found: dict = {"schema": results.SCHEMA, "environment": describe(torch.device("cpu")), "tokens": TOKENS}
    found |= {"sizes": SIZES, "cases": []}
    with tempfile.TemporaryDirectory() as folder:
        trees = {_commit(ROOT, name): _exported(ROOT, name, Path(folder)) for name in against} | {"": ROOT}
        runs = [(name, "triton") for name in trees]
        missing = no_launches.missing()
        if missing is None:
            runs.append(("", "cuda"))
        else:
            say(f"without the CUDA C++ backend: {missing}")
        times: dict[tuple[str, str], list] = {one: [] for one in runs}
        for _ in range(1 if quick else ROUNDS):
            for name, backend in runs:
                times[name, backend].append(_in_a_child(trees[name], backend, 20 if quick else STEPS))
    for (name, backend), rounds in times.items():
        case = {"revision": name, "backend": backend}
        for what in ("forward", "both"):
            case[f"{what}_us"] = round(min(r[what][0] for r in rounds), 1)
            case[f"{what}_median_us"] = round(statistics.median(r[what][1] for r in rounds), 1)
        found["cases"].append(case)
        where = f"{backend}, {name or 'this checkout'}"
        say(f"{where}: forward {case['forward_us']} µs, forward + backward {case['both_us']} µs")
    results.save(found, path or results.FOLDER / "host_time" / f"{results.slug('cpu', found['environment'])}.json")
    return found


def _commit(repository: Path, revision: str) -> str:
    command = ["git", "-C", str(repository), "rev-parse", "--short=10", "--verify", f"{revision}^{{commit}}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{revision}: {done.stderr.strip()}")
    return done.stdout.strip()


def _exported(repository: Path, revision: str, folder: Path) -> Path:
    done = subprocess.run(["git", "-C", str(repository), "archive", revision], capture_output=True, check=True)
    tree = folder / revision.replace("/", "-")
    with tarfile.open(fileobj=BytesIO(done.stdout)) as archive:
        archive.extractall(tree, filter="data")
    return tree


def _in_a_child(tree: Path, backend: str, steps: int) -> dict[str, tuple[float, float]]:
    code = f"import runpy; runpy.run_path({str(Path(__file__).resolve())!r}, run_name='__main__')"
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, backend, str(steps)]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def child(backend: str, steps: int) -> dict[str, tuple[float, float]]:
    """(least, median) µs of a forward pass that is recorded for backward, and of a step."""
    import torch

    from llama_smop.projector import SMoPProjector

    dtype = torch.bfloat16 if backend == "cuda" else torch.float32
    projector = SMoPProjector(**SIZES, sharing="DEDR", backend=backend).to(dtype)
    parameters = list(projector.parameters())
    tokens = torch.randn(TOKENS, SIZES["in_features"], dtype=dtype), torch.zeros(TOKENS, dtype=torch.int32)

    def forward() -> tuple:
        out = projector(*tokens)
        return out.hidden_states, out.load_balancing_loss, out.router_z_loss

    gradients: list[torch.Tensor] = []

    def both() -> None:
        for parameter in parameters:
            parameter.grad = None
        torch.autograd.backward(forward(), gradients)

    with _nothing_launched(backend):
        gradients += [torch.ones_like(result) for result in forward()]
        return {"forward": _times(forward, steps), "both": _times(both, steps)}


def _times(function: Callable, steps: int) -> tuple[float, float]:
    for _ in range(WARM_UP):
        function()
    found = []
    for _ in range(steps):
        begin = time.perf_counter()
        function()
        found.append(1e6 * (time.perf_counter() - begin))
    return min(found), statistics.median(found)


class _CpuAsGpu:
    """What Triton asks its driver for, of a device whose tensors are on the CPU."""

    utils = SimpleNamespace(unload_module=lambda module: None)

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self):
        import torch

        return torch.device("cpu")


class _Nothing:
    """A compiled kernel whose launch does nothing."""

    def __getitem__(self, grid):
        return self.run

    def run(self, *args, stream):
        pass


@contextmanager
def _nothing_launched(backend: str) -> Iterator[None]:
    from llama_smop.ops import checks

    no_values = mock.patch.object(checks, "in_range", lambda *args: None)  # a GPU's are not read
    with no_values, _nothing_by_triton() if backend == "triton" else _nothing_by_cuda():
        yield


@contextmanager
def _nothing_by_triton() -> Iterator[None]:
    from triton.runtime.driver import driver

    from llama_smop.triton_kernels.launch import Launch

    before = driver._active
    driver.set_active(_CpuAsGpu())
    try:
        with mock.patch.object(Launch, "_run_by_name", lambda launch: _Nothing()):
            yield
    finally:
        driver._active = before


@contextmanager
def _nothing_by_cuda() -> Iterator[None]:
    from benchmarks import no_launches
    from llama_smop.ops.backends import cuda, cuda_extension

    module = no_launches.extension()
    cpu_as_gpu = mock.patch.object(cuda_extension, "unsupported_device", lambda device: None)
    built = [mock.patch.object(place, "extension", lambda: module) for place in (cuda, cuda_extension)]
    with cpu_as_gpu, built[0], built[1]:
        yield


if __name__ == "__main__":
    print(json.dumps(child(sys.argv[1], int(sys.argv[2]))))
