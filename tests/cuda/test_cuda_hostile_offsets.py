"""The CUDA kernels under a schedule that names rows which do not exist, or the same rows twice."""

import pytest

from tests.cuda.runners import CudaPtx, params
from tests.kernels.hostile_offsets import assert_clamped, assert_inside, assert_inside_for_any_order

RUNNERS = params(CudaPtx(arch=80), CudaPtx(arch=90), CudaPtx(arch=90, sms=2))  # on two SMs persistent blocks walk tiles


@pytest.mark.parametrize("runner", RUNNERS)
def test_offsets_beyond_the_rows_are_clamped(runner):
    assert_clamped(runner)


@pytest.mark.parametrize("runner", RUNNERS)
def test_senseless_offsets_stay_inside_the_tensors(runner):
    assert_inside(runner)


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_senseless_order_stays_inside_the_tensors(runner):
    assert_inside_for_any_order(runner)
