"""Every kernel with every tile of the shipped table, compiled for sm_80, sm_90 and sm_100; no GPU needed.

What is compiled is what an operator launches: the chain runs on meta tensors and its launches are compiled instead of
run. `pytest -m slow tests/kernels/test_compile.py -s` does all of it and prints the table.
"""

import pytest
import torch

from llama_smop.ops.self_check import Model, make, through_backend
from llama_smop.triton_kernels import projection
from llama_smop.triton_kernels.launch import Launch, recording
from llama_smop.triton_kernels.tiles import SHARED_MEMORY, SMALLEST_SHARED_MEMORY
from tests.kernels import resources
from tests.kernels.targets import compiling_for

ARCHS = (80, 90, 100)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOKENS = (48, 256, 1024, 4096, 16384)  # rows enough for each entry of the table
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
A_REGISTER_OR_TWO = 8  # bytes: ptxas may keep them in local memory to reach the next step of occupancy
GEMMS = ("grouped_gemm_kernel", "grouped_wgrad_kernel")


def launches(arch: int, dtype: torch.dtype, tokens: tuple[int, ...], activation: str = "relu") -> list[Launch]:
    """The distinct launches of the default sizes, 1024 → 2048 → 2048, E 4, K 2, with dx."""
    model = Model(1024, 2048, 2048, E=4, K=2, sharing="JEJR", dtype=dtype, activation=activation)
    distinct = {}
    for T in tokens:
        with torch.device("meta"):
            inputs = make(model, T)
        with compiling_for(arch), recording(execute=False) as recorder:
            through_backend(projection, model, inputs)
        for launch in recorder.launches:
            absent = tuple(arg is None for arg in launch.args)
            strides = launch.args[-5:] if launch.name in GEMMS else ()
            options = (*launch.constexprs.values(), launch.num_warps, launch.num_stages)
            distinct.setdefault((launch.name, absent, strides, options), launch)
    return list(distinct.values())


def describe(launch: Launch) -> str:
    """The name and what sets this variant apart."""
    c = launch.constexprs
    if launch.name in GEMMS:
        tile = f"{c['BLOCK_M']}x{c['BLOCK_N']}x{c.get('BLOCK_K', c.get('BLOCK_R'))}"
        flags = [f for f in ("GATHER", "GRADIENT", "GATED") if c.get(f)]
        return " ".join(
            [launch.name.removesuffix("_kernel"), tile, f"stages {launch.num_stages}", *map(str.lower, flags)]
        )
    return launch.name.removesuffix("_kernel")


def check(
    arch: int, dtype_name: str, tokens: tuple[int, ...], capsys, kernels: tuple[str, ...] = (), activation: str = "relu"
) -> None:
    """Compile each distinct launch (of `kernels` alone, if any are named), print what it takes and assert on it."""
    dtype = DTYPES[dtype_name]
    rows, faults = [], []
    for launch in launches(arch, dtype, tokens, activation):
        if kernels and launch.name not in kernels:
            continue
        with compiling_for(arch):
            used = resources.of(launch.compile())
        blocks = used.blocks_per_multiprocessor(SHARED_MEMORY[arch])
        what = f"sm_{arch} {dtype_name} {describe(launch)}"
        rows.append(
            f"{what:78} {used.num_warps:2} warps {used.registers:4} registers {used.spills:4} B spilled "
            f"{used.shared / 1024:6.1f} KiB {blocks:3} blocks {used.instruction}"
        )
        if used.spills > A_REGISTER_OR_TWO:
            faults.append(f"{what} spills {used.spills} bytes a thread")
        if blocks < 1:
            faults.append(f"{what} does not fit a multiprocessor")
        if launch.name in GEMMS and dtype != torch.float32 and used.instruction != TENSOR_CORE[arch]:
            faults.append(f"{what} uses {used.instruction or 'no tensor core'}, not {TENSOR_CORE[arch]}")
        if launch.name in GEMMS and used.instruction in ("HMMA", "HGMMA"):
            faults += [f"{what}: {fault}" for fault in used.faults_of_pipelining()]
    with capsys.disabled():
        print("", *rows, sep="\n")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("arch", "dtype", "tokens"),
    [
        (80, "bf16", 16384),
        (90, "bf16", 4096),
        pytest.param(90, "bf16", 1024, marks=pytest.mark.slow),
        pytest.param(100, "fp16", 16384, marks=pytest.mark.slow),
    ],
)
def test_tiles(arch, dtype, tokens, capsys):
    check(arch, dtype, (tokens,), capsys, kernels=() if tokens == 4096 else GEMMS)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_tiles_of_gated_experts(arch, capsys):
    """Few rows and many: two pre-activations, or the gradients of both, in one tile's epilogue."""
    check(arch, "bf16", (64, 16384), capsys, GEMMS[:1], "swiglu")


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.parametrize("arch", ARCHS)
def test_tiles_of_activations_that_take_registers(arch, activation, capsys):
    """Few rows and many, forward and backward."""
    check(arch, "bf16", (64, 1024, 16384), capsys, GEMMS[:1], activation)


@pytest.mark.parametrize(
    "activation", ["swiglu", *(pytest.param(name, marks=pytest.mark.slow) for name in ("reglu", "geglu"))]
)
def test_products_of_gated_gradients_are_not_serialised(activation, capsys):
    """For few rows, where Triton 3.6 and ptxas once made each wgmma wait for the one before."""
    check(90, "bf16", (64,), capsys, GEMMS[:1], activation)


@pytest.mark.parametrize("arch", [80])
def test_the_router_of_128_experts_fits_the_smallest_shared_memory(arch):
    model = Model(1024, 16, 16, E=64, K=8, sharing="DEDR", dtype=torch.float32)
    with torch.device("meta"):
        inputs = make(model, 300)
    with compiling_for(arch):
        with recording(execute=False) as recorder:
            through_backend(projection, model, inputs)
        for launch in recorder.launches:
            if launch.name.startswith(("router", "schedule", "combine")):
                used = resources.of(launch.compile())
                assert used.shared <= SMALLEST_SHARED_MEMORY and not used.spills, f"{launch.name}: {used.shared} bytes"


@pytest.mark.parametrize("arch", [80, 90])
def test_every_kernel_waits_for_the_launch_before_it(arch):
    """From sm_90 on, and before it touches memory or leaves; older devices have no such instruction."""
    model = Model(64, 64, 64, E=4, K=2)
    with torch.device("meta"):
        inputs = make(model, 200)
    with compiling_for(arch), recording(execute=False) as recorder:
        through_backend(projection, model, inputs)
        compiled = {one.name: one.compile() for one in recorder.launches}
    for name, kernel in compiled.items():
        ptx = kernel.asm["ptx"]
        assert ("griddepcontrol.wait" in ptx) == (arch >= 90), f"{name} for sm_{arch}"
        if arch >= 90:
            before = ptx.split("griddepcontrol.wait")[0]
            early = [i for i in ("ld.global", "st.global", "cp.async", "ret;", " exit;") if i in before]
            assert not early, f"{name} has {early} before it waits"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tile_of_the_table(arch, dtype, capsys):
    check(arch, dtype, TOKENS, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_every_tile_in_tf32(arch, capsys):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        check(arch, "fp32", TOKENS, capsys)
    finally:
        torch.set_float32_matmul_precision(before)
