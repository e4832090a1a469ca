"""On a GPU: the small chain under compute-sanitizer."""

import shutil
import subprocess
import sys

import pytest

from tests.cuda import extension
from tests.cuda.runners import gpu_reason

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(gpu_reason() is not None, reason=str(gpu_reason()))]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_few_tokens_under_the_sanitizer(tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer: it comes with the CUDA toolkit")
    chain = "tests/cuda/test_cuda_chain.py::test_few_tokens_and_one_busy_expert[dedr-relu-gpu]"
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", chain]
    done = subprocess.run(command, cwd=extension.REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
