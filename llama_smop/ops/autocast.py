"""Autocast rules that name the arguments they lower.

`torch.library.register_autocast` lowers every floating-point argument; gate weights and LayerNorm parameters of an
expert projection are to keep their float32 values, so the operators here say which arguments follow autocast. A
backward lowers none: what it is given has the dtypes of its forward, and its products must not be lowered on the way.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

_KEYS = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}


class Autocast:
    """Under autocast: cast the arguments named in `lowered` to the autocast dtype and run `op` with autocast off."""

    def __init__(self, op: torch.library.CustomOpDef, lowered: Collection[str] = ()):
        overload = op._opoverload
        self.positions = {i for i, arg in enumerate(overload._schema.arguments) if arg.name in lowered}
        namespace, name = overload._schema.name.split("::")
        self._library = torch.library.Library(namespace, "FRAGMENT")  # the registration lives as long as this object
        for device_type, key in _KEYS.items():
            self._library.impl(name, self._rule(overload, device_type), key.name, with_keyset=True)

    def run(self, function: Callable, args: Sequence, device_type: str):
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_KEYS[device_type])):
            return function(*(_lower(a, dtype) if i in self.positions else a for i, a in enumerate(args)))

    def _rule(self, overload: torch._ops.OpOverload, device_type: str) -> Callable:
        return lambda _, *args: self.run(overload, args, device_type)


def dtype_used(tensor: Tensor) -> torch.dtype:
    """The dtype in which an operator computes `tensor`: autocast's where it is on, else the tensor's own."""
    device_type = tensor.device.type
    if device_type in _KEYS and torch.is_autocast_enabled(device_type) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return tensor.dtype


def _lower(value, dtype: torch.dtype):
    eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if eligible else value
