"""How many kernels an operator launches, and that building them needs no values: everything here is on meta tensors."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama_smop.ops import backend_triton
from llama_smop.triton_kernels import configs, projection, tiles
from llama_smop.triton_kernels.launch import recording
from tests.kernels.cases import Model, make, through_backend
from tests.kernels.targets import compiling_for

ROUTE, FORWARD = 2, 3
BACKWARD = 7  # 8 is the design's allowance


def names(model: Model, tokens: int, **options) -> list[str]:
    with torch.device("meta"):
        inputs = make(model, tokens)
    with compiling_for(90), recording(execute=False) as recorder:
        through_backend(backend_triton, model, inputs, **options)
    return recorder.names()


@pytest.mark.parametrize("tokens", [1, 48, 1024, 16384])
def test_five_launches_forward_and_seven_backward(tokens):
    launched = names(Model(1024, 2048, 2048, E=4, K=2), tokens, need_dx=False)
    assert launched[: ROUTE + FORWARD] == [
        "router_fwd_kernel", "schedule_kernel", "grouped_gemm_kernel", "grouped_gemm_kernel", "combine_fwd_kernel",
    ]  # fmt: skip
    assert len(launched) == ROUTE + FORWARD + BACKWARD, launched


def test_dx_costs_two_launches_more_and_recompute_one_a_tensor():
    model = Model(64, 64, 64, E=4, K=2)
    plain = len(names(model, 200, need_dx=False))
    assert len(names(model, 200, need_dx=True)) == plain + 2
    assert len(names(model, 200, need_dx=False, recompute="h")) == plain + 1
    assert len(names(model, 200, need_dx=False, recompute="hz")) == plain + 2


def test_rows_kept_follow_from_the_shape():
    assert projection.intermediate_rows(48, 2, 4) == 4 * 48  # all experts on all tokens
    assert projection.intermediate_rows(1024, 2, 4) == 2 * 1024
    assert projection.intermediate_rows(8, 2, 64) == 2 * 8  # few choices: most experts idle
    assert projection.intermediate_rows(0, 2, 4) == 0


def test_the_backend_says_why_it_cannot_run():
    cpu = torch.device("cpu")
    assert "float64" in backend_triton.unsupported(torch.float64, cpu, 2, 4)
    assert "128" in backend_triton.unsupported(torch.bfloat16, cpu, 2, 129)
    with compiling_for(90):
        assert backend_triton.unsupported(torch.bfloat16, torch.device("meta"), 2, 4) is None
        assert "'meta'" in backend_triton.unsupported(torch.bfloat16, cpu, 2, 4)
    with compiling_for(75):
        assert "8.0" in backend_triton.unsupported(torch.bfloat16, torch.device("meta"), 2, 4)


def test_tf32_follows_every_way_to_ask_for_it():
    """In a process of its own: once PyTorch has been asked in the new way, its old getter raises."""
    steps = {
        "pass": "ieee",
        "torch.set_float32_matmul_precision('high')": "tf32",
        "torch.set_float32_matmul_precision('highest')": "ieee",
        "torch.set_float32_matmul_precision('medium')": "tf32",
        "matmul.allow_tf32 = False": "ieee",
        "matmul.allow_tf32 = True": "tf32",
        "matmul.fp32_precision = 'ieee'": "ieee",
        "matmul.fp32_precision = 'tf32'": "tf32",
        "matmul.fp32_precision = 'none'": "ieee",
        "torch.backends.fp32_precision = 'tf32'": "tf32",
    }
    script = ["import torch", "from llama_smop.triton_kernels.launch import dot_precision"]
    script += ["matmul = torch.backends.cuda.matmul"]
    script += [f"{step}; print(dot_precision(torch.float32))" for step in steps]
    command = [sys.executable, "-c", "\n".join(script)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.split() == list(steps.values()), done.stdout + done.stderr


def test_every_shape_gets_a_tile_that_fits():
    for arch in (80, 86, 89, 90, 100, 120):
        for dtype, precision in ((torch.bfloat16, "tf32"), (torch.float32, "tf32"), (torch.float32, "ieee")):
            for rows in (1, 100, 1000, 100_000):
                for n in (1, 65, 4096):
                    for choose in (configs.gemm_config, configs.wgrad_config):
                        config = choose(arch, dtype, precision, rows, 4, n, n)
                        limit = tiles.SHARED_MEMORY.get(arch, tiles.SMALLEST_SHARED_MEMORY)
                        assert config.shared_memory(dtype) <= limit
