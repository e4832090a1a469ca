"""Children end when their parent is killed; work is shared out over them."""

import os
import subprocess
import sys
import time

import pytest

from llama_smop.system.processes import WorkerLost, unordered

CHILD = (
    "import sys, time; from llama_smop.system.processes import exit_with_parent; "
    "exit_with_parent(int(sys.argv[1])); print('started', flush=True); time.sleep(60)"
)
PARENT = (
    "import os, subprocess, sys, time; "
    "child = subprocess.Popen([sys.executable, '-c', sys.argv[1], str(os.getpid())], stdout=sys.stdout); "
    "print(child.pid, flush=True); time.sleep(60)"
)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"


def test_a_child_ends_when_its_parent_is_killed():
    with subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        assert parent.stdout.readline().strip() == "started"
        assert is_running(child)
        parent.kill()
    end = time.monotonic() + 20
    while is_running(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_running(child), "the child outlived its parent"


def test_a_worker_that_ends_is_told():
    assert list(unordered(abs, [-1, 2], 0)) == [1, 2]
    with pytest.raises(WorkerLost):
        list(unordered(os._exit, [3], 1))
