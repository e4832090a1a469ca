"""Autocast rules that name the arguments they lower.

`torch.library.register_autocast` lowers every floating-point argument; gate weights and LayerNorm parameters of an
expert projection are to keep their float32 values, so the operators here say which arguments follow autocast.
"""

from collections.abc import Collection

import torch
from torch import Tensor

DEVICES = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def register(op: torch.library.CustomOpDef, lowered: Collection[str]) -> torch.library.Library:
    """Under autocast, cast the arguments named in `lowered` to the autocast dtype and run `op` with autocast off."""
    overload = op._opoverload
    positions = {i for i, arg in enumerate(overload._schema.arguments) if arg.name in lowered}
    namespace, name = overload._schema.name.split("::")
    library = torch.library.Library(namespace, "FRAGMENT")

    def rule(device_type: str, key: torch._C.DispatchKey):
        def kernel(_, *args):
            dtype = torch.get_autocast_dtype(device_type)
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                return overload(*(_lower(a, dtype) if i in positions else a for i, a in enumerate(args)))

        return kernel

    for device_type, key_name in DEVICES.items():
        key = getattr(torch._C.DispatchKey, key_name)
        library.impl(name, rule(device_type, key), key_name, with_keyset=True)
    return library  # the registration lives as long as this object


def dtype_used(tensor: Tensor) -> torch.dtype:
    """The dtype in which an operator computes `tensor`: autocast's where it is on, else the tensor's own."""
    device_type = tensor.device.type
    if device_type in DEVICES and torch.is_autocast_enabled(device_type) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return tensor.dtype


def _lower(value, dtype: torch.dtype):
    eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if eligible else value
