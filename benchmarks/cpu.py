"""`python -m benchmarks cpu`: the CPU product against its peers, in under five minutes on two cores."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks import environment, results, rivals, say
from benchmarks.compare import Contest
from benchmarks.floors import measure_ceilings
from benchmarks.workloads import PASSES, TRAINING_TOKENS, UTTERANCE_TOKENS, Workload

DTYPES = ("float32", "bfloat16")
LIMIT_S = 290  # a case that would end later on a busy machine is left out
MODEL_S = 20
COMPILE_S = 120
NOT_COMPILED = {
    f"{r.name} compiled": "torch.compile takes half a minute per rival here, so only the eager loop is compiled"
    for r in rivals.ALL
    if "compiled" in r.modes and r.name != "eager"
}


@dataclass(frozen=True)
class Case:
    workload: Workload
    budget_s: float  # for all its passes
    passes: tuple[str, ...] = ("forward", "both")
    modes: tuple[str, ...] = ("eager",)
    memory: bool = False


def cases() -> list[Case]:
    """Most important first."""
    listed = []
    for dtype, scale in zip(DTYPES, (1.0, 0.7), strict=True):
        budgets = {64: 7, UTTERANCE_TOKENS: 9, 512: 14, TRAINING_TOKENS: 26}
        for T, budget in budgets.items():
            passes = PASSES if T == UTTERANCE_TOKENS else ("forward", "both")
            listed.append(Case(Workload(T, dtype), budget * scale, passes, memory=True))
    base = Workload(UTTERANCE_TOKENS, "float32")
    listed += [
        Case(replace(base, sharing="DEDR"), 6),
        Case(replace(base, routing="zipf"), 6),
        Case(replace(base, routing="one"), 6),
        Case(replace(base, num_experts=8), 7),
        Case(replace(base, out_features=1024, expert="mlp"), 7),
        Case(replace(base, out_features=1024, expert="swiglu"), 7),
    ]
    return listed


def with_compiled(listed: list[Case]) -> list[Case]:
    """The cases, with torch.compile of the eager loop for the utterance in float32."""
    utterance = Workload(UTTERANCE_TOKENS, "float32").key
    return [replace(c, modes=("eager", "compiled")) if c.workload.key == utterance else c for c in listed]


def quick_cases() -> list[Case]:
    """Every kind of case once at small sizes: a smoke test without meaningful numbers."""
    base = Workload(48, "float32", in_features=64, hidden_features=128, out_features=96)
    return [
        Case(base, 0.2, PASSES, memory=True),
        Case(replace(base, sharing="DEDR", dtype="bfloat16"), 0.1),
        Case(replace(base, out_features=64, expert="swiglu"), 0.1),
    ]


def run(
    path: Path | None = None,
    quick: bool = False,
    model: bool = True,
    compiled: bool = False,
    say: Callable[[str], None] = say,
) -> dict:
    """Measure and save after every case; `path` defaults to the device's file under benchmarks/results/.

    compiled: the eager loop under torch.compile too, COMPILE_S beyond the usual limit.
    """
    began = time.perf_counter()
    device = torch.device("cpu")
    found = results.new("cpu")
    found["environment"] = environment.describe(device)
    if path is None:
        path = results.FOLDER / f"{results.slug('cpu', found['environment'])}.json"
    ceilings = measure_ceilings(device, DTYPES, quick)
    found["ceilings"] = {
        "copy_gb_per_s": round(ceilings.bytes_per_s / 1e9, 2),
        "tflops": {d: round(f / 1e12, 4) for d, f in ceilings.flops.items()},
    }
    where, limits = found["environment"], found["ceilings"]
    rates = f"copy {limits['copy_gb_per_s']} GB/s, matrix product {limits['tflops']} TFLOP/s"
    say(f"{where['device']}: {rates}, load {where['load_average']}")
    todo = quick_cases() if quick else cases()
    limit = LIMIT_S
    if compiled:
        todo, limit = with_compiled(todo), LIMIT_S + COMPILE_S
    left_out = []
    for case in todo:
        if time.perf_counter() - began + 1.5 * case.budget_s + MODEL_S > limit:
            left_out.append(case.workload.key)
            continue
        contest = Contest(case.workload, device, modes=case.modes, excluded=NOT_COMPILED)
        for which in case.passes:
            contest.time(which, ceilings, case.budget_s / len(case.passes), min_rounds=3 if quick else 5)
        if case.memory:
            contest.measure_memory()
        results.add(found, contest.result.json(), case.workload)
        contest.close()
        results.save(found, path)
        say(f"{time.perf_counter() - began:5.0f} s  {case.workload.key}")
    if model:
        from benchmarks import model_level

        results.add(found, {"model": model_level.tiny(device, quick)})
    status = f"left out for lack of time: {', '.join(left_out)}" if left_out else "done"
    found["stages"]["cpu"] = {"status": status, "seconds": round(time.perf_counter() - began, 1)}
    found["environment"]["load_average_after"] = environment.describe(device)["load_average"]
    results.save(found, path)
    say(f"{time.perf_counter() - began:5.0f} s  saved {path}")
    return found
