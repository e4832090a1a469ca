"""The suite runs as the Makefile means it to."""

import os

import pytest


@pytest.mark.xdist_group("suite")
def test_tests_of_a_group_run_in_one_process(request):
    """pytest-xdist deals out by the name's end; without it, each process makes the fixtures of every group."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.skip("one process runs all tests")
    if not request.config.getoption("loadgroup", False):
        pytest.skip("--dist is not loadgroup")
    assert request.node.nodeid.endswith("@suite"), "this pytest and this pytest-xdist do not fit: groups are ignored"
