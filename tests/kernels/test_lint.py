"""The machine code of every kernel against the faults `h100model` knows: serialised products, synchronous loads,
spills, accesses before a dependent launch has waited. Skipped where that folder is not beside ptxrun."""

import os
import subprocess
import sys

import pytest

from tests import ptxrun_support

TOOL = ptxrun_support.folder().parent / "h100model"
KNOWN = (
    "router_fwd:synchronous loads",  # one iteration loads all of D: there is none before it to load during
    "router_bwd:synchronous loads",  # a short loop of small products, on operands that are made in registers
    "router_bwd:barriers",
)


@pytest.mark.skipif(not (TOOL / "h100model").is_dir(), reason=f"no h100model in {TOOL}")
def test_no_kernel_has_a_known_fault():
    allowed = [option for fault in KNOWN for option in ("--allow", fault)]
    command = [sys.executable, "-m", "h100model", "lint", "--backend", "triton", "--tokens", "64,1024,4096", *allowed]
    root = ptxrun_support.REPOSITORY
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(TOOL)])}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
