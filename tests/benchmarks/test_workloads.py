"""Workloads route as declared, in every dtype alike: otherwise rivals could not be compared."""

import pytest
import torch

from benchmarks import workloads
from benchmarks.rivals.base import route_blocks
from benchmarks.workloads import Workload, make


def experts_of(w: Workload) -> torch.Tensor:
    p = make(w, "cpu", seed=3)
    _, experts, _ = route_blocks(p.x, p.gate_weight, w, False)
    return experts.sort(-1).values


@pytest.mark.parametrize("sharing", ["JEJR", "JEDR", "DEDR"])
@pytest.mark.parametrize("routing", workloads.ROUTINGS)
def test_no_rounding_changes_the_routing(sharing, routing):
    p = make(Workload(200, "bfloat16", 64, 32, 48, routing=routing, sharing=sharing), "cpu")
    w = p.workload
    exact = p.to(torch.float64)
    for m, start, stop in w.blocks():
        logits = (exact.x[start:stop] @ exact.gate_weight[m].t()).sort(-1, descending=True).values
        gap = logits[:, w.top_k - 1] - logits[:, w.top_k]
        assert gap.min() > 0.8, "the last chosen expert must lie clearly above the first one left out"


def test_skews_are_what_they_are_called():
    base = {"dtype": "float32", "in_features": 64, "hidden_features": 16, "out_features": 16}
    counts = {
        r: experts_of(Workload(4000, routing=r, **base)).flatten().bincount(minlength=4) for r in workloads.ROUTINGS
    }
    assert counts["balanced"].max() < 1.15 * counts["balanced"].min()
    assert (counts["zipf"].diff() < 0).all() and counts["zipf"][0] > 2 * counts["zipf"][3]
    assert counts["one"].tolist() == [4000, 4000, 0, 0]


def test_disjoint_experts_see_their_modality_only():
    w = Workload(101, "float32", 32, 16, 16, sharing="DEDR")
    experts = experts_of(w)
    (_, _, middle), (_, _, end) = w.blocks()
    assert (middle, end) == (51, 101)
    assert experts[:middle].max() < 4 <= experts[middle:].min() and experts.max() < 8


def test_the_declared_shapes_are_the_papers():
    headline = workloads.headline()
    assert [w.tokens for w in headline] == [64, 256, 1024, 4096, 16384]
    everything = [*headline, *workloads.variations(), *workloads.real_counts(), *workloads.library_shapes()]
    assert {w.out_features for w in everything} >= {2048, 3072, 4096}
    assert {w.num_experts for w in everything} == {4, 8, 16} and {w.top_k for w in everything} == {1, 2, 4}
    assert {w.sharing for w in everything} == {"JEJR", "JEDR", "DEDR"}
    assert {w.dtype for w in everything} == {"bfloat16", "float16", "float32"}
    assert max(w.tokens for w in everything) == 32768
    assert len({w.key for w in everything}) == len(everything), "two workloads would share a row"


def test_an_unknown_routing_is_refused():
    with pytest.raises(ValueError, match="routing must be one of"):
        Workload(64, routing="random")
