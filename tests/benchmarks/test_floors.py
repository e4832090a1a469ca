"""The roofline's arithmetic, against numbers worked out by hand."""

import pytest
import torch

from benchmarks.floors import Ceilings, dense_work, measure_ceilings, smop_work
from benchmarks.workloads import Workload

H100 = Ceilings(3.0e12, {"bfloat16": 790e12})


@pytest.mark.parametrize(("tokens", "forward_us"), [(64, 16.9), (256, 17.3), (1024, 32.6), (4096, 130.5), (16384, 522)])
def test_forward_floor_of_the_1b_projector(tokens, forward_us):
    floor = H100.floor_us(smop_work(Workload(tokens), "forward"), "bfloat16")
    assert floor == pytest.approx(forward_us, rel=0.01)


def test_flops_a_token():
    work = {which: smop_work(Workload(1000), which) for which in ("forward", "backward", "both")}
    router = 2 * 4 * 1024
    assert work["forward"].flops / 1000 == pytest.approx(25.17e6 + router, rel=1e-3)  # 2·K·(D·H + H·O)
    assert work["backward"].flops / 1000 == pytest.approx(41.94e6 + router, rel=1e-3)  # dh, dW2, dW1; no dx
    assert work["both"].flops == work["forward"].flops + work["backward"].flops


def test_bytes_by_hand():
    w = Workload(3, "float32", 2, 5, 7, num_experts=4, top_k=2)
    weights = 4 * (5 * 2 + 7 * 5 + 5 + 3 * 7)
    assert smop_work(w, "forward").bytes == 4 * (3 * 2 + 4 * 2 + weights + 3 * 7)
    kept = 3 * 2 * (5 + 7)  # h and z
    read = 3 * 2 + 3 * 7 + 4 * 7 * 5 + kept
    assert smop_work(w, "backward").bytes == 4 * (read + weights + 4 * 2)
    assert smop_work(w, "both").bytes == smop_work(w, "forward").bytes + 4 * kept + smop_work(w, "backward").bytes


def test_idle_experts_are_not_read():
    one, all_of_them = (smop_work(Workload(64, routing=r), "forward").bytes for r in ("one", "balanced"))
    assert one < 0.52 * all_of_them


def test_a_dense_projector_of_k_times_the_width_does_the_same_work():
    w = Workload(16384)
    sparse, dense = smop_work(w, "both").flops, dense_work(w, 2 * 2048, "both").flops
    assert dense == pytest.approx(sparse, rel=1e-3)


def test_a_dtype_without_a_measured_product_has_no_floor():
    assert H100.floor_us(smop_work(Workload(64, "float32"), "forward"), "float32") is None


def test_ceilings_are_measured():
    found = measure_ceilings(torch.device("cpu"), ("float32", "bfloat16"), quick=True)
    assert found.bytes_per_s > 0 and set(found.flops) == {"float32", "bfloat16"} and min(found.flops.values()) > 0
