"""The tuner without a GPU: its search and the file it writes."""

import math
from dataclasses import replace

from benchmarks import tune
from benchmarks.workloads import Workload
from llama_smop.triton_kernels import tables
from llama_smop.triton_kernels.launch import recording
from llama_smop.triton_kernels.tiles import TileConfig
from tests.kernels.targets import compiling_for

START = TileConfig(64, 64, 32, num_warps=4, num_stages=3)


def finding(**changes) -> tune.Finding:
    best = TileConfig(128, 128, 64, num_warps=8, num_stages=4, group_m=4)
    base = tune.Finding("w", "gemm", 90, "half", 1.0, START, 100.0, best, 90.0, 1.2, 5)
    return replace(base, **changes)


def test_the_search_walks_to_the_quickest_tile():
    quickest = TileConfig(128, 256, 64, num_warps=8, num_stages=4)

    def cost(config: TileConfig) -> float:
        fields = ("block_m", "block_n", "block_k", "num_warps", "num_stages")
        return sum(abs(math.log2(getattr(config, f) / getattr(quickest, f))) for f in fields)

    best, costs = tune.search(START, cost, deadline=math.inf)
    assert best == quickest and costs[START] == cost(START)


def test_what_is_timed_are_the_five_products_of_a_step():
    workload = Workload(40, "float32", in_features=24, hidden_features=32, out_features=48)
    with compiling_for(90), recording(execute=False) as recorder:
        for product in tune.products(workload, "cpu"):
            assert product.shape.rows == 80 and START.supports(product.shape, workload.torch_dtype, 90)
            product.build(START).run()
    assert recorder.names()[2:] == 3 * ["grouped_gemm_kernel"] + 2 * ["grouped_wgrad_kernel"]


def test_a_search_without_time_keeps_the_shipped_tile():
    best, costs = tune.search(START, lambda config: 1.0, deadline=-math.inf)
    assert best == START and list(costs) == [START]


def test_only_tiles_that_win_by_more_than_the_noise_enter_the_table():
    key = ("gemm", 90, "half")
    assert tune.improved(tables.TABLE, [finding(best_us=99.0)]) == tables.TABLE
    changed = tune.improved(tables.TABLE, [finding()])
    assert changed[key][-1] == (0.75, finding().best)  # 0.9 of the time where 1.2 of it was modelled
    assert changed[key][:-1] == tables.TABLE[key]


def test_the_written_table_reads_back():
    changed = tune.improved(tables.TABLE, [finding()])
    source = tune.render(changed, "Measured on a machine.").replace(
        "from .tiles", "from llama_smop.triton_kernels.tiles"
    )
    namespace = {}
    exec(source, namespace)
    assert namespace["TABLE"] == changed
