"""The GPU path's tests see what they are there for: with a fault planted in a launcher they fail, and say why.

Below smopcuda only: on a GPU such a fault may go unseen for a long time.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu_path.plant import FAULTS
from tests.gpu_path.problems import STAND_IN

REPOSITORY = Path(__file__).resolve().parents[2]
WRONG_NUMBERS = r"is off by"
WRONG_DEVICE = r"out of bounds|belongs to device|illegal memory access|invalid resource handle|invalid device"
LATE, TWO, LATE_COPIES = ["--streams", "late"], ["--devices", "2"], ["--mode", "late", "--strict"]
SIDE_STREAM = "test_streams.py::test_side_stream"
ONE_THEN_THE_OTHER = "test_two_devices.py::test_one_device_after_the_other"
OTHER_DEVICE = "test_two_devices.py::test_the_current_device_is_another_one"

# fault: (tests that must see it, smopcuda's options, what their failures say)
SEEN_BY = {
    "triton_on_the_default_stream": (SIDE_STREAM, LATE, WRONG_NUMBERS),
    "cuda_on_the_default_stream": (SIDE_STREAM, LATE, WRONG_NUMBERS),
    "triton_without_device_guard": (OTHER_DEVICE, TWO, WRONG_DEVICE),
    "cuda_without_device_guard": (OTHER_DEVICE, TWO, WRONG_DEVICE),
    "triton_forgets_the_device": (ONE_THEN_THE_OTHER, TWO, r"dynamic shared memory; allowed are"),
    "triton_without_copy_waits": (
        "test_numbers.py::test_dtypes",
        LATE_COPIES,
        r"uninitiali[sz]ed|never written|is off by",
    ),
    "triton_ignores_alignment": ("test_numbers.py::test_an_input_that_begins_anywhere", [], r"not a multiple of 16"),
}


def test_every_fault_is_tried():
    assert SEEN_BY.keys() == FAULTS.keys()


@pytest.mark.gpu
@pytest.mark.skipif(not STAND_IN, reason="faults are planted below smopcuda only")
@pytest.mark.parametrize("fault", SEEN_BY)
def test_the_suite_sees(fault, tmp_path):
    test, options, says = SEEN_BY[fault]
    env = os.environ | {"LLAMA_SMOP_PLANT": fault, "LLAMA_SMOP_GPU_PATH_BACKENDS": fault.split("_")[0]}
    if fault == "triton_without_copy_waits":
        env["TRITON_CACHE_DIR"] = str(tmp_path)  # its kernels are for nobody else
    command = [
        sys.executable, "-m", "smopcuda", *options,
        "pytest", "-p", "tests.gpu_path.plant", "-rf", "--show-capture=no", f"tests/gpu_path/{test}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1, f"{fault} goes unseen:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    reasons = re.findall(r"^E  +(.*)", done.stdout, re.MULTILINE)
    assert any(re.search(says, line) for line in reasons), f"{fault} is taken for something else:\n" + "\n".join(
        reasons
    )
