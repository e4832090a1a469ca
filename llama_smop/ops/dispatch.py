"""Which backend computes an operator.

`"auto"` asks, on a GPU, for the CUDA extension (where a doctor has found it right and not slower), then Triton (where
its first use was right), then PyTorch: see `trust`. On a CPU it is always PyTorch. An explicit choice that cannot run
is an error that says why, never a silent fallback.
"""

import logging
from functools import cache
from importlib import import_module
from typing import cast

import torch

from llama_smop.ops import trust
from llama_smop.ops.backend import Backend

MODULES = {  # from this package, which may have been copied under another name
    "torch": ".backends.torch",
    "triton": "..triton_kernels.projection",
    "cuda": ".backends.cuda",
}
BACKENDS = tuple(MODULES)
BACKENDS_BY_SPEED = "cuda", "triton", "torch"
logger = logging.getLogger(__name__)


@cache
def module(name: str) -> Backend:
    """The backend `name`. Raises ImportError, with the remedy, where something it needs is not installed."""
    try:
        return cast(Backend, import_module(MODULES[name], __package__))
    except ImportError as error:
        if name != "triton":
            raise
        raise ImportError(f"the Triton backend needs triton ({error}); pip install 'llama-smop[gpu]'") from error


def unsupported(
    name: str, dtype: torch.dtype, device: torch.device, top_k: int, num_experts: int, gated: bool = False
) -> str | None:
    """One line on why backend `name` cannot serve these arguments, or None when it can."""
    try:
        backend = module(name)
    except ImportError as error:
        return str(error)
    return backend.unsupported(dtype, device, top_k, num_experts, gated)


def _auto_candidates(device: torch.device) -> tuple[str, ...]:
    if device.type == "cpu":
        return ("torch",)
    return ("cuda", "torch") if device.type == "cuda" and _triton_fails(device) else BACKENDS_BY_SPEED


@cache  # asked once: a driver that fails takes its time to
def _triton_fails(device: torch.device) -> bool:
    """Whether Triton serves nothing on this GPU; why is logged."""
    reason = unsupported("triton", torch.float32, device, 1, 1)
    if reason is not None:
        logger.warning('backend="auto" does without Triton on %s: %s', device, reason)
    return reason is not None


def _first_use(name: str, dtype: torch.dtype, device: torch.device, top_k: int, num_experts: int) -> bool:
    if name == "cuda":  # before it is imported: it may not be built
        return trust.approved_by_doctor(name, dtype, device)
    if unsupported(name, dtype, device, top_k, num_experts) is not None:
        return False
    return trust.checked(name, module(name), dtype, device)


def resolve(
    backend: str, dtype: torch.dtype, device: torch.device, top_k: int = 1, num_experts: int = 1, gated: bool = False
) -> str:
    """The name of the backend that will run.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend was asked for by name and cannot run.
    """
    if backend == "auto":
        for name in _auto_candidates(device):
            trusted = name == "torch" or trust.known.get((name, dtype, device))
            if trusted is None:
                trusted = _first_use(name, dtype, device, top_k, num_experts)
            if trusted and unsupported(name, dtype, device, top_k, num_experts, gated) is None:
                return name
        raise RuntimeError(f"no backend can serve dtype {dtype} on device {device}")
    if backend not in BACKENDS:
        check_backend(backend)
    try:
        reason = module(backend).unsupported(dtype, device, top_k, num_experts, gated)
    except ImportError as error:
        reason = str(error)
    if reason is not None:
        raise RuntimeError(f'backend="{backend}" cannot run: {reason}; backend="auto" picks one that can')
    return backend


# Under torch.compile the choice is made once, while tracing. torch.compiler.assume_constant_result does just this,
# but importing it imports the whole compiler: half of the import time of this package.
vars(resolve)["_dynamo_marked_constant"] = True


def check_backend(backend: str) -> None:
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f'backend must be "auto" or one of {BACKENDS}, got {backend!r}')
