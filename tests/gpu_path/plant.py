"""Faults planted on purpose: `pytest -p tests.gpu_path.plant` with LLAMA_SMOP_PLANT=NAME breaks a launcher.

Each is a mistake that once could be made: what the planted suite reports is what the mistake would look like.
A fault that finds nothing to break, because the code it knew is gone, is an error of the whole run.
"""

import contextlib
import os
import re
import sys
import types


def triton_on_the_default_stream() -> None:
    """Triton's kernels are launched on stream 0, whatever the current stream is."""
    import triton

    driver = triton.runtime.driver.active
    assert callable(driver.get_current_stream)
    driver.get_current_stream = lambda device: 0


def triton_without_device_guard() -> None:
    """Triton's kernels are launched on the current device, wherever their tensors are."""
    _run_operators_on_the_current_device()


def triton_without_copy_waits() -> None:
    """Triton's kernels read shared memory before its asynchronous copies have arrived."""
    _edit_ptx(r"^\s*cp\.async\.wait_group [^;]*;\s*$")


def triton_ignores_alignment() -> None:
    """The table of compiled kernels takes every address for what the first one was."""
    from llama_smop.triton_kernels import launch

    launch.misalignment = lambda address: 0


def triton_forgets_the_device() -> None:
    """The table of compiled kernels hands out what was made ready on another device."""
    from llama_smop.triton_kernels import launch

    class Forgetful(dict):
        def _key(self, key: tuple) -> tuple:
            assert type(key[1]) is int, f"the device is not where it was: {key}"
            return (key[0], *key[2:])

        def get(self, key, default=None):
            return super().get(self._key(key), default)

        def __setitem__(self, key, value):
            super().__setitem__(self._key(key), value)

    assert isinstance(launch._compiled, dict)
    launch._compiled = Forgetful()


def cuda_on_the_default_stream() -> None:
    """The extension's kernels are launched on stream 0."""
    _wrap_extension(lambda function, arguments: function(**(arguments | {"stream": 0})))


def cuda_without_device_guard() -> None:
    """The extension launches on the current device, with the stream of the device of its tensors."""
    from llama_smop.ops.backends import cuda

    _run_operators_on_the_current_device()
    initialise = cuda.launches.__init__

    def unguarded(self, tensor) -> None:
        initialise(self, tensor)
        assert hasattr(self, "guard")
        self.guard = contextlib.nullcontext()

    cuda.launches.__init__ = unguarded


def _run_operators_on_the_current_device() -> None:
    from llama_smop.ops import layer, operator

    for module in (operator, layer):
        assert callable(module.on_its_device)
        module.on_its_device = lambda function, *args: function(*args)


def _wrap_extension(call) -> None:
    """Every launch of `llama_smop._C`, which is one that takes a stream, goes through `call`."""
    from llama_smop import _C

    def launches(function):
        return lambda **arguments: call(function, arguments) if "stream" in arguments else function(**arguments)

    wrapped = types.ModuleType(_C.__name__)
    for name in dir(_C):
        value = getattr(_C, name)
        with_stream = callable(value) and "stream" in (value.__doc__ or "")
        setattr(wrapped, name, launches(value) if with_stream else value)
    assert any(getattr(wrapped, name) is not getattr(_C, name) for name in dir(_C)), "no function takes a stream"
    sys.modules["llama_smop._C"] = wrapped


def _edit_ptx(line: str) -> None:
    """Kernels are compiled without the lines of PTX that match; TRITON_CACHE_DIR must be a folder for this alone."""
    from triton.backends.nvidia.compiler import CUDABackend

    make, found = CUDABackend.make_ptx, []

    def edited(self, *args):
        text, number = re.subn(line, "", make(self, *args), flags=re.MULTILINE)
        found.append(number)
        return text

    def check(session) -> None:
        assert sum(found), "no kernel has such a line"

    CUDABackend.make_ptx = edited
    _afterwards.append(check)


_afterwards: list = []
FAULTS = {
    name: value
    for name, value in list(globals().items())
    if isinstance(value, types.FunctionType) and value.__doc__ and not name.startswith("_")
}


def pytest_sessionstart() -> None:
    FAULTS[os.environ["LLAMA_SMOP_PLANT"]]()


def pytest_sessionfinish(session) -> None:
    for check in _afterwards:
        check(session)
