"""Are products right as large ones are computed?

Triton's read their operands by TMA descriptors (`triton_kernels.boxes`), which no problem as small as a check's would
reach by itself. Triton, the driver and the device have a part in it, so it is checked apart: without it pointers serve.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from llama_smop.ops import self_check

ENDS, K, N = (100, 150), 328, 264  # of two groups; multiples of no tile, so that boxes reach past each dimension


def faults(backend: Any, dtype: torch.dtype, device: torch.device) -> list[str]:
    """One line for each thing that is wrong; none for a backend or device that computes them as it does small ones."""
    by_boxes = getattr(backend, "product_by_boxes", None)
    if by_boxes is None:
        return []
    generator = torch.Generator().manual_seed(0)
    with self_check.on_device(device):
        a = torch.randn(ENDS[-1], K, generator=generator).to(device, dtype)
        b = torch.randn(len(ENDS), K, N, generator=generator).to(device, dtype)
        ends = torch.tensor(ENDS, dtype=torch.int32, device=device)
        weights = {"a·b": b, "a·bᵀ": b.transpose(1, 2).contiguous().transpose(1, 2)}
        products = {f"{name} by TMA": by_boxes(a, matrices, ends) for name, matrices in weights.items()}
        got = {name: product for name, product in products.items() if product is not None}
        if not got:
            return []
        plain, exact = _by_torch(a, b), _by_torch(a.double(), b.double())
        return self_check.faults(got, dict.fromkeys(got, exact), dict.fromkeys(got, plain))


def do_without(backend: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Large products are computed as small ones are, from now on."""
    backend.refuse_boxes(dtype, device)


def _by_torch(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a[begin:end] @ b[g] for g, (begin, end) in enumerate(pairwise((0, *ENDS)))])
