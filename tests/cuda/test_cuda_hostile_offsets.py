"""The CUDA kernels under an `offs` that names rows which do not exist, or the same rows twice."""

import pytest
import torch

from llama_smop.ops.self_check import Model, make
from tests.cuda.runners import CudaPtx, params
from tests.kernels.hostile_offsets import BEYOND, SENSELESS, products, project

# Multiples of 8: TMA and gathering copies on sm_90. Two SMs: persistent blocks walk many tiles.
MODEL = Model(24, 40, 32, E=4, K=2, sharing="JEJR")
RUNNERS = params(CudaPtx(arch=80), CudaPtx(arch=90), CudaPtx(arch=90, sms=2))


@pytest.mark.parametrize("runner", RUNNERS)
def test_offsets_beyond_the_rows_are_clamped(runner):
    inputs = make(MODEL, 20, seed=1).to(runner.device)
    with runner.running():
        for offs in BEYOND:
            clamped = [min(end, 40) for end in offs]
            got, wanted = (project(runner.module, MODEL, inputs, ends) for ends in (offs, clamped))
            for result in wanted:
                assert torch.equal(got[result], wanted[result]), f"{result} for offs {offs}"
            for one, other in zip(
                *(products(runner.module, ends, runner.device, MODEL.dtype) for ends in (offs, clamped)), strict=True
            ):
                assert torch.equal(one, other)


@pytest.mark.parametrize("runner", RUNNERS)
def test_senseless_offsets_stay_inside_the_tensors(runner):
    inputs = make(MODEL, 20, seed=2).to(runner.device)
    with runner.running():
        for offs in SENSELESS:
            project(runner.module, MODEL, inputs, offs)
            products(runner.module, offs, runner.device, MODEL.dtype)
