"""Weights that the CUDA backend brings into the L2 ahead: which bytes, that nothing else changes, and when not.

Prefetches leave no trace. So the device functions that issue them are also compiled alone, for kernels whose PTX notes
in the memory itself what is brought.
"""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from llama_smop.ops.backends import cuda as cuda_backend
from llama_smop.ops.backends import cuda_replay
from llama_smop.ops.self_check import Model, make, through_backend
from tests import ptxrun_support
from tests.cuda import extension, runners
from tests.cuda.runners import ON_PTX, CudaPtx, cases
from tests.cuda.test_cuda_build import needs_nvcc
from tests.kernels.runners import slow

SM80, SM90 = CudaPtx(arch=80), CudaPtx(arch=90)
BLOCKS = 128
FEW_ROWS = cuda_backend.FEW_ROWS


@needs_nvcc
@pytest.mark.parametrize("size", [16, 128, 1000, 4096, 12_345, 1 << 20, (1 << 24) + 48])
@pytest.mark.parametrize("count", [1, 7, 40, 4096])
def test_parts_are_all_bytes_once(size, count):
    end = 0
    for number in range(count):
        at, length = extension.static().part_of(size, count, number)
        assert length >= 0 and at % 128 == 0
        if length:
            assert at == end and (length % 128 == 0 or at + length == size)
            end = at + length
    assert end == size


KERNELS = r"""
#include "CSRC/producers_sm90.cuh"

extern "C" __global__ void blocks(const char* from, int bytes, int64_t stride, int experts, const int32_t* offs,
                                  int64_t rows) {
  smop::only_prefetches({from, bytes, stride}, experts, offs, rows);
}
extern "C" __global__ void tiles(const char* from, int bytes, int64_t stride, int experts, const int32_t* offs,
                                 int64_t rows, int n, int k) {
  SmopGemm p{};
  p.ahead = {from, bytes, stride}, p.offs = offs, p.experts = experts, p.rows = rows, p.n = n, p.k = k;
  const int col_tiles = static_cast<int>(smop::ceil_div(n, 64));
  smop::RowTileScheduler<> scheduler(offs, experts, rows, 128, col_tiles);
  smop::RowTile tile;
  for (int number = blockIdx.x; scheduler.find(number, tile); number += gridDim.x) {
    smop::sm90::Ahead ahead;
    if (threadIdx.x == 0) ahead.start(p, tile, col_tiles);
    for (int at = 0; at < k; at += smop::sm90::kBlockK)
      if (threadIdx.x == 0) ahead.step();
  }
}
"""


def noting(ptx: str) -> str:
    """Each prefetch writes how many bytes it brings to where they start; a line at a time: 128, or up to the end."""
    ptx = re.sub(r"cp\.async\.bulk\.prefetch\.L2\.global (\[%rd\d+\]), (%r\d+);", r"st.global.u32 \1, \2;", ptx)
    return re.sub(r"prefetch\.global\.L2 (\[%rd\d+\]);", r"red.global.add.u32 \1, 128;", ptx)


def covered(memory: np.ndarray, lines: bool) -> np.ndarray:
    """How often each 4 bytes have been brought, by the notes. A line may end where the tensor has ended before."""
    found = np.zeros(memory.size, int)
    for at in np.flatnonzero(memory):
        end = at + memory[at] // 4
        assert memory[at] % 16 == 0 and (end <= memory.size or lines), "beyond the end of the tensor"
        found[at:end] += 1
    return found


