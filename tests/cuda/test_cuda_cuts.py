"""A product's cut, columns of a tile and blocks of a cluster, can be asked for: benchmarks time one beside another."""

import pytest
import torch

from llama_smop.ops.backends import cuda
from tests.cuda import runners
from tests.cuda.runners import CudaPtx, params
from tests.cuda.test_cuda_operators import operands

ENDS = torch.tensor([300, 300, 800], dtype=torch.int32)


@pytest.mark.parametrize("runner", params(CudaPtx(arch=90)))
@pytest.mark.parametrize("cut", [(256, 1), (256, 2), (192, 2), (160, 1), (128, 1), (64, 1)])
def test_a_product_in_the_cut_that_is_asked_for(runner, cut):
    a, b = operands((800, 72), (3, 72, 520), torch.bfloat16)
    with runner.running():
        a, b, offs = (t.to(runner.device) for t in (a, b, ENDS))
        with cuda.launches(a) as stream:
            by_itself = cuda.gemm(stream, a, b, offs, 800, first=True)
            asked_for = cuda.gemm(stream, a, b, offs, 800, cut=cut, first=True)
        if runner.device == "cpu":
            columns, blocks = cut
            assert f", {columns}, " in runners.launches.kernels[-1]
            assert runners.launches.log[-1]["cluster"][0] == blocks
        assert torch.equal(by_itself, asked_for), "a cut changes no sum's order"


@pytest.mark.parametrize("runner", params(CudaPtx(arch=90)))
@pytest.mark.parametrize("cut", [(256, 1), (256, 2), (128, 1)])
def test_a_weight_gradient_in_the_cut_that_is_asked_for(runner, cut):
    a, b = operands((800, 256), (800, 520), torch.bfloat16)
    with runner.running():
        a, b, offs = (t.to(runner.device) for t in (a, b, ENDS))
        with cuda.launches(a) as stream:
            by_itself = cuda.wgrad(stream, a, b, offs, first=True)
            asked_for = cuda.wgrad(stream, a, b, offs, cut=cut, first=True)
        if runner.device == "cpu":
            assert runners.launches.log[-1]["cluster"][0] == cut[1]
        assert torch.equal(by_itself, asked_for), "a cut changes no sum's order"


@pytest.mark.parametrize("runner", params(CudaPtx(arch=90)))
@pytest.mark.parametrize("cut", [(96, 1), (128, 2), (256, 3)])
def test_a_cut_that_there_is_not_is_refused(runner, cut):
    a, b = operands((800, 72), (3, 72, 520), torch.bfloat16)
    with runner.running():
        a, b, offs = (t.to(runner.device) for t in (a, b, ENDS))
        with cuda.launches(a) as stream, pytest.raises(RuntimeError, match="grouped_gemm: invalid argument"):
            cuda.gemm(stream, a, b, offs, 800, cut=cut, first=True)


@pytest.mark.parametrize("runner", params(CudaPtx(arch=80), CudaPtx(arch=90)))
@pytest.mark.parametrize("cut", [(128, 1), (0, 2)])
def test_a_cut_is_refused_where_its_kernels_cannot_run(runner, cut):
    """On another architecture, and where TMA cannot address an operand: it would be timed as what it is not."""
    a, b = operands((800, 71), (3, 71, 520), torch.bfloat16)
    if isinstance(runner, CudaPtx) and runner.arch == 80:
        a, b = operands((800, 72), (3, 72, 520), torch.bfloat16)
    with runner.running():
        a, b, offs = (t.to(runner.device) for t in (a, b, ENDS))
        with cuda.launches(a) as stream:
            for run in (cuda.gemm, cuda.wgrad):
                operand, sizes = (b, (800,)) if run is cuda.gemm else (a, ())
                with pytest.raises(RuntimeError, match="not supported"):
                    run(stream, a, operand, offs, *sizes, cut=cut, first=True)
