"""What remembering calls takes, whatever launches their kernels. It needs PyTorch alone."""

from collections.abc import Callable, Sequence
from math import prod
from operator import attrgetter, itemgetter
from threading import Lock
from typing import Any

import torch
from torch import Tensor

dtype_and_shape = attrgetter("dtype", "shape")  # for `map`, which costs no Python for each tensor
_changing = Lock()  # of what is remembered: each GPU has a thread for its backward passes


def flattened(args: Sequence) -> list:
    """Arguments, with those in tuples and lists one by one."""
    flat: list[Any] = []
    for arg in args:
        flat += arg if isinstance(arg, (tuple, list)) else (arg,)
    return flat


def picker(places: Sequence[int]) -> Callable[[Sequence], tuple]:
    """As itemgetter, which gives no tuple of one."""
    if not places:
        return lambda values: ()
    return itemgetter(*places) if len(places) > 1 else lambda values: (values[places[0]],)


def pickers(kinds: Sequence[type], *classes: type) -> tuple[Callable[[Sequence], tuple], ...]:
    """What picks the values of each class, and what picks the others, from values of these types."""
    places = [[i for i, kind in enumerate(kinds) if issubclass(kind, one)] for one in classes]
    others = [i for i in range(len(kinds)) if not any(i in of_class for of_class in places)]
    return *map(picker, places), picker(others)


def without_memory(tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What `empty_like` makes contiguous tensors of that shape from: told the shape, PyTorch takes twice as long."""
    made_alike = () if prod(shape) > 1 else shape  # an expanded one of one element would keep strides of 0
    alike = tensor.new_empty(made_alike, dtype=dtype).expand(shape)
    alike.untyped_storage().resize_(0)
    return alike


def have_their_own_memory(results: Sequence, given: Sequence) -> bool:
    """Of tensors that are none of the given: an address tells them from those, and from each other."""
    made = {id(r): r for r in results if isinstance(r, Tensor) and r.numel() and all(r is not value for value in given)}
    addresses = {r.data_ptr() for r in made.values()}
    return len(addresses) == len(made) and addresses.isdisjoint(v.data_ptr() for v in given if isinstance(v, Tensor))


def remember(known: dict[tuple, Any], key: tuple, plan: Any, most: int) -> None:
    """The oldest of `most` makes room."""
    with _changing:
        if key not in known and len(known) >= most:
            del known[next(iter(known))]
        known[key] = plan


def forget(known: dict) -> None:
    with _changing:
        known.clear()
