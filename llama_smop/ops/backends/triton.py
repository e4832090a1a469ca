"""The operators on Triton: the functions of `backends.torch`, computed by the kernels of `llama_smop.triton_kernels`.

float32 (IEEE or TF32, following `torch.backends.cuda.matmul.fp32_precision`), bfloat16 and float16. The device is
whichever Triton drives. No host synchronisation; gradients are bitwise the same from run to run.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import wraps

import torch
from torch import Tensor

try:
    from llama_smop.triton_kernels import launch, projection
except ImportError as error:
    raise ImportError(f"the Triton backend needs triton ({error}); pip install 'llama-smop[gpu]'") from error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_EXPERTS = 128
OLDEST_ARCH = 80


def unsupported(dtype: torch.dtype, device: torch.device, top_k: int, num_experts: int) -> str | None:
    if dtype not in DTYPES:
        return f"the Triton backend computes in float32, bfloat16 and float16, got {dtype}"
    if not 1 <= num_experts <= MAX_EXPERTS:
        return f"the Triton backend takes 1 to {MAX_EXPERTS} experts, got {num_experts}"
    device = torch.device(device)
    try:
        with _made_current(device):
            driven, arch = launch.device_type(), launch.target_arch()
    except Exception as error:  # a missing driver, compiler or header: each is raised as something else
        return f"Triton cannot drive a GPU here ({type(error).__name__}: {' '.join(str(error).split())})"
    if device.type != driven:
        return f"Triton drives {driven!r} devices here, got {device}"
    if not isinstance(arch, int):
        return f"the Triton backend is tuned for NVIDIA GPUs, got {arch}"
    if arch < OLDEST_ARCH:
        return f"the Triton backend needs compute capability 8.0 or newer, got {arch / 10}"
    return None


def intermediate_rows(tokens: int, top_k: int, num_experts: int) -> int:
    return projection.intermediate_rows(tokens, top_k, num_experts)


def _made_current(device: torch.device) -> AbstractContextManager:
    """Triton asks about, and launches on, the current device: make it this one."""
    index = device.index if device.type == "cuda" else None
    elsewhere = index is not None and index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else nullcontext()


def _on_device_of_first_tensor(function):
    @wraps(function)
    def on_device(first: Tensor, *args):
        with _made_current(first.device):
            return function(first, *args)

    return on_device


def _absent(tensors: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
    """Operators return tensors: an absent one is empty."""
    return tuple(like.new_empty(0) if t is None else t for t in tensors)


@_on_device_of_first_tensor
def expert_projection_fwd(x: Tensor, weights: Tensor, *args) -> tuple[Tensor, ...]:
    y, h, pre, z, mean, rstd = projection.expert_projection_fwd(x, weights, *args)
    return y, h, *_absent((pre,), x), z, *_absent((mean, rstd), weights)


route_fwd = _on_device_of_first_tensor(projection.route_fwd)
route_bwd = _on_device_of_first_tensor(projection.route_bwd)
schedule = _on_device_of_first_tensor(projection.schedule)
expert_projection_bwd = _on_device_of_first_tensor(projection.expert_projection_bwd)
grouped_mm = _on_device_of_first_tensor(projection.grouped_mm)
