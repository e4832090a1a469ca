"""Checks of arguments: each error is one line that names the argument. Nothing here reads a value on a GPU, except
under LLAMA_SMOP_DEBUG=1."""

import math
import os
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

ACTIVATIONS = ("relu", "gelu", "silu")
# Names of gated experts' activations (Shazeer, "GLU Variants Improve Transformer", 2020) -> what the gate goes through.
GATED = {"reglu": "relu", "geglu": "gelu", "swiglu": "silu"}
_GATED_NAMES = {activation: name for name, activation in GATED.items()}
RECOMPUTE = ("none", "h", "z", "hz")
SHARINGS = ("JEJR", "JEDR", "DEDR")
FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGER_DTYPES = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)

Shape = str | tuple[str | int, ...]


def are_tensors(**given: Any) -> None:
    """Raise TypeError for a list, an array, a number or None among the arguments."""
    for name, value in given.items():
        if not isinstance(value, Tensor):
            made = "" if value is None else f"; torch.as_tensor({name}) makes one"
            raise TypeError(f"{name} must be a tensor, got {_kind(value)}{made}")


def are_tensors_or_none(**given: Any) -> None:
    for name, value in given.items():
        if value is not None and not isinstance(value, Tensor):
            are_tensors(**{name: value})


def _kind(value: Any) -> str:
    kind = type(value)
    return "None" if value is None else f"{kind.__module__}.{kind.__name__}".removeprefix("builtins.")


def whole(least: int, **given: Any) -> None:
    """Raise ValueError unless each is a whole number of at least `least`."""
    for name, value in given.items():
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise ValueError(f"{name} must be a whole number, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def active_experts(top_k: int, num_experts: int) -> None:
    if isinstance(top_k, bool) or not hasattr(top_k, "__index__") or not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must lie in [1, num_experts] = [1, {num_experts}], got {top_k!r}")


def true_or_false(**given: Any) -> None:
    for name, value in given.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")


def epsilon(eps: float) -> None:
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps < math.inf:
        raise ValueError(f"eps must be a number of at least 0, got {eps!r}")


def tensors(*expected: tuple[str, Tensor | None, Shape]) -> dict[str, int]:
    """Check (name, tensor, shape) in turn, None passing: shapes, and that all share the first one's device.

    A shape is a string of letters, or a tuple of letters and sizes. The first tensor that uses a letter decides its
    size: `tensors(("x", x, "TD"), ("w1", w1, "XHD"))`.

    Returns:
        The size of each letter.

    Raises:
        ValueError: a tensor has another shape or device.
    """
    sizes: dict[str, int] = {}
    device = None
    for name, tensor, shape in expected:
        if tensor is None:
            continue
        known, have = len(sizes), tensor.shape
        fits = len(have) == len(shape)
        if fits:
            for wanted, size in zip(shape, have):  # noqa: B905
                fits = fits and size == (sizes.setdefault(wanted, size) if type(wanted) is str else wanted)
        if not fits:
            raise _misshapen(name, tensor, shape, dict(list(sizes.items())[:known]))
        device = device or tensor.device
        if tensor.device != device:
            raise ValueError(f"{name} must be on {expected[0][0]}'s device {device}, got {tensor.device}")
    return sizes


def _misshapen(name: str, tensor: Tensor, shape: Shape, sizes: dict[str, int]) -> ValueError:
    wanted = ", ".join(str(sizes.get(s, s) if isinstance(s, str) else s) for s in shape)
    return ValueError(f"{name} must have shape ({wanted}{',' if len(shape) == 1 else ''}), got {tuple(tensor.shape)}")


def same_float(reference_name: str, reference: Tensor, **tensors: Tensor | None) -> None:
    """Raise TypeError unless `reference` is floating point and all other tensors have its dtype."""
    dtype = reference.dtype
    if dtype not in FLOAT_DTYPES:
        floating(**{reference_name: reference})
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(
                f"{name} must have {reference_name}'s dtype {dtype}, got {tensor.dtype}; convert one with .to(dtype), "
                "or compute under torch.autocast"
            )


def floating(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}")


def integer(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in INTEGER_DTYPES:
        raise TypeError(f"{name} must be an integer tensor, got {tensor.dtype}")


def token_ids(modality: Tensor | None, mask: Tensor | None) -> None:
    """Raise TypeError unless `modality` is an integer tensor and `mask` a bool one."""
    if modality is not None and modality.dtype not in INTEGER_DTYPES:
        integer("modality", modality)
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, True = real token, got {mask.dtype}")


def layout(sharing: str, num_experts: int) -> tuple[int, int]:
    """(routers R, experts in all X) of a sharing: joint or disjoint experts (JE, DE) and routers (JR, DR)."""
    if sharing not in SHARINGS:
        raise ValueError(f"sharing must be one of {SHARINGS}, got {sharing!r}")
    return (1 if sharing == "JEJR" else 2), (2 * num_experts if sharing == "DEDR" else num_experts)


def options(activation: str, recompute: str | int) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    if recompute not in RECOMPUTE and not (type(recompute) is int and recompute >= 0):
        raise ValueError(f"recompute must be one of {RECOMPUTE} or a number of bytes to keep, got {recompute!r}")


def expert_activation(activation: str, gated: bool) -> str:
    """The name that the operators know: `activation` itself, or that of its gated form."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {ACTIVATIONS} (gated experts: with gated=True), got {activation!r}"
        )
    return _GATED_NAMES[activation] if gated else activation


def routing_weights(normalize: bool, scale: float) -> None:
    if not isinstance(normalize, bool):
        raise ValueError(f"normalize_weights must be True or False, got {normalize!r}")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale) or scale <= 0:
        raise ValueError(f"weight_scale must be a number above 0, got {scale!r}")


def debug() -> bool:
    """Whether values on a GPU are checked too, at the price of a synchronisation (LLAMA_SMOP_DEBUG=1)."""
    return os.environ.get("LLAMA_SMOP_DEBUG", "0") not in ("", "0")


def values_are_checked(device: torch.device) -> bool:
    return device.type == "cpu" or debug()


def in_range(name: str, ids: Tensor, low: int, high: int) -> None:
    """Raise IndexError unless every id lies in [low, high]; on a GPU only under LLAMA_SMOP_DEBUG=1."""
    if ids.numel() and (ids.device.type == "cpu" or debug()):
        smallest, largest = int(ids.min()), int(ids.max())
        if smallest < low or largest > high:
            raise IndexError(f"{name} must lie in [{low}, {high}], got values from {smallest} to {largest}")


def cumulative(name: str, ends: Tensor, rows: int) -> None:
    """Raise IndexError unless `ends` rises from 0 to at most `rows`; on a GPU only under LLAMA_SMOP_DEBUG=1."""
    if ends.numel() and values_are_checked(ends.device):
        values = ends.tolist()
        if values[0] < 0 or values[-1] > rows or any(a > b for a, b in pairwise(values)):
            shown = f"{values[:8]}{'…' if len(values) > 8 else ''}"
            raise IndexError(f"{name} must rise from 0 to at most {rows}, got {shown}")
