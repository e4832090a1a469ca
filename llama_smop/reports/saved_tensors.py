"""Counts what autograd saves for backward."""

from collections.abc import Iterable

import torch
from torch import Tensor


class SavedStorages(torch.autograd.graph.saved_tensors_hooks):
    """While open, counts the storages that autograd saves for backward: each once, and none that `outside` uses.

    Keep the outputs of the forward pass alive until `bytes` is read. Storages that were freed could share an address.
    """

    def __init__(self, outside: Iterable[Tensor]):
        self._outside = {tensor.untyped_storage().data_ptr() for tensor in outside}
        self._bytes: dict[int, int] = {}
        super().__init__(self.add, lambda tensor: tensor)

    def add(self, tensor: Tensor) -> Tensor:
        """Count a tensor; returns it."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._outside:
            self._bytes[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self._bytes.values())