@ON_PTX
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_what_the_kernels_bring_is_experts_with_rows_and_no_byte_more(arch):
    ptxrun = ptxrun_support.load()
    source = KERNELS.replace("CSRC", str(extension.csrc.CSRC))
    module = ptxrun.Module(noting(ptxrun.compile_cuda(source, arch)))
    routings = (None, [0, 5, 5, 300, 300], [0, 0, 0, 0, 0], [40, 80, 120, 160, 200], [0, 0, 0, 0, 1])
    for stride, size in ((48, 48), (4112, 4112), (100_016, 99_968), (1_000_000, 1_000_000)):
        for ends in routings:
            offs = None if ends is None else np.array(ends, np.int32)
            busy = np.ones(5, int) if ends is None else np.diff(ends, prepend=0) > 0
            for kernel, grid, sizes in (("blocks", 3 + BLOCKS, ()), ("tiles", 4, (200, 100)), ("tiles", 7, (64, 64))):
                if kernel == "tiles" and ends is None:
                    continue
                memory = np.zeros((5, stride // 4), np.int32)
                module.launch(kernel, grid, 64, [memory, size, stride, 5, offs, 300, *sizes])
                for expert, part in enumerate(memory):
                    found = covered(part, arch == "sm_80")
                    assert (found[: size // 4] == busy[expert]).all(), f"{kernel}, expert {expert} of {ends}"
                    assert not found[size // 4 :].any(), f"{kernel} brings more than the first bytes of an expert"


MODELS = {
    "jejr": Model(48, 80, 72, E=4, K=2, sharing="JEJR"),
    "all-active": Model(40, 24, 56, E=3, K=3, sharing="JEJR"),
    "dedr-shared": Model(48, 80, 72, E=4, K=2, shared=1, dtype=torch.float16),
    "odd": Model(37, 51, 29, E=5, K=3, sharing="JEDR", activation="silu"),
    "wider": Model(16, 24, 4104, E=2, K=2, sharing="JEJR"),
}


@pytest.mark.parametrize(
    ("runner", "name"),
    cases(("jejr", SM80, SM90, CudaPtx(arch=90, sms=2)), ("dedr-shared", SM80, SM90), ("odd", SM80, SM90))
    + slow(cases(("all-active", SM80, SM90), ("wider", SM90))),
)
def test_the_bits_are_those_of_a_chain_that_brings_nothing(runner, name, monkeypatch):
    model = MODELS[name]
    for tokens, masked, skew in ((1, 0.0, 0.0), (1, 1.0, 0.0), (40, 0.3, 0.0), (40, 0.0, 8.0)):
        inputs = make(model, tokens, seed=3, masked=masked, skew=skew).to(runner.device)
        for options in ({}, {"recompute": "hz"}):
            found = []
            for few in (FEW_ROWS, 0):
                monkeypatch.setattr(cuda_backend, "FEW_ROWS", few)
                monkeypatch.setattr(cuda_replay, "_known", {})  # a replay would not ask again
                with runner.running():
                    found.append(through_backend(runner.module, model, inputs, **options))
            for key, value in found[1].items():
                assert torch.equal(found[0][key], value), f"{key} changes at T {tokens}"


@pytest.mark.parametrize(("runner", "name"), cases(("jejr", SM80, SM90)))
def test_weights_are_brought_for_few_tokens_alone_and_cost_no_launch(runner, name, monkeypatch):
    """By the sizes of grids: the router and combine's backward have 128 blocks more."""
    if runner.device != "cpu":
        pytest.skip("launches are counted under ptxrun")
    model = MODELS[name]

    def grids(tokens: int, **changed) -> dict[str, int]:
        with runner.running():
            through_backend(runner.module, replace(model, **changed), make(replace(model, **changed), tokens))
            log = zip(runners.launches.kernels, runners.launches.log, strict=True)
            return {f"{n} {kernel.split('<')[0].split()[-1]}": one["grid"][0] for n, (kernel, one) in enumerate(log)}

    def more(tokens: int, **changed) -> dict[str, int]:
        with_it = grids(tokens, **changed)
        with monkeypatch.context() as patched:
            patched.setattr(cuda_backend, "FEW_ROWS", 0)
            without = grids(tokens, **changed)
        assert with_it.keys() == without.keys()
        return {name.split()[1]: n - without[name] for name, n in with_it.items() if n != without[name]}

    assert more(40) == {"router_fwd": BLOCKS, "combine_bwd": BLOCKS}
    assert more(7) == {"combine_bwd": BLOCKS}  # 14 choices leave an expert without rows
    assert more(40, sharing="DEDR") == {"combine_bwd": BLOCKS}  # half of the experts may not be needed
    assert more(0) == {}


def test_the_rule():
    def brought(rows: int, shape=(4, 2048, 1024), least: int = 1) -> bool:
        weights = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        return cuda_backend.worth_bringing(weights, rows, least) is not None

    assert [brought(rows) for rows in (0, 1, 1024, 1025)] == [False, True, True, False]
    assert not brought(15, least=16) and brought(16, least=16)
    wide = torch.empty(4, 2048, 2048, dtype=torch.bfloat16, device="meta")
    assert cuda_backend.worth_bringing(wide[..., :1024], 128) is None
    assert cuda_backend.worth_bringing(None, 128) is None


def test_no_more_is_brought_than_a_third_of_the_l2(monkeypatch):
    monkeypatch.setattr(cuda_backend, "_ptr", lambda tensor: 16)
    for shape in ((4, 2048, 1024), (4, 2048, 2048), (8, 2048, 2048), (100, 2048, 2048)):
        weights = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        _, size, stride = cuda_backend._brought(weights).values()
        assert size % 128 == 0 and size <= stride == 2 * shape[1] * shape[2]
        assert shape[0] * size <= cuda_backend.SMALLEST_L2 / 3
        assert size == stride or shape[0] * (size + 128) > cuda_backend.SMALLEST_L2 / 3
