"""What a machine cannot run is skipped, with the reason; what many test files need is made once.

No test but those of `trust` checks a backend at its first use, or writes the user's cache.
"""

import fcntl
import os
import signal
from pathlib import Path

import pytest
import torch

os.environ["LLAMA_SMOP_CHECK"] = "0"

# A suite that was started in the background ignores these, and so would the processes that tests start and signal.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


def pytest_collection_modifyitems(config, items):
    slow_asked_for = "slow" in (config.option.markexpr or "")
    # The longest first, so that no process waits for another at the end.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("slow") and not slow_asked_for:
            item.add_marker(pytest.mark.skip(reason="slow; run by make test-slow, or with -m slow"))


@pytest.fixture(scope="session")
def shared_corpus(tmp_path_factory, request) -> Path:
    """Sixteen generated clips, twelve of them to train on, made once for all test processes. Not to be written to."""
    pytest.importorskip("espeakng_loader")
    from llama_smop.data.synthetic.corpus import make_corpus

    own = tmp_path_factory.getbasetemp()
    common = own.parent if hasattr(request.config, "workerinput") else own  # pytest-xdist: one folder a process
    with open(common / "shared_corpus.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return make_corpus(common / "shared_corpus", clips=16, seed=3, progress=False, workers=1)
