"""The extension module `llama_smop._C`: whether it is built, and on which devices it runs."""

from functools import cache
from importlib import import_module
from types import ModuleType

import torch

DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
LN_DTYPES = {**DTYPES, torch.float32: "float32"}


@cache
def extension() -> ModuleType:
    """`llama_smop._C`. Raises ImportError, with the remedy, when it is not built."""
    try:
        return import_module("..._C", __package__)  # this copy's own
    except ImportError as error:
        raise ImportError(
            f"the CUDA extension cannot be imported ({error}); to build it, reinstall with nvcc on PATH and "
            "LLAMA_SMOP_BUILD_CUDA=1"
        ) from error


def unsupported(
    dtype: torch.dtype, device: torch.device, top_k: int, num_experts: int, gated: bool = False
) -> str | None:
    if gated:
        return "the CUDA backend has no gated experts; use the Triton backend"
    try:
        ext = extension()
    except ImportError as error:
        return str(error)
    if dtype not in DTYPES:
        return f"the CUDA extension computes in bfloat16 and float16, got {dtype}"
    if not 1 <= num_experts <= ext.MAX_EXPERTS:
        return f"the CUDA extension takes 1 to {ext.MAX_EXPERTS} experts, got {num_experts}"
    if top_k > ext.MAX_EXPERTS:
        return f"the CUDA extension takes at most {ext.MAX_EXPERTS} choices a token, got {top_k}"
    return unsupported_device(torch.device(device))


def unsupported_device(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the CUDA extension needs a CUDA device, got {device}"
    if not torch.cuda.is_available():
        return "the CUDA extension needs a CUDA device, and torch sees none"
    major, minor = torch.cuda.get_device_capability(device)
    built = extension().build_info()["architectures"]
    if not any(_runs(arch, major, minor) for arch in built.split(";")):
        return f"the CUDA extension is built for sm_{built.replace(';', ', sm_')}; {device} is sm_{major}{minor}"
    return None


def _runs(arch: str, major: int, minor: int) -> bool:
    """Machine code runs on its own major version from its minor version on; with an "a", on exactly its version."""
    number = int(arch.rstrip("a"))
    if arch.endswith("a"):
        return (major, minor) == divmod(number, 10)
    return major == number // 10 and minor >= number % 10
