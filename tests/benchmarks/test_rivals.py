"""Everything that is timed computes the same function; what does not is refused before it is timed."""

import pytest
import torch

from benchmarks import rivals
from benchmarks.compare import Contest
from benchmarks.floors import Ceilings
from benchmarks.rivals import eager, ours
from benchmarks.rivals.base import Mismatch
from benchmarks.rivals.eager_projector import EagerProjector
from benchmarks.workloads import Workload, make
from llama_smop.projector import SMoPProjector
from tests.rounding import assert_same_sums

CPU = torch.device("cpu")


@pytest.mark.parametrize("sharing", ["JEJR", "JEDR", "DEDR"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rivals_agree_on_output_and_every_gradient(sharing, dtype):
    agree(Workload(23, dtype, 32, 48, 40, sharing=sharing), at_least={"ours_torch", "eager", "grouped_mm", "dense_all"})


@pytest.mark.parametrize("expert", ["mlp", "swiglu"])
def test_transformers_experts_agree_where_they_can_compute_the_layer(expert):
    names = {"ours_torch", *(f"transformers_{n}" for n in ("eager", "grouped_mm", "batched_mm", "smop"))}
    agree(Workload(23, "float32", 32, 48, 32, expert=expert), at_least=names)


def agree(w: Workload, at_least: set[str]) -> None:
    problem = make(w, CPU)
    known = eager.reference(problem)
    checked = set()
    for rival in rivals.ALL:
        if rival.exact and rival.why_not(w, CPU) is None:
            rivals.check(rival.build(problem), problem, known)
            checked.add(rival.name)
    assert checked >= at_least


@pytest.mark.parametrize("fault", ["b1", "ln_weight", "gate_weight"])
def test_a_wrong_implementation_is_refused(fault):
    problem = make(Workload(40, "bfloat16", 32, 48, 40), CPU)
    layer = rivals.BY_NAME["ours_torch"].build(problem)
    with torch.no_grad():
        wrong = getattr(layer, fault)
        wrong.copy_(wrong.flip(-2) if fault == "gate_weight" else torch.zeros_like(wrong))
    with pytest.raises(Mismatch, match=r"is off by .* against float64"):
        rivals.check(layer, problem, eager.reference(problem))


def test_a_rival_that_is_not_installed_says_so():
    reason = rivals.BY_NAME["scattermoe"].why_not(Workload(64), CPU)
    assert "scattermoe" in reason and ("not installed" in reason or "CUDA" in reason)


def test_a_contest_times_what_is_right_and_says_why_the_rest_is_left_out(monkeypatch):
    broken = rivals.Rival("ours_torch", "ours", "ours", lambda p: ours.Ours(p, "no such backend"))
    monkeypatch.setitem(rivals.BY_NAME, "ours_torch", broken)
    contest = Contest(Workload(16, "float32", 16, 24, 16), CPU, ["ours_torch", "eager", "grouped_mm", "dense_KH"],
                      excluded={"grouped_mm": "brought the device down"})  # fmt: skip
    contest.time("both", Ceilings(1e10, {"float32": 1e10}), budget_s=0.01, min_rounds=3)
    contest.measure_memory()
    assert {t["rival"] for t in contest.result.timings} == {"eager", "dense_KH"}
    reasons = {s["rival"]: s["reason"] for s in contest.result.skipped}
    assert reasons["grouped_mm"] == "brought the device down" and "no such backend" in reasons["ours_torch"]
    for t in contest.result.timings:
        assert t["median_us"] > 0 and t["q1_us"] <= t["median_us"] <= t["q3_us"] and t["share_of_floor"] > 0
    kept = {m["rival"]: m["kept_bytes"] for m in contest.result.memory}
    assert kept["dense_KH"] == 4 * 16 * (16 + 48), "a dense layer keeps h and y"


@pytest.mark.parametrize("sharing", ["JEJR", "JEDR", "DEDR"])
def test_the_eager_projector_is_a_drop_in(sharing):
    torch.manual_seed(0)
    mine = SMoPProjector(16, 24, 20, sharing=sharing)
    theirs = EagerProjector(mine)
    x, modality = torch.randn(2, 9, 16), torch.randint(0, 2, (2, 9))
    mask = torch.rand(2, 9) > 0.3
    for name, a, b in zip(
        mine(x, modality, mask)._fields, mine(x, modality, mask), theirs(x, modality, mask), strict=True
    ):
        assert_same_sums(b.to(a.dtype), a, 80, name)  # 16 + 24 + 20, and 18 tokens
