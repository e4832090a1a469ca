"""Builds all rivals of one workload, checks them against float64 and times them interleaved, for `cpu` and `gpu`."""

import gc
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field

import torch

from benchmarks import measure, rivals
from benchmarks.floors import Ceilings
from benchmarks.rivals import Layer, Mismatch, Reference, Rival
from benchmarks.rivals.eager import reference
from benchmarks.workloads import Problem, Workload, make


@dataclass
class Comparison:
    """The results of one workload; every list holds plain JSON objects."""

    timings: list[dict] = field(default_factory=list)
    memory: list[dict] = field(default_factory=list)
    skipped: list[dict] = field(default_factory=list)

    def json(self) -> dict:
        return {k: v for k, v in asdict(self).items() if v}


class Contest:
    """The rivals of one workload that run on this device and pass the check, built on one problem.

    Args:
        names: which rivals; all by default. modes: of those each rival has.
        excluded: rivals ("ours_triton") or modes of them ("ours_triton graph") to skip, each with its reason.
        check: whether to compare exact rivals with float64 first.
        starting: called with a rival's name before it runs for the first time.
    """

    def __init__(
        self,
        workload: Workload,
        device: torch.device,
        names: Iterable[str] | None = None,
        modes: Iterable[str] = ("eager", "graph"),
        excluded: dict[str, str] | None = None,
        starting: Callable[[str], None] = lambda name: None,
        check: bool = True,
    ):
        self.workload, self.device, self.starting = workload, device, starting
        self.problem: Problem = make(workload, device)
        self.layers: dict[tuple[str, str], Layer] = {}
        self.checked: dict[str, float] = {}
        self.result = Comparison()
        known: Reference | None = None
        excluded = excluded or {}
        for name in rivals.BY_NAME if names is None else names:
            rival = rivals.BY_NAME[name]
            reason = excluded.get(name) or rival.why_not(workload, device)
            if reason:
                self.skip(rival, None, reason)
                continue
            if check and rival.exact and known is None:
                starting("reference")
                known = reference(self.problem)
            for mode in rival.modes:
                if mode not in modes or (mode == "graph" and device.type != "cuda"):
                    continue
                if f"{name} {mode}" in excluded:
                    self.skip(rival, mode, excluded[f"{name} {mode}"])
                else:
                    self._add(rival, mode, known)

    def _add(self, rival: Rival, mode: str, known: Reference | None) -> None:
        self.starting(f"{rival.name} {mode}")
        try:
            layer = rival.build(self.problem)
            if mode == "compiled":
                torch._dynamo.reset()  # workloads share one forward, whose recompilations are limited
                layer.forward = torch.compile(layer.forward, dynamic=False)
            if rival.exact and known is not None:
                self.checked[rival.name] = max(
                    self.checked.get(rival.name, 0.0), rivals.check(layer, self.problem, known)
                )
            else:
                layer(self.problem.x, True)
        except Exception as error:
            self.skip(rival, mode, describe(error))
            raise_if_device_is_lost(self.device, error)
        else:
            self.layers[rival.name, mode] = layer

    def skip(self, rival: Rival, mode: str | None, reason: str) -> None:
        entry = {"workload": self.workload.key, "rival": rival.name, "reason": reason}
        self.result.skipped.append(entry if mode is None else {**entry, "mode": mode})

    def time(self, which: str, ceilings: Ceilings, budget_s: float, cold: bool = True, min_rounds: int = 5) -> None:
        """Time pass `which` of every layer."""
        runs = {}
        for (name, mode), layer in self.layers.items():
            self.starting(f"{name} {mode} {which}")
            try:
                if mode == "graph" and which == "backward":
                    continue  # the pass "both" captures forward and backward together
                run = measure.Passes(layer, self.problem)[which]
                runs[name, mode] = measure.captured(run) if mode == "graph" else run
            except Exception as error:
                self.skip(rivals.BY_NAME[name], mode, f"{which}: {describe(error)}")
                raise_if_device_is_lost(self.device, error)
        if not runs:
            return
        clock, named = measure.clock(self.device, cold), {run: " ".join(key) for key, run in runs.items()}

        def sample(run: Callable[[], object]) -> float:
            self.starting(f"{named[run]} {which}")
            return clock(run)

        timings, noise = measure.interleaved(runs, sample, budget_s, min_rounds=min_rounds, max_rounds=40)
        for (name, mode), timing in timings.items():
            self.result.timings.append(self._record(name, mode, which, timing, noise, ceilings, cold))

    def _record(self, name, mode, which, timing: measure.Timing, noise: float, ceilings: Ceilings, cold: bool) -> dict:
        w, work = self.workload, rivals.BY_NAME[name].work(self.workload, which)
        seconds, floor = timing.median_us / 1e6, ceilings.floor_us(work, w.dtype)
        record = {"workload": w.key, "rival": name, "mode": mode, "pass": which}
        if self.device.type == "cuda":
            record["cache"] = "cold" if cold else "hot"
        record |= {
            **timing.json(),
            "noise": round(max(noise, timing.median_error), 4),
            "tokens_per_s": round(w.tokens / seconds),
            "tflops": round(work.flops / seconds / 1e12, 4),
            "floor_us": floor and round(floor, 3),
            "share_of_floor": floor and round(floor / timing.median_us, 4),
        }
        if name in self.checked:
            record["error"] = float(f"{self.checked[name]:.2e}")
        return record

    def measure_memory(self) -> None:
        """Bytes kept for backward, peak, launches and host synchronisations of the eager layers."""
        for (name, mode), layer in self.layers.items():
            if mode != "eager":
                continue
            self.starting(f"{name} memory")
            passes = measure.Passes(layer, self.problem)
            record = {"workload": self.workload.key, "rival": name}
            try:
                record["kept_bytes"] = measure.kept_bytes(layer, self.problem)
                self.result.memory.append(record)
                record["peak_bytes"] = measure.peak_bytes(passes.both(), self.device)
                record["host_syncs"] = measure.host_syncs(passes.both(), self.device)
                record["launches_forward"] = measure.launches(passes.forward(), self.device)
                record["launches_both"] = measure.launches(passes.both(), self.device)
            except Exception as error:
                self.skip(rivals.BY_NAME[name], mode, f"memory: {describe(error)}")
                raise_if_device_is_lost(self.device, error)

    def close(self) -> None:
        """Free all tensors."""
        self.layers.clear()
        del self.problem
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def describe(error: Exception) -> str:
    """One line; a mismatch without its type."""
    line = (str(error).strip().splitlines() or [""])[0][:200]
    return line if isinstance(error, Mismatch) else f"{type(error).__name__}: {line}"


class DeviceLost(RuntimeError):
    """The CUDA context no longer works, for example after an illegal access. Only a new process can use the device."""


def raise_if_device_is_lost(device: torch.device, cause: Exception) -> None:
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize()
        torch.ones(8, device=device).sum().item()
    except Exception as error:
        raise DeviceLost(describe(cause)) from error
