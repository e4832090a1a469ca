"""How far two computations of the same numbers may differ when only the order of their sums does.

A sum of n numbers errs by about u·√n of its size, where u is half the spacing of the dtype's numbers at 1 (Higham and
Mary 2019, "A new approach to probabilistic rounding error analysis"); sums that follow each other add up their n. Two
orders differ by √2 of that, and the largest of many thousand results lies five to six such deviations out: together 8.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

# Additions on the longest way through a tiny model and back: convolutions of 245 and 144 terms, attention and means
# over some 150 frames, a dozen products of width 16 to 64, and their gradients.
TINY_MODEL = 1000


def two_orders(additions: int, dtype: torch.dtype = torch.float32) -> float:
    """Share of the largest value; `additions` on the longest way to a result. A pairwise sum of n has log2(n)."""
    return 8 * math.sqrt(additions) * torch.finfo(dtype).eps / 2


def assert_same_sums(got: Tensor, want: Tensor, additions: int, what: str = "the result", scale: float = 0.0) -> None:
    """Equal but for the order of sums in want's dtype, relative to the largest value, or to `scale` if that is more."""
    assert got.shape == want.shape, f"{what} has shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    assert got.dtype == want.dtype, f"{what} is {got.dtype}, expected {want.dtype}"
    if not want.numel():
        return
    if not want.is_floating_point():
        assert torch.equal(got, want), f"{what} differs"
        return
    largest = max(want.abs().max().item(), scale)
    off, allowed = (got.double().cpu() - want.double().cpu()).abs().max().item(), two_orders(additions, want.dtype)
    assert off <= allowed * largest, f"{what} is off by {off:.1e} of {largest:.1e}, allowed {allowed:.1e} of it"


def assert_same_gradients(got: Mapping[str, Tensor], want: Mapping[str, Tensor], additions: int) -> None:
    """Of each parameter, by name. One that cancels to nothing may differ by a hundredth of what the largest may."""
    assert got.keys() == want.keys()
    floor = max(gradient.abs().max().item() for gradient in want.values()) / 100
    for name, gradient in want.items():
        assert_same_sums(got[name], gradient, additions, f"the gradient of {name}", scale=floor)
