"""Which backend computes an operator, and the checks every operator makes before anything is launched.

A backend is a module of `backends` with the same functions (see `backends.torch`), plain tensors in and out.
`"auto"` asks, on a GPU, for the CUDA extension (once it has been verified on hardware), then Triton, then PyTorch; on
a CPU it is always PyTorch. An explicit choice that cannot run is an error that says why, never a silent fallback.
"""

import logging
import os
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

BACKENDS = ("torch", "triton", "cuda")
ACTIVATIONS = ("relu", "gelu", "silu")
FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
logger = logging.getLogger(__name__)


@cache
def module(name: str) -> ModuleType:
    return import_module(f"llama_smop.ops.backends.{name}")


def unsupported(name: str, dtype: torch.dtype, device: torch.device, top_k: int, num_experts: int) -> str | None:
    """One line on why backend `name` cannot serve these arguments, or None when it can."""
    try:
        backend = module(name)
    except ImportError as error:
        return str(error)
    return backend.unsupported(dtype, device, top_k, num_experts)


def _auto_candidates(device: torch.device) -> tuple[str, ...]:
    if device.type == "cpu":
        return ("torch",)
    try:
        verified = module("cuda").VERIFIED_ON_GPU
    except ImportError:
        verified = False
    names = ("cuda", "triton", "torch") if verified else ("triton", "torch")
    if device.type == "cuda" and _triton_fails(device):
        names = tuple(name for name in names if name != "triton")
    return names


@cache  # asked once: a driver that fails takes its time to
def _triton_fails(device: torch.device) -> bool:
    """Whether Triton serves nothing on this GPU; why is logged."""
    reason = unsupported("triton", torch.float32, device, 1, 1)
    if reason is not None:
        logger.warning('backend="auto" does without Triton on %s: %s', device, reason)
    return reason is not None


@torch.compiler.assume_constant_result  # under torch.compile the choice is made once, while tracing
def resolve(backend: str, dtype: torch.dtype, device: torch.device, top_k: int = 1, num_experts: int = 1) -> str:
    """The name of the backend that will run.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend was asked for by name and cannot run.
    """
    if backend == "auto":
        for name in _auto_candidates(device):
            if unsupported(name, dtype, device, top_k, num_experts) is None:
                return name
        raise RuntimeError(f"no backend can serve dtype {dtype} on device {device}")
    check_backend(backend)
    reason = unsupported(backend, dtype, device, top_k, num_experts)
    if reason is not None:
        raise RuntimeError(f'backend="{backend}" cannot run: {reason}; backend="auto" picks one that can')
    return backend


def check_backend(backend: str) -> None:
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f'backend must be "auto" or one of {BACKENDS}, got {backend!r}')


def debug() -> bool:
    """Whether values on a GPU are checked too, at the price of a synchronisation (LLAMA_SMOP_DEBUG=1)."""
    return os.environ.get("LLAMA_SMOP_DEBUG", "0") not in ("", "0")


def values_are_checked(device: torch.device) -> bool:
    return device.type == "cpu" or debug()


def check_in_range(name: str, ids: Tensor, low: int, high: int) -> None:
    """Raise IndexError unless every id lies in [low, high]; on a GPU only under LLAMA_SMOP_DEBUG=1."""
    if ids.numel() and values_are_checked(ids.device):
        smallest, largest = int(ids.min()), int(ids.max())
        if smallest < low or largest > high:
            raise IndexError(f"{name} must lie in [{low}, {high}], got values from {smallest} to {largest}")


def check_shape(name: str, tensor: Tensor, shape: tuple) -> None:
    """Raise ValueError unless `tensor` has `shape`; a string in `shape` names a size that may be anything."""
    have = tensor.shape
    fits = len(have) == len(shape)
    if fits:
        for h, wanted in zip(have, shape):  # noqa: B905
            fits = fits and (isinstance(wanted, str) or h == wanted)
    if not fits:
        expected = "(" + ", ".join(str(s) for s in shape) + ("," if len(shape) == 1 else "") + ")"
        raise ValueError(f"{name} must have shape {expected}, got {tuple(have)}")


def check_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}")


def check_integer(name: str, tensor: Tensor) -> None:
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must be an integer tensor, got {tensor.dtype}")


def check_mask(mask: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, True = real token, got {mask.dtype}")


def check_like(reference_name: str, reference: Tensor, **tensors: Tensor | None) -> None:
    """Raise unless every given tensor shares the dtype and the device of `reference`."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype != reference.dtype:
            raise TypeError(f"{name} must have {reference_name}'s dtype {reference.dtype}, got {tensor.dtype}")
        check_device(reference_name, reference, **{name: tensor})


def check_device(reference_name: str, reference: Tensor, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != reference.device:
            raise ValueError(f"{name} must be on {reference_name}'s device {reference.device}, got {tensor.device}")


def check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
