"""Ties, noise, and fairness of the interleaving, on a clock that is made up."""

import pytest
import torch

from benchmarks import measure
from benchmarks.measure import Timing, noise, tie


def test_timing_of_samples():
    t = Timing.of([4.0, 1.0, 3.0, 2.0, 100.0])
    assert (t.median_us, t.q1_us, t.q3_us, t.runs) == (3.0, 2.0, 4.0, 5)


def test_the_noise_is_how_far_the_same_thing_was_apart():
    steady = {"q1_us": 100.0, "q3_us": 100.0, "runs": 30}
    assert noise(Timing(100.0, **steady), Timing(104.0, **steady)) == pytest.approx(0.04)
    # Two medians that happen to agree do not make a scattered measurement exact.
    scattered = Timing(100.0, 80.0, 120.0, 16)
    assert noise(scattered, scattered) == pytest.approx(1.57 * 40 / 4 / 100)


def test_ties():
    assert tie(100.0, 103.9, 0.04) and tie(103.9, 100.0, 0.04)
    assert not tie(100.0, 104.1, 0.04)


def test_interleaving_spreads_a_disturbance_over_everybody():
    calls = []

    def sample(run):
        run()
        return 10.0 + (5.0 if len(calls) > 43 else 0.0)  # slower from the eleventh round on

    runs = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    timings, _ = measure.interleaved(runs, sample, budget_s=60, max_rounds=20)
    assert len({t.median_us for t in timings.values()}) == 1
    assert all(t.runs == 20 for t in timings.values())
    rounds = [calls[i : i + 4] for i in range(3, len(calls), 4)]
    assert all(sorted(r) == ["a", "a", "b", "c"] for r in rounds), "each once a round, the first twice"
    assert len({tuple(r) for r in rounds}) > 3, "in changing order"


def test_the_rounds_are_at_least_the_minimum_whatever_the_budget():
    timings, _ = measure.interleaved({"a": lambda: None}, lambda run: 1.0, budget_s=0, min_rounds=7)
    assert timings["a"].runs == 7


def test_short_calls_are_repeated_within_a_sample():
    count = 0

    def run():
        nonlocal count
        count += 1

    measure.CpuClock()(run)
    assert count > 100


def test_on_a_cpu_device_figures_are_unknown_not_zero():
    cpu = torch.device("cpu")
    assert measure.peak_bytes(lambda: None, cpu) is None
    assert measure.launches(lambda: None, cpu) is None
    assert measure.host_syncs(lambda: None, cpu) is None
