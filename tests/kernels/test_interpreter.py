"""The kernels under Triton's interpreter, so that the repository alone is enough to test them: float32 and float16.

Triton reads TRITON_INTERPRET when a kernel is decorated, hence another process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ptxrun_support

HERE = Path(__file__).parent
# The interpreter takes a second where PTX takes a hundredth, and nothing is compiled for one call there.
SOME = "jejr-gelu and matches or grouped_mm and not compiled_for_one_call"
MORE = "few_tokens or jejr-gelu and padding or compiled_for_one_call"


WITH_PTX = pytest.mark.slow if ptxrun_support.missing() is None else ()  # the kernels run there, and quicker


@pytest.mark.parametrize("which", (pytest.param(SOME, marks=WITH_PTX), pytest.param(MORE, marks=pytest.mark.slow)))
def test_the_same_tests_pass_when_interpreted(which):
    command = [sys.executable, "-m", "pytest", "-k", which, HERE / "test_chain.py", HERE / "test_grouped_mm.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
