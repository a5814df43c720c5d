"""Magnitudes as integers: non-negative IEEE floats are ordered like their bit patterns.

A *key* is the bit pattern of |w|, an integer of the weight's own width; the key of a pruned entry is 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

INTEGER_OF = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
"""The floating-point types that can be pruned, and the integers of their width."""

TYPES = ", ".join(str(dtype).removeprefix("torch.") for dtype in INTEGER_OF)


_PLAIN = (Tensor, torch.nn.Parameter)


def is_prunable(tensor: Tensor) -> bool:
    """Whether the values of a tensor are dense floating-point numbers in its own memory, or DTensors' local memory.

    A class with a dispatch of its own (quantized weights of torchao, for example) keeps them in other tensors.
    """
    if tensor.dtype not in INTEGER_OF or tensor.layout is not torch.strided or tensor.is_nested:
        return False
    plain = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    return type(tensor) in _PLAIN or plain or hasattr(tensor, "to_local")


def check_dtype(tensor: Tensor, name: str) -> None:
    """Raise an error that names the tensor unless it is a dense one with values of a type that keys can order."""
    kind = "" if type(tensor) in _PLAIN else f" ({type(tensor).__name__})"
    if tensor.dtype not in INTEGER_OF:
        raise TypeError(f"{name} must be a real floating-point tensor ({TYPES}), got {tensor.dtype}{kind}")
    if tensor.is_nested:
        raise TypeError(f"{name} must be one tensor, got a nested one{kind}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {tensor.layout}{kind}; call its to_dense() first")
    if not is_prunable(tensor):
        raise TypeError(f"{name} must be a plain tensor, got {type(tensor).__name__}, whose values are elsewhere")
    if tensor.is_meta:
        raise ValueError(f"{name} must have values, but it is on the meta device")


def check_whole(tensor: Tensor, name: str) -> None:
    """Raise a TypeError that names the tensor if it is a DTensor, of which this process holds a part."""
    if hasattr(tensor, "to_local"):
        raise TypeError(
            f"{name} is a DTensor, whose parts only the whole-model functions and SAP can measure and prune; "
            "use its full_tensor() here"
        )


def common_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The narrowest type that holds the values of all tensors exactly, so that keys of all of them compare."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def key_bits(dtype: torch.dtype) -> int:
    """Bits of a key of a type."""
    return 8 * dtype.itemsize - 1


def as_array(tensor: Tensor) -> NDArray[Any]:
    """The memory of a tensor on the CPU as an array; of bfloat16, which NumPy lacks, the bits as int16."""
    array: NDArray[Any] = (tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).numpy()
    return array


def count_true(mask: Tensor) -> int:
    """How many entries of a bool mask are True."""
    return int(np.count_nonzero(mask.numpy())) if mask.is_cpu else int(mask.sum())


def is_expanded(tensor: Tensor) -> bool:
    """Whether several entries of a tensor are one place in memory, so that PyTorch writes none of them."""
    return bool(torch._debug_has_internal_overlap(tensor) == 1)
