"""Masks as bits: the layout of compressed-tensors' "sparse-bitmask" for a matrix.

A tensor of any shape is a matrix of its rows: dimension 0 by all the others. A row of the mask begins with a new byte,
its first entry is the lowest bit, and the bits that fill up its last byte are 0. Beside the bits stands, for each row,
how many entries the rows before it keep. Where a row's values begin is known without reading the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from torch_sap.decide.keys import INTEGER_OF


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor: (1, n) for one dimension, (1, 1) for a number.

    Example:
        >>> from torch_sap.files.bitmask import matrix_shape
        >>> matrix_shape((64, 3, 7, 7))
        (64, 147)
    """
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def pack(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The bits of a mask and where the values of each row begin.

    Args:
        mask: Bool tensor of any shape on the host.

    Returns:
        uint8 of shape (rows, columns / 8 rounded up), and int64 of shape (rows,).

    Example:
        >>> from torch_sap.files.bitmask import pack
        >>> pack(torch.tensor([[True, False, True], [False, True, True]]))
        (tensor([[5],
                [6]], dtype=torch.uint8), tensor([0, 2]))
    """
    rows = mask.reshape(matrix_shape(mask.shape))
    return torch.from_numpy(np.packbits(rows.numpy(), axis=1, bitorder="little")), row_offsets(rows)


def row_offsets(rows: Tensor) -> Tensor:
    """How many entries the rows before each row of a mask (rows, columns) keep: int64 of shape (rows,)."""
    counts = np.count_nonzero(rows.numpy(), axis=1).astype(np.int64)
    return torch.from_numpy(np.cumsum(counts) - counts)


def unpack(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The mask that bits stand for.

    Args:
        bits: uint8; its last dimension holds the bits of the last dimension of the mask.
        shape: Shape of the mask.

    Returns:
        Bool tensor of the shape.

    Raises:
        ValueError: if the bits are too few or too many for the shape, or one after the end of a row is set.
    """
    columns = shape[-1]
    expected = (*shape[:-1], -(-columns // 8))
    if bits.dtype is not torch.uint8 or tuple(bits.shape) != expected:
        raise ValueError(f"the bits must be uint8 of shape {expected}, got {bits.dtype} of shape {tuple(bits.shape)}")
    if columns % 8 and bool((bits[..., -1] >> columns % 8).any()):
        raise ValueError("the bits after the end of a row must be 0, but one is 1")
    mask = np.unpackbits(bits.numpy(), axis=-1, count=columns, bitorder="little")
    return torch.from_numpy(mask.view(np.bool_))


def gather_values(tensor: Tensor, mask: Tensor) -> Tensor:
    """The entries of a tensor where a mask of its shape is True, in order, bit for bit; one dimension."""
    return torch.from_numpy(_bits_of(tensor).numpy()[mask.numpy()]).view(tensor.dtype)


def scatter_values(values: Tensor, mask: Tensor) -> Tensor:
    """The tensor with values where a mask is True, in order, bit for bit, and +0.0 elsewhere."""
    bits = torch.zeros(mask.shape, dtype=INTEGER_OF[values.dtype])
    bits.numpy()[mask.numpy()] = _bits_of(values).numpy()  # twice as fast as by torch, on one thread
    return bits.view(values.dtype)


def not_zero(tensor: Tensor) -> Tensor:
    """Where a tensor is anything else than +0.0, of its shape."""
    return _bits_of(tensor) != 0


def _bits_of(tensor: Tensor) -> Tensor:
    return tensor.detach().view(INTEGER_OF[tensor.dtype])
