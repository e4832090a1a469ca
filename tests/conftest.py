"""What a machine cannot run is skipped, with the reason: tests of a GPU without one, slow tests unless asked for.

No test but those of `trust` checks a backend at its first use, or writes the user's cache.
"""

import os

import pytest
import torch

os.environ["LLAMA_SMOP_CHECK"] = "0"


def pytest_collection_modifyitems(config, items):
    slow_asked_for = "slow" in (config.option.markexpr or "")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("slow") and not slow_asked_for:
            item.add_marker(pytest.mark.skip(reason="slow; run with -m slow"))
