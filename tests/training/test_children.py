"""The processes that tests start: none sees a GPU, none outlives a failure, none hangs."""

import os
import sys
import time

import pytest

from tests.training import children

pytestmark = pytest.mark.xdist_group("ranks")


def report_what_is_visible() -> None:
    sys.exit(os.environ["CUDA_VISIBLE_DEVICES"] != "")


def fail_in_the_first() -> None:
    if os.environ["RANK"] == "0":
        sys.exit(3)
    time.sleep(600)


def test_they_see_no_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert children.run(report_what_is_visible) == 0
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"


def test_one_that_fails_ends_the_others():
    with pytest.raises(AssertionError, match=r"\[3, -9\]"):
        children.ranks(fail_in_the_first, 2)


def test_so_does_one_that_failed_before_anyone_waited():
    failed, other = children.start(sys.exit, 3), children.start(time.sleep, 600)
    while failed.is_alive():
        time.sleep(0.01)
    children.join([failed, other])
    assert (failed.exitcode, other.exitcode) == (3, -9)


def test_one_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(children, "LIMIT_S", 1)
    assert children.run(time.sleep, 600) == -9
