"""Products in clusters of two blocks, each of which loads half of an operand for both.

From two rounds of tiles on: ptxrun shows the launchers few SMs, so that small products have as many.
"""

from dataclasses import replace

import pytest
import torch

from llama_smop import functional
from llama_smop.ops.self_check import Model, make, through_backend
from tests.cuda import runners
from tests.cuda.runners import CudaPtx, params
from tests.cuda.test_cuda_operators import compare, operands
from tests.kernels.runners import poisoned_memory
from tests.kernels.test_chain import check

bf16, fp16 = torch.bfloat16, torch.float16
ONE_CLUSTER, FOUR_CLUSTERS = CudaPtx(arch=90, sms=2), CudaPtx(arch=90, sms=9)  # of nine SMs one is left over
RACES = CudaPtx(arch=90, sms=4, races=True)
# Row tiles: three, none, one, three of which the last is ragged; and rows of no group.
ODD = torch.tensor([300, 300, 428, 690], dtype=torch.int32)
# Every projection and every gradient of its weights is cut for clusters.
LARGE = Model(264, 392, 392, E=3, K=2, sharing="JEJR")


def clusters() -> list[int]:
    """Blocks a cluster of the matrix products launched in this order."""
    return [launch["cluster"][0] for launch in runners.launches.log if "_sm90" in launch["name"]]


def assert_in_clusters(runner) -> None:
    if runner.device == "cpu":
        assert set(clusters()) == {2}, "the shape should be cut for clusters"


@pytest.mark.parametrize("runner", params(ONE_CLUSTER))
@pytest.mark.parametrize(
    ("n", "k_major", "width"),
    [(760, True, 256), (760, False, 256), (560, False, 192), (776, False, 160), (776, True, 160)],
)
def test_every_tile_width(runner, n, k_major, width):
    """An odd number of column tiles: the last tile of an odd number of row tiles has a block to itself."""
    a, b = operands((700, 328), (4, 328, n), bf16)
    if k_major:
        b = b.transpose(1, 2).contiguous().transpose(1, 2)
    results = []
    with runner.running():
        for seed in (0, 1):  # copies and products at once, and as late as allowed
            runner.vary(seed)
            results.append(compare(runner, a, b, ODD))
            assert_in_clusters(runner)
            if runner.device == "cpu":
                assert f", {width}, " in runners.launches.kernels[0]
    assert torch.equal(*results), "differs from run to run"


@pytest.mark.parametrize("runner", params(FOUR_CLUSTERS))
@pytest.mark.parametrize("ends", [[0, 0, 700, 700], [128, 384, 640, 641], [1, 2, 3, 4], [0, 0, 0, 0]])
def test_any_routing(runner, ends):
    """One group with all rows, whole tiles, single rows, none."""
    a, b = operands((700, 72), (4, 72, 520), fp16)
    with runner.running():
        compare(runner, a, b, torch.tensor(ends, dtype=torch.int32))
        assert_in_clusters(runner)


@pytest.mark.parametrize("runner", params(FOUR_CLUSTERS))
@pytest.mark.parametrize("shapes", [((700, 72), (4, 72, 520)), ((256, 1100), (1100, 392))])
def test_senseless_offsets(runner, shapes):
    """Both blocks of a cluster make the same of them: as many stages, and nothing outside the tensors."""
    with runner.running():
        a, b = (t.to(runner.device) for t in operands(*shapes, fp16))
        for ends in ([300, 9, -5, 2**31 - 1], [2**31 - 1, 0, 2**31 - 1, 0], [-(2**31)] * 4):
            runner.module.grouped_mm(a, b, torch.tensor(ends, dtype=torch.int32).to(runner.device), None, None)
        assert_in_clusters(runner)


@pytest.mark.parametrize("runner", params(ONE_CLUSTER))
def test_weight_gradients(runner):
    """A ragged end, a group with few rows and one without."""
    a, b = operands((256, 1100), (1100, 392), bf16)
    offs = torch.tensor([530, 530, 540, 1090], dtype=torch.int32)
    results = []
    with runner.running():
        for seed in (0, 1):
            runner.vary(seed)
            results.append(compare(runner, a, b, offs))
            assert_in_clusters(runner)
    assert torch.equal(*results), "differs from run to run"
    assert results[0][1].eq(0).all()


@pytest.mark.parametrize("runner", params(FOUR_CLUSTERS))
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_rows_of_other_groups_may_hold_anything(runner, poison):
    a, b = operands((700, 72), (4, 72, 520), bf16)
    left, right = operands((256, 1100), (1100, 392), bf16)
    offs, ends = ODD, torch.tensor([300, 340, 600, 1050], dtype=torch.int32)
    strange = torch.zeros(1100, dtype=torch.bool)
    strange[300:340] = strange[1050:] = True  # the second group's rows, and those of no group
    with runner.running():
        clean = compare(runner, a, b, offs), compare(runner, left, right, ends)
        assert_in_clusters(runner)
        a[690:], left[:, strange], right[strange] = poison, poison, poison
        to = [t.to(runner.device) for t in (a, b, offs, left, right, ends)]
        with poisoned_memory():
            rows = functional.grouped_mm(*to[:3], backend="cuda").cpu()
            columns = functional.grouped_mm(*to[3:], backend="cuda").cpu()
    assert torch.equal(rows, clean[0])
    for group in (0, 2, 3):
        assert torch.equal(columns[group], clean[1][group]), f"group {group}"
    assert not columns[1].isfinite().any()


@pytest.mark.parametrize("runner", params(ONE_CLUSTER))
@pytest.mark.parametrize("skew", [0.0, 8.0])
def test_the_chain(runner, skew):
    """Gathered rows of x, saved activations, column sums, both weight gradients: against the float64 loop."""
    with runner.running():
        check(runner, LARGE, make(LARGE, 400, seed=1, masked=0.05, skew=skew))
        assert_in_clusters(runner)


@pytest.mark.parametrize("runner", params(RACES))
def test_the_order_of_blocks_warps_and_copies_does_not_show(runner):
    model, results = replace(LARGE, E=2), []
    inputs = make(model, 260, seed=2, masked=0.05)
    with runner.running(), poisoned_memory():
        for seed in (0, 1, 2):  # copies at once, as late as allowed, or either
            runner.vary(seed)
            results.append(through_backend(runner.module, model, inputs.to(runner.device)))
            assert_in_clusters(runner)
    for result in results[1:]:
        for key, first in results[0].items():
            assert torch.equal(first, result[key]), f"{key} differs from run to run"


@pytest.mark.parametrize("runner", params(ONE_CLUSTER))
def test_a_single_round_is_for_blocks_alone(runner):
    a, b = operands((250, 72), (1, 72, 64), bf16)
    with runner.running():
        compare(runner, a, b, torch.tensor([250], dtype=torch.int32))
        if runner.device == "cpu":
            assert clusters() == [1]
