"""What the kernels serve, and on which device."""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton

from . import launch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_EXPERTS = 128
OLDEST_ARCH = 80

_served: dict[tuple, None] = {}  # (driver, device) found good: asking a driver takes longer than a launch


def unsupported(
    dtype: torch.dtype, device: torch.device, top_k: int, num_experts: int, gated: bool = False
) -> str | None:
    """One line on why the kernels cannot serve these arguments, or None when they can."""
    if dtype not in DTYPES:
        return f"the Triton backend computes in float32, bfloat16 and float16, got {dtype}"
    if not 1 <= num_experts <= MAX_EXPERTS:
        return f"the Triton backend takes 1 to {MAX_EXPERTS} experts, got {num_experts}"
    try:
        driver = None if launch.INTERPRETED else triton.runtime.driver.active
        if (driver, device) in _served:
            return None
        with _made_current(torch.device(device)):
            driven, arch = launch.device_type(), launch.target_arch()
    except Exception as error:  # a missing driver, compiler or header: each is raised as something else
        return f"Triton cannot drive a GPU here ({type(error).__name__}: {' '.join(str(error).split())})"
    if torch.device(device).type != driven:
        return f"Triton drives {driven!r} devices here, got {device}"
    if not isinstance(arch, int):
        return f"the Triton backend is tuned for NVIDIA GPUs, got {arch}"
    if arch < OLDEST_ARCH:
        return f"the Triton backend needs compute capability 8.0 or newer, got {arch / 10}"
    if device.type != "cuda" or device.index is not None:
        _served[driver, device] = None
    return None


def _made_current(device: torch.device) -> AbstractContextManager:
    """Triton is asked about the current device: make it this one."""
    index = device.index if device.type == "cuda" else None
    elsewhere = index is not None and index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else nullcontext()
