"""What the chain tests share: the models, and the comparison of a runner with PyTorch and the float64 loop."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch

from llama_smop.ops.backends import cpu_products
from llama_smop.ops.backends import torch as torch_backend
from llama_smop.ops.self_check import Model, error, through_backend, through_naive
from tests.kernels.runners import Runner, poisoned_memory

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32

# Sizes that are multiples of no tile; every sharing, activation and dtype; K = 1, some, and all.
MODELS = {
    "dedr-relu": Model(48, 80, 72, E=4, K=2),
    "jejr-gelu": Model(37, 51, 29, E=3, K=1, sharing="JEJR", activation="gelu", biases=False, dtype=fp16),
    "jedr-silu": Model(40, 56, 24, E=5, K=3, sharing="JEDR", activation="silu", layer_norm=False, dtype=fp32),
    "all-active": Model(33, 24, 50, E=3, K=3, sharing="JEJR", dtype=bf16, layer_norm_dtype=fp32),
    "many-experts": Model(16, 24, 24, E=64, K=4, dtype=fp16),
    "dedr-swiglu": Model(48, 72, 40, E=4, K=2, activation="swiglu"),
    "jejr-geglu": Model(37, 51, 29, E=3, K=1, sharing="JEJR", activation="geglu", biases=False, dtype=fp16),
    "jedr-reglu": Model(40, 56, 24, E=5, K=3, sharing="JEDR", activation="reglu", layer_norm=False, dtype=fp32),
    "one-expert": Model(64, 96, 32, E=1, K=1, sharing="JEJR"),
    "jedr-shared": Model(40, 56, 24, E=5, K=3, sharing="JEDR", activation="silu", shared=2),
    "dedr-shared": Model(48, 80, 72, E=4, K=2, shared=1, dtype=fp16),
}


def check(runner: Runner, model: Model, inputs, relative: float = 0.0, **options) -> dict:
    """Run in each of the runner's orders. The bits of the runs agree, and no error exceeds twice PyTorch's.

    `relative` allows that share of a result's own root mean square besides, for formats PyTorch lacks on a CPU.
    """
    runs = []
    for seed in runner.orders:
        runner.vary(seed)
        with poisoned_memory():
            results = through_backend(runner.module, model, inputs.to(runner.device), **options)
        runs.append({name: t.cpu() for name, t in results.items()})
    results = runs[0]

    with same_dtype_products():
        plain = through_backend(torch_backend, model, inputs, **options)
    exact = through_naive(model, inputs, results["experts"])
    assert torch.equal(results["counts"].long(), exact["counts"])
    for name, truth in exact.items():
        if name in results:
            got, bound = results[name], 2 * error(plain[name], truth) + 1e-5
            bound += relative * error(truth, torch.zeros_like(truth))
            assert got.shape == truth.shape, f"{name} has shape {tuple(got.shape)}"
            assert error(got, truth) <= bound, f"{name} is off by {error(got, truth):.2e}, allowed {bound:.2e}"
    for name in ("experts", "inverse", "offs", *(("all_experts",) if model.shared else ())):
        assert torch.equal(results[name], plain[name]), f"{name} differs from PyTorch's"
    for name, first in results.items():
        assert all(torch.equal(first, run[name]) for run in runs[1:]), f"{name} differs from run to run"
    return results


@contextmanager
def same_dtype_products() -> Iterator[None]:
    """The yardstick is PyTorch in the kernel's dtype, on every CPU: one without such products would take float32's."""
    with patch.object(cpu_products, "_cpu_multiplies", lambda dtype: True):
        yield


def skip_unless_served(runner: Runner, model: Model) -> None:
    if model.dtype not in runner.dtypes:
        pytest.skip(f"{model.dtype} is not for this runner")
