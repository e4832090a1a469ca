"""The Triton kernels under a schedule that names rows which do not exist, or the same rows twice."""

import pytest

from tests.kernels.compare import skip_unless_served
from tests.kernels.hostile_offsets import MODEL, assert_clamped, assert_inside, assert_inside_for_any_order
from tests.kernels.runners import triton_params


@pytest.mark.parametrize(("runner", "name"), triton_params(("rows", 80, 90)))
def test_offsets_beyond_the_rows_are_clamped(runner, name):
    skip_unless_served(runner, MODEL)
    assert_clamped(runner)


@pytest.mark.parametrize(("runner", "name"), triton_params(("rows", 80, 90)))
def test_senseless_offsets_stay_inside_the_tensors(runner, name):
    skip_unless_served(runner, MODEL)
    assert_inside(runner)


@pytest.mark.parametrize(("runner", "name"), triton_params(("rows", 80, 90)))
def test_a_senseless_order_stays_inside_the_tensors(runner, name):
    skip_unless_served(runner, MODEL)
    assert_inside_for_any_order(runner)
