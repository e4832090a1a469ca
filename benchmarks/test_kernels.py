"""`pytest benchmarks --benchmark-only`: the operators of benchmarks/kernels.py under pytest-benchmark."""

import pytest
import torch

from benchmarks import kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPERATORS = ("route", "schedule", "up_product", "weight_gradient", "experts")
CASES = [(w, operator) for w in kernels.workloads(DEVICE) for operator in OPERATORS]


@pytest.fixture(scope="module")
def groups():
    made = {}

    def get(w):
        if w not in made:
            made.clear()  # one problem at a time
            made[w] = kernels.groups(w, DEVICE)
        return made[w]

    return get


@pytest.mark.parametrize("implementation", ["ours_cuda", "ours_triton", "ours_torch", "torch_grouped_mm", "plain"])
@pytest.mark.parametrize(("workload", "operator"), CASES, ids=[f"{w.tokens}-{o}" for w, o in CASES])
def test_operator(benchmark, groups, workload, operator, implementation):
    runs = groups(workload)[operator]
    if implementation not in runs:
        pytest.skip(f"{implementation} does not compute {operator} here")

    def run():
        with torch.no_grad():
            runs[implementation]()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{operator}, T {workload.tokens}"
    benchmark.pedantic(run, rounds=10, warmup_rounds=2, iterations=1)
