"""Operands as boxes: tiles that the tensor memory accelerator (TMA) of sm_90 and newer copies by itself.

A pointer to each 16 bytes costs registers and instructions; a box costs one instruction of one thread. Triton's
launcher makes a tensor map of each descriptor, which takes the host a few microseconds.

A box is copied whole. Past the end of a dimension it holds zeros; past the end of an expert's rows, the next expert's.
"""

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .tiles import TileConfig

refused: set[tuple[torch.dtype, torch.device]] = set()  # where a check has found boxes wrong: pointers serve


def operand_boxes(
    a: Tensor, b: Tensor, tile: TileConfig
) -> tuple[tuple[TensorDescriptor, TensorDescriptor], str] | tuple[tuple[Tensor, Tensor], None]:
    """Of a (rows, K) and of weights b (X, K, N), in tiles, and in which order b's dimensions lie: "XNK" or "XKN".

    Where TMA cannot read either, both tensors as they are.
    """
    (X, K, N), (expert, k, n) = b.shape, b.stride()
    rows = _described(a, a.shape, a.stride(), (tile.block_m, tile.block_k))
    if k == 1:
        weights = _described(b, (X, N, K), (expert, n, 1), (1, tile.block_n, tile.block_k))
    else:
        weights = _described(b, b.shape, b.stride(), (1, tile.block_k, tile.block_n))
    if rows is None or weights is None:
        return (a, b), None
    return (rows, weights), "XNK" if k == 1 else "XKN"


def pointed_at(boxes: TensorDescriptor, base: Tensor | None) -> TensorDescriptor:
    """The same of another tensor of that shape."""
    other = copy(boxes)
    other.base = base
    return other


def tensor_of(argument: Any) -> Any:
    """The tensor that an argument of a kernel describes; any other argument as it is."""
    return argument.base if isinstance(argument, TensorDescriptor) else argument


def _described(
    tensor: Tensor, shape: Sequence[int], strides: Sequence[int], box: Sequence[int]
) -> TensorDescriptor | None:
    """None unless all but the last step are multiples of 16 bytes, and each dimension lies outside of the next."""
    aligned = tensor.data_ptr() % 16 == 0 and all(step * tensor.itemsize % 16 == 0 for step in strides[:-1])
    outside = all(strides[i] >= strides[i + 1] * shape[i + 1] > 0 for i in range(len(shape) - 1))
    if not aligned or not outside or strides[-1] != 1 or shape[0] == 0:
        return None
    return TensorDescriptor(tensor, [*shape], [*strides], [*box])
