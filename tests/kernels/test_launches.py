"""How many kernels an operator launches, that building them needs no values (everything here is on meta tensors), and
when a device is refused."""

import subprocess
import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from triton.backends.compiler import GPUTarget

from llama_smop.ops import dispatch
from llama_smop.ops.self_check import Model, make, through_backend
from llama_smop.triton_kernels import configs, projection, tiles
from llama_smop.triton_kernels.launch import recording
from tests.kernels.targets import CompileOnly, compiling_for, driven_by

ROUTE, FORWARD = 2, 3
BACKWARD = 7  # 8 is the design's allowance; 6 where one split of the tokens makes the gate's gradient


def names(model: Model, tokens: int, **options) -> list[str]:
    with torch.device("meta"):
        inputs = make(model, tokens)
    with compiling_for(90), recording(execute=False) as recorder:
        through_backend(projection, model, inputs, **options)
    return recorder.names()


@pytest.mark.parametrize("tokens", [1, 48, 1024, 16384])
def test_five_launches_forward_and_seven_backward(tokens):
    launched = names(Model(1024, 2048, 2048, E=4, K=2), tokens, need_dx=False)
    assert launched[: ROUTE + FORWARD] == [
        "router_fwd_kernel", "schedule_kernel", "grouped_gemm_kernel", "grouped_gemm_kernel", "combine_fwd_kernel",
    ]  # fmt: skip
    assert len(launched) == ROUTE + FORWARD + BACKWARD - (tokens <= 64), launched


@pytest.mark.parametrize("tokens", [1, 48, 1024])
def test_shared_experts_cost_no_launch(tokens):
    launched = names(Model(64, 64, 64, E=4, K=2, shared=2), tokens, need_dx=False)
    assert launched == names(Model(64, 64, 64, E=4, K=2), tokens, need_dx=False)


def test_dx_costs_two_launches_more_and_recompute_one_a_tensor():
    model = Model(64, 64, 64, E=4, K=2)
    plain = len(names(model, 200, need_dx=False))
    assert len(names(model, 200, need_dx=True)) == plain + 2
    assert len(names(model, 200, need_dx=False, recompute="h")) == plain + 1
    assert len(names(model, 200, need_dx=False, recompute="hz")) == plain + 2


def test_all_launches_of_an_operator_but_the_first_are_dependent_ones():
    """The weights may have been written by whatever came before an operator: its first launch waits for all of it."""
    with torch.device("meta"):
        inputs = make(Model(64, 64, 64, E=4, K=2), 200)
    for recompute, backward in (("", "combine_bwd_kernel"), ("z", "grouped_gemm_kernel")):
        with compiling_for(90), recording(execute=False) as recorder:
            through_backend(projection, Model(64, 64, 64, E=4, K=2), inputs, recompute=recompute)
        first = [one.name for one in recorder.launches if not one.dependent]
        assert first == ["router_fwd_kernel", "grouped_gemm_kernel", backward, "router_bwd_kernel"]


def test_the_cheapest_tile_counts_waves_and_steps():
    """On 132 multiprocessors: small tiles for few rows; wide ones for many, unless a last wave stays nearly empty."""
    small, middle, wide = (
        tiles.TileConfig(64, 128, 64, num_warps=4, num_stages=4, blocks=2),
        tiles.TileConfig(128, 128, 64, num_warps=8, num_stages=3, blocks=2),
        tiles.TileConfig(128, 256, 64, num_warps=8, num_stages=4),
    )

    def cheapest(rows: int, groups: int) -> tiles.TileConfig:
        shape = configs.gemm_shape(rows, groups, 2048, 2048)
        cost = {t: configs.cost("gemm", 90, torch.bfloat16, "tf32", shape, t) for t in (small, middle, wide)}
        return min(cost, key=cost.get)

    assert cheapest(128, 4) == small
    assert cheapest(512, 4) == middle
    assert cheapest(2048, 4) == middle  # 128x256 makes 144 tiles: 12 more than multiprocessors
    assert cheapest(3000, 8) == wide and cheapest(8192, 4) == wide


def test_the_backend_says_why_it_cannot_run():
    cpu = torch.device("cpu")
    assert "float64" in projection.unsupported(torch.float64, cpu, 2, 4)
    assert "128" in projection.unsupported(torch.bfloat16, cpu, 2, 129)
    with compiling_for(90):
        assert projection.unsupported(torch.bfloat16, torch.device("meta"), 2, 4) is None
        assert "'meta'" in projection.unsupported(torch.bfloat16, cpu, 2, 4)
    with compiling_for(75):
        assert "8.0" in projection.unsupported(torch.bfloat16, torch.device("meta"), 2, 4)


def test_the_tensors_own_device_is_asked(monkeypatch):
    current = [0]

    @contextmanager
    def switched_to(device):
        current.append(device.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", switched_to)

    class TwoGpus(CompileOnly):
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", (90, 75)[current[-1]], 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", current[-1])

    with driven_by(TwoGpus(90)):
        for _ in range(2):  # the second time from memory
            assert projection.unsupported(torch.bfloat16, torch.device("cuda", 0), 2, 4) is None
            assert "8.0" in projection.unsupported(torch.bfloat16, torch.device("cuda", 1), 2, 4)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("0 active drivers"),
        AssertionError("libcuda.so cannot found!\nPlease create a symlink"),
        subprocess.CalledProcessError(1, ["gcc", "driver.c"]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_auto_says_once_that_triton_cannot_start(monkeypatch, caplog, error):
    class Broken(CompileOnly):
        def get_active_torch_device(self) -> torch.device:
            raise error

    monkeypatch.setattr(dispatch, "_triton_fails", cache(dispatch._triton_fails.__wrapped__))
    gpu = torch.device("cuda")
    with driven_by(Broken(90)):
        reason = projection.unsupported(torch.bfloat16, gpu, 2, 4)
        assert type(error).__name__ in reason and "\n" not in reason
        for dtype in (torch.bfloat16, torch.float32):
            assert dispatch.resolve("auto", dtype, gpu, 2, 4) != "triton"
    assert caplog.messages == [f'backend="auto" does without Triton on cuda: {reason}']


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
