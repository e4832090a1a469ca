"""The kernel backends. One that cannot run is skipped by name; below smopcuda, which serves both, that is an error."""

import os

import pytest
import torch

from llama_smop.ops import dispatch
from tests.gpu_path.problems import STAND_IN


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        wanted = os.environ.get("LLAMA_SMOP_GPU_PATH_BACKENDS", "triton,cuda").split(",")
        metafunc.parametrize("backend", wanted, indirect=True)


@pytest.fixture
def backend(request) -> str:
    """The name of a kernel backend that runs on this GPU."""
    name = request.param
    if torch.cuda.is_available():
        reason = dispatch.unsupported(name, torch.bfloat16, torch.device("cuda"), 2, 4)
        if reason is not None:
            (pytest.fail if STAND_IN else pytest.skip)(f"{name}: {reason}")
    return name
