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
    "grouped_gemm:barriers",  # four where operands come by TMA, all while the product before is under way
)


# The tool knows the modules of the kernels' chain by earlier names.
RUN = """
import runpy, sys
import tests.kernels
from llama_smop import ops
from llama_smop.ops import self_check
from llama_smop.ops.backends import cuda
from llama_smop.triton_kernels import projection

for package, name, module in (
    (ops, "backend_triton", projection), (ops, "backend_cuda", cuda), (tests.kernels, "cases", self_check)
):
    setattr(package, name, module)
    sys.modules[f"{package.__name__}.{name}"] = module
runpy.run_module("h100model", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow  # test_compile.py looks for spills and waits of the largest kernels
@pytest.mark.skipif(not (TOOL / "h100model").is_dir(), reason=f"no h100model in {TOOL}")
def test_no_kernel_has_a_known_fault():
    allowed = [option for fault in KNOWN for option in ("--allow", fault)]
    command = [sys.executable, "-c", RUN, "lint", "--backend", "triton", "--tokens", "64,1024,4096", *allowed]
    root = ptxrun_support.REPOSITORY
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(TOOL)])}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
