"""The stages of `python -m benchmarks gpu`, most important first. A stage is a list of cases; a case returns records.

The first four minutes decide most: whether the model of the GPU by which tiles are chosen is right, whether the kernels
are, and how they stand beside their peers. The CUDA extension is compiled meanwhile (`build.py`).

A dry run executes the same stages with tiny shapes on a CPU; its numbers mean nothing.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks import build, environment, kernels, predictions, rivals, techniques, workloads
from benchmarks.compare import Contest, describe, raise_if_device_is_lost
from benchmarks.floors import Ceilings, measure_ceilings
from benchmarks.rivals import eager
from benchmarks.workloads import Workload
from llama_smop.ops import dispatch

BACKENDS = ("torch", "triton", "cuda")
BOTH = ("forward", "both")
CONTENDERS = ("ours_triton", "ours_cuda", "dense_KH", "eager", "grouped_mm")
PEERS = ("ours_triton", *(name for name in rivals.BY_NAME if name not in CONTENDERS))  # ours again, to compare with
GPU_TESTS = ("tests/kernels", "tests/cuda")


@dataclass
class Context:
    """What a case gets: the device, the results so far, the folder for its files, its time budget."""

    device: torch.device
    dry: bool
    results: dict
    out: Path
    budget_s: float
    excluded: dict[str, str]  # rival, or rival and mode → why this case must not run it
    starting: Callable[..., None]  # call it with what runs next, to attribute a crash, and how long that may be silent

    @property
    def ceilings(self) -> Ceilings:
        found = self.results["ceilings"]
        if not found:
            return Ceilings(float("nan"), {})
        return Ceilings(found["copy_gb_per_s"] * 1e9, {d: f * 1e12 for d, f in found["tflops"].items()})


@dataclass(frozen=True)
class Case:
    key: str
    run: Callable[[Context], dict]
    workload: Workload | None = None


@dataclass(frozen=True)
class Stage:
    """At most a share of the budget, and not more seconds where they are given; later stages get what is left."""

    name: str
    share: float
    cases: Callable[[bool], list[Case]]
    seconds: float = float("inf")

    def limit(self, budget_s: float, dry: bool) -> float:
        """Seconds. A dry run walks all of it, however slow what stands in for a GPU is."""
        return self.share * budget_s if dry else min(self.share * budget_s, self.seconds)


def stages() -> list[Stage]:
    return [
        Stage("environment", 0.05, _environment, 15),
        Stage("predictions", 0.1, lambda dry: _predictions("triton"), 25),
        Stage("correctness", 0.1, lambda dry: _correctness(FIRST, ("torch", "triton"), dry), 30),
        Stage("build", 0.1, _build, 60),
        Stage("cuda", 0.1, lambda dry: _correctness(FIRST, ("cuda",), dry) + _predictions("cuda"), 20),
        Stage("headline", 0.3, lambda dry: _timed(_sizes(workloads.headline(), dry), BOTH, names=CONTENDERS), 150),
        Stage("techniques", 0.1, lambda dry: _techniques("triton") + _techniques("cuda"), 30),
        Stage("tune", 0.25, _tune, 120),
        Stage("more correctness", 0.2, lambda dry: _correctness(MORE, BACKENDS, dry)),
        Stage("memory", 0.1, _memory),
        Stage("peers", 0.2, lambda dry: _timed(_sizes(workloads.headline(), dry), BOTH, key="peers", names=PEERS)),
        Stage("tests", 0.2, _tests),
        Stage("model", 0.2, _model),
        Stage("libraries", 0.2, lambda dry: _timed(_sizes(workloads.library_shapes(), dry), BOTH)),
        Stage("real", 0.15, lambda dry: _timed(_sizes(workloads.real_counts(), dry), BOTH)),
        Stage("backward", 0.2, lambda dry: _timed(_sizes(workloads.headline(), dry), ("backward",), key="backward")),
        Stage("variations", 0.5, lambda dry: _timed(_sizes(workloads.variations(), dry), BOTH)),
        Stage("hot", 0.2, lambda dry: _timed(_sizes(workloads.headline(), dry), ("forward",), key="hot", cold=False)),
        Stage("kernels", 0.2, _kernels),
        Stage("compiled", 0.5, lambda dry: [] if dry else _compiled()),
    ]


def _sizes(declared: list[Workload], dry: bool) -> list[Workload]:
    """All, or in a dry run the first three at tiny sizes."""
    return list(dict.fromkeys(workloads.tiny(w) for w in declared[:3])) if dry else declared


# ----------------------------------------------------------------------------------------------- environment, build


def _environment(dry: bool) -> list[Case]:
    def run(c: Context) -> dict:
        dtypes = ("float32",) if dry else ("bfloat16", "float16", "float32")
        ceilings = measure_ceilings(c.device, dtypes, quick=dry)
        return {
            "environment": environment.describe(c.device),
            "ceilings": {
                "copy_gb_per_s": round(ceilings.bytes_per_s / 1e9, 2),
                "tflops": {d: round(f / 1e12, 4) for d, f in ceilings.flops.items()},
            },
        }

    return [Case("device and ceilings", run)]


def _build(dry: bool) -> list[Case]:
    """Wait for the compilation, which began with the run."""

    def run(c: Context) -> dict:
        if c.dry:
            return {"note": "a dry run builds nothing"}
        c.starting("nvcc", patience_s=c.budget_s)
        return {"note": build.wait(c.out, c.budget_s)}

    return [Case("CUDA extension", run)]


def _predictions(backend: str) -> list[Case]:
    """Does the model by which tiles are chosen say what the GPU does? Single launches, predicted beside measured."""

    def run(c: Context) -> dict:
        return {"predictions": predictions.measured(c.device, backend, 0.05 if c.dry else 1.5, c.dry)}

    return [_of_backend(f"{backend} launches", backend, run)]


def _techniques(backend: str) -> list[Case]:
    """Is what the kernels do on argument alone quicker than what it replaced?"""

    def run(c: Context) -> dict:
        return {"techniques": techniques.measured(c.device, backend, 0.05 if c.dry else 1.0, c.dry)}

    return [_of_backend(f"{backend} techniques", backend, run)]


def _of_backend(key: str, backend: str, run: Callable[[Context], dict]) -> Case:
    """A case that needs a GPU on which the backend serves."""

    def run_there(c: Context) -> dict:
        reason = "needs a GPU" if c.device.type != "cuda" else c.excluded.get(f"ours_{backend}")
        reason = reason or dispatch.unsupported(backend, torch.bfloat16, c.device, 2, 8)
        if reason is not None:
            return {"note": reason}
        c.starting(f"ours_{backend}")
        return run(c)

    return Case(key, run_there)


# ------------------------------------------------------------------------------------------------------ correctness


# Real sizes; every sharing, routing, dtype, and ragged token counts.
BASE = Workload(1024)
FIRST = (BASE, Workload(4096), replace(BASE, tokens=77, sharing="DEDR"))
MORE = (
    replace(BASE, tokens=1),
    replace(BASE, tokens=1500, sharing="DEDR", out_features=3072),
    replace(BASE, sharing="JEDR", routing="zipf"),
    replace(BASE, routing="one"),
    replace(BASE, dtype="float16"),
    replace(BASE, dtype="float32"),
    replace(BASE, num_experts=16, top_k=4, out_features=4096),
    replace(BASE, num_experts=8, top_k=1),
    Workload(16384),
)


def _correctness(declared: Iterable[Workload], backends: Iterable[str], dry: bool) -> list[Case]:
    """A case for each backend, so that a backend that loses the device fails only its own cases."""
    return [
        Case(f"{backend}: {w.key}", lambda c, w=w, backend=backend: check_backend(w, backend, c), w)
        for w in _sizes(list(declared), dry)
        for backend in backends
    ]


def check_backend(w: Workload, backend: str, c: Context) -> dict:
    """Errors of y and every gradient, x's too, against float64; whether they stay within twice PyTorch's own + 1e-5."""
    rival = rivals.BY_NAME[f"ours_{backend}"]
    reason = c.excluded.get(rival.name) or rival.why_not(w, c.device)
    if reason:
        return {"skipped": [{"workload": w.key, "rival": rival.name, "reason": reason}]}
    c.starting("reference")
    problem = workloads.make(w, c.device, seed=1)
    known = eager.reference(problem, with_dx=True)
    plain = rivals.errors(eager.EagerLoop(problem), problem, known)
    c.starting(rival.name)
    record = {"workload": w.key, "backend": backend}
    try:
        found = rivals.errors(rival.build(problem), problem, known)
    except Exception as error:
        raise_if_device_is_lost(c.device, error)
        return {"correctness": [{**record, "within": False, "failure": describe(error)}]}
    within = all(e <= 2 * plain[n] + 1e-5 for n, e in found.items())
    short = {n: [float(f"{e:.2e}"), float(f"{plain[n]:.2e}")] for n, e in found.items()}
    return {"correctness": [{**record, "within": within, "errors_ours_and_torch": short}]}


# ------------------------------------------------------------------------------------------------- timings, memory


def _timed(
    declared: list[Workload], passes: tuple[str, ...], key: str = "", cold: bool = True, names=None
) -> list[Case]:
    def run(c: Context, w: Workload) -> dict:
        contest = Contest(w, c.device, names, excluded=c.excluded, starting=c.starting)
        for which in passes:
            contest.time(which, c.ceilings, c.budget_s / len(passes) / 2, cold, min_rounds=3 if c.dry else 10)
        contest.close()
        return contest.result.json()

    return [Case(f"{key} {w.key}".strip(), lambda c, w=w: run(c, w), w) for w in declared]


def _compiled() -> list[Case]:
    """The rivals under torch.compile; last, because each compilation takes long."""

    def run(c: Context, w: Workload) -> dict:
        names = [r.name for r in rivals.ALL if "compiled" in r.modes]
        contest = Contest(w, c.device, names, ("compiled",), c.excluded, c.starting)
        for which in ("forward", "both"):
            contest.time(which, c.ceilings, 3.0)
        contest.close()
        return contest.result.json()

    return [Case(f"compiled {w.key}", lambda c, w=w: run(c, w), w) for w in workloads.headline()[2:]]


def _memory(dry: bool) -> list[Case]:
    def run(c: Context, w: Workload) -> dict:
        found: dict[str, list] = {"memory": [], "skipped": []}
        failed = {s["rival"]: s["reason"] for s in c.results["skipped"] if s["workload"] == w.key}
        for name in rivals.BY_NAME:  # one at a time, so that the peak is that of one layer
            contest = Contest(w, c.device, [name], ("eager",), failed | c.excluded, c.starting, check=False)
            contest.measure_memory()
            contest.close()
            found["memory"] += contest.result.memory
            found["skipped"] += [s for s in contest.result.skipped if s["reason"].startswith("memory")]
        return found

    declared = _sizes([w for w in workloads.headline() if w.tokens != 256], dry)
    return [Case(f"memory {w.key}", lambda c, w=w: run(c, w), w) for w in declared]


# ------------------------------------------------------------------------------------------- tuner, tests, the model


def furthest_from_floor(results: dict, backend: str = "triton", count: int = 2) -> list[Workload]:
    """The headline workloads whose training pass on `backend` is furthest from its floor."""
    best: dict[str, float] = {}
    for t in results["timings"]:
        if t["rival"] == f"ours_{backend}" and t["pass"] == "both" and t["share_of_floor"]:
            best[t["workload"]] = max(best.get(t["workload"], 0.0), t["share_of_floor"])
    worst = sorted(best, key=best.get)[:count]
    return [Workload(**results["workloads"][key]) for key in worst]


def _tune(dry: bool) -> list[Case]:
    def run(c: Context) -> dict:
        if importlib.util.find_spec("triton") is None:
            return {"note": "triton is not installed"}
        from benchmarks import tune

        c.starting("tuner", patience_s=c.budget_s)
        return {"note": tune.stage(furthest_from_floor(c.results), c.out / "tuned.json", c.budget_s, c.dry)}

    return [Case("Triton tile configurations", run)]


def _tests(dry: bool) -> list[Case]:
    def run(c: Context) -> dict:
        if c.dry:
            return {"note": "a dry run starts no tests"}
        log = c.out / "pytest.txt"
        command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "--continue-on-collection-errors", *GPU_TESTS]
        if importlib.util.find_spec("xdist") is not None:  # compiling kernels on the CPU takes most of the time
            command += ["-n", str(min(8, os.cpu_count() or 1))]
        c.starting("pytest -m gpu", patience_s=c.budget_s)
        with log.open("w") as stream:
            try:
                done = subprocess.run(
                    command, cwd=environment.ROOT, stdout=stream, stderr=subprocess.STDOUT, timeout=c.budget_s
                )
            except subprocess.TimeoutExpired:
                words = log.read_text(errors="replace").split()
                so_far = f"{words.count('PASSED')} passed, {words.count('FAILED')} failed"
                return {"note": f"stopped after {c.budget_s:.0f} s with {so_far}; see {log.name}"}
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return {"note": f"exit {done.returncode}: {lines[-1][:200] if lines else 'no output'}"}

    return [Case("pytest -m gpu", run)]


def _kernels(dry: bool) -> list[Case]:
    def run(c: Context, w: Workload) -> dict:
        return {"kernels": kernels.measured(w, c.device, 0.05 if c.dry else 2.0)}

    declared = _sizes(kernels.workloads(torch.device("cuda")), dry)
    return [Case(f"operators {w.key}", lambda c, w=w: run(c, w), w) for w in declared]


def _model(dry: bool) -> list[Case]:
    def run(c: Context) -> dict:
        if importlib.util.find_spec("transformers") is None:
            return {"note": "transformers is not installed"}
        from benchmarks import model_level

        measure = model_level.tiny if c.dry else model_level.llama_1b
        return {"model": measure(c.device, quick=c.dry)}

    return [Case("Llama-SMoP step and generation", run)]
