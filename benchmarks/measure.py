"""Timing, memory, launches and host synchronisations of one callable, on a CPU or a CUDA device.

Several callables are timed interleaved, round by round in a shuffled order, so that other load on the machine affects
all of them alike. One of them is timed twice; the difference of its two medians is the noise. Callables that differ by
less are a tie.
"""

import random
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from benchmarks.rivals.base import Layer, roots_and_grads
from benchmarks.workloads import Problem
from llama_smop.reports.saved_tensors import SavedStorages

MIN_SAMPLE_S = 2e-3  # CPU calls shorter than this are repeated within a sample
L2_FLUSH_BYTES = 256 << 20  # more than any L2 today


@dataclass(frozen=True)
class Timing:
    """Microseconds: median and quartiles of `runs` samples."""

    median_us: float
    q1_us: float
    q3_us: float
    runs: int

    @classmethod
    def of(cls, samples_us: list[float]) -> "Timing":
        if len(samples_us) < 2:
            return cls(samples_us[0], samples_us[0], samples_us[0], 1)
        q1, median, q3 = statistics.quantiles(samples_us, n=4, method="inclusive")
        return cls(median, q1, q3, len(samples_us))

    @property
    def median_error(self) -> float:
        """Relative 95 % half-width of the median, 1.57·IQR/√n (McGill, Tukey & Larsen 1978)."""
        return 1.57 * (self.q3_us - self.q1_us) / self.runs**0.5 / self.median_us

    def json(self) -> dict:
        return {k: v if isinstance(v, int) else round(v, 3) for k, v in asdict(self).items()}


def noise(first: Timing, again: Timing) -> float:
    """Relative difference that is not significant: of the same callable timed twice, or its medians' uncertainty."""
    apart = abs(first.median_us - again.median_us) / min(first.median_us, again.median_us)
    return max(apart, first.median_error, again.median_error)


def tie(a_us: float, b_us: float, noise_level: float) -> bool:
    return abs(a_us - b_us) <= noise_level * min(a_us, b_us)


# ---------------------------------------------------------------------------------------------------------- passes


class Passes:
    """A layer's passes over a problem, as the callables without arguments that are timed."""

    def __init__(self, layer: Layer, problem: Problem):
        self.layer, self.problem = layer, problem
        self.parameters = list(layer.parameters())

    def __getitem__(self, name: str) -> Callable[[], object]:
        return {"forward": self.forward, "both": self.both, "backward": self._backward}[name]()

    def forward(self) -> Callable[[], object]:
        def run():
            with torch.no_grad():
                return self.layer(self.problem.x, False)

        return run

    def both(self) -> Callable[[], object]:
        """A training pass: y and the auxiliary losses, then every parameter's gradient; none for x."""
        return lambda: self._gradients(self.layer(self.problem.x, True), retain=False)

    def _backward(self) -> Callable[[], object]:
        outputs = self.layer(self.problem.x, True)
        return lambda: self._gradients(outputs, retain=True)

    def _gradients(self, outputs: tuple[Tensor, Tensor | None], retain: bool) -> tuple:
        roots, grads = roots_and_grads(*outputs, self.problem.dy)
        return torch.autograd.grad(roots, self.parameters, grads, retain_graph=retain, allow_unused=True)


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """`run` as the replay of a CUDA graph. Raises RuntimeError when it cannot be captured (a host synchronisation)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = run()  # keeps the graph's outputs alive as long as its replay

    def replay():
        graph.replay()
        return held

    return replay


# ---------------------------------------------------------------------------------------------------------- clocks


class CpuClock:
    """Wall time; a sample repeats short calls, so that the clock's resolution does not matter."""

    def __init__(self):
        self._repeats: dict[int, int] = {}

    def __call__(self, run: Callable[[], object]) -> float:
        repeats = self._repeats.get(id(run))
        if repeats is None:
            begin = time.perf_counter()
            run()
            repeats = max(1, min(1000, int(MIN_SAMPLE_S / max(time.perf_counter() - begin, 1e-7))))
            self._repeats[id(run)] = repeats
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        return 1e6 * (time.perf_counter() - begin) / repeats


class CudaClock:
    """Device time between two events, starting from an idle device, so that launch overhead counts.

    cold: before each sample the L2 is filled with other data by reading it; writing would leave dirty lines that are
    written back during the sample. Otherwise the L2 is as the call before left it.
    """

    def __init__(self, cold: bool):
        self.cold = cold
        self._other = torch.ones(L2_FLUSH_BYTES // 4, device="cuda")
        self._sink = torch.empty((), device="cuda")

    def __call__(self, run: Callable[[], object]) -> float:
        if self.cold:
            torch.sum(self._other, dim=0, out=self._sink)
        else:
            run()
        torch.cuda.synchronize()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return 1e3 * start.elapsed_time(stop)


def clock(device: torch.device, cold: bool = True) -> Callable[[Callable[[], object]], float]:
    return CudaClock(cold) if device.type == "cuda" else CpuClock()


def interleaved(
    runs: dict[str, Callable[[], object]],
    sample: Callable[[Callable[[], object]], float],
    budget_s: float,
    min_rounds: int = 5,
    max_rounds: int = 40,
    seed: int = 0,
) -> tuple[dict[str, Timing], float]:
    """Time each of `runs`, and the first of them twice, within about `budget_s`.

    There are at least `min_rounds`, or three if those would take four times the budget on a busy machine.

    Returns the timings by name and the noise.
    """
    shuffler = random.Random(seed)
    for run in runs.values():  # warm-up, not counted
        sample(run)
    again = next(iter(runs))
    entries = [*runs.items(), (None, runs[again])]
    samples: dict[str | None, list[float]] = {name: [] for name, _ in entries}
    began = time.perf_counter()
    for done in range(max_rounds):
        spent = time.perf_counter() - began
        if (done >= min_rounds and spent > budget_s) or (done >= 3 and spent > 4 * budget_s > 0):
            break
        shuffler.shuffle(entries)
        for name, run in entries:
            samples[name].append(sample(run))
    timings = {name: Timing.of(s) for name, s in samples.items()}
    second = timings.pop(None)
    return timings, noise(timings[again], second)


# -------------------------------------------------------------------------------------------------- memory and more


def kept_bytes(layer: Layer, problem: Problem) -> int:
    """Bytes alive between forward and backward: tensors saved for backward and y, without parameters and x."""
    saved = SavedStorages((problem.x, *layer.parameters(), *layer.buffers()))
    with saved:
        y, loss = layer(problem.x, True)
    saved.add(y)
    total = saved.bytes
    del y, loss
    return total


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Device memory `run` needs beyond what was allocated before it; None on a CPU."""
    if device.type != "cuda":
        return None
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def launches(run: Callable[[], object], device: torch.device) -> int | None:
    """Kernels, copies and fills `run` puts on the device; None on a CPU, or if the profiler reports nothing."""
    if device.type != "cuda":
        return None
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events()) or None


def host_syncs(run: Callable[[], object], device: torch.device) -> int | None:
    """Times `run` makes the host wait for the device; None on a CPU."""
    if device.type != "cuda":
        return None
    run()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("synchroniz" in str(w.message) for w in caught)
