"""Pack masks into bits, in the layout that compressed-tensors calls "sparse-bitmask".

A tensor of any shape is a matrix: dimension 0 by all the others. Each row of the mask starts at a new byte, with the
first entry in the lowest bit; the bits after the end of a row are 0. The row offsets count the entries that the rows
before keep, so the values of a row can be found without reading the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from torch_sap.decide.keys import INTEGER_OF


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor: (1, n) for one dimension, (1, 1) for a number."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def pack(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Pack a bool mask on the CPU: uint8 of shape (rows, columns / 8 rounded up), and its row offsets."""
    rows = mask.reshape(matrix_shape(mask.shape))
    return torch.from_numpy(np.packbits(rows.numpy(), axis=1, bitorder="little")), row_offsets(rows)


def row_offsets(rows: Tensor) -> Tensor:
    """Count the entries that the rows before each row of a mask (rows, columns) keep: int64 of shape (rows,)."""
    counts = np.count_nonzero(rows.numpy(), axis=1).astype(np.int64)
    return torch.from_numpy(np.cumsum(counts) - counts)


def unpack(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Unpack the bits of a mask; ValueError unless they are uint8, fit the shape, and are 0 after each row."""
    columns = shape[-1]
    expected = (*shape[:-1], -(-columns // 8))
    if bits.dtype is not torch.uint8 or tuple(bits.shape) != expected:
        raise ValueError(f"the bits must be uint8 of shape {expected}, got {bits.dtype} of shape {tuple(bits.shape)}")
    if columns % 8 and bool((bits[..., -1] >> columns % 8).any()):
        raise ValueError("the bits after the end of a row must be 0, but one is 1")
    mask = np.unpackbits(bits.numpy(), axis=-1, count=columns, bitorder="little")
    return torch.from_numpy(mask.view(np.bool_))


def gather_values(tensor: Tensor, mask: Tensor) -> Tensor:
    """Gather the entries of a tensor where a mask is True, in order, bit for bit, in one dimension."""
    return torch.from_numpy(_bits_of(tensor).numpy()[mask.numpy()]).view(tensor.dtype)


def scatter_values(values: Tensor, mask: Tensor) -> Tensor:
    """Scatter values to where a mask is True, in order, bit for bit, with +0.0 elsewhere."""
    bits = torch.zeros(mask.shape, dtype=INTEGER_OF[values.dtype], device="cpu")
    bits.numpy()[mask.numpy()] = _bits_of(values).numpy()  # twice as fast as PyTorch on one thread
    return bits.view(values.dtype)


def not_zero(tensor: Tensor) -> Tensor:
    """Find the entries of a tensor that are anything but +0.0 and -0.0, subnormal numbers and NaN too."""
    bits = _bits_of(tensor)
    return bits & torch.iinfo(bits.dtype).max != 0


def _bits_of(tensor: Tensor) -> Tensor:
    return tensor.detach().view(INTEGER_OF[tensor.dtype])
