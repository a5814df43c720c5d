"""Magnitudes as integers: non-negative IEEE floats are ordered like their bit patterns.

A *key* is the bit pattern of |w|, an integer of the weight's own width; the key of a pruned entry is 0. On the host
keys are numpy arrays (whose loops are several times faster than torch's on cache-sized chunks), elsewhere they are
torch tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import reduce
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_sap.decide.threads import scratch

HOST_CHUNK = 2**19
"""Entries that are worked on at once on the host. Fewer would keep float64 copies of them closer to the processor, but
each operation on a piece needs the interpreter for a moment, and a thread that has to wait for it falls asleep: on a
virtual machine some 80 microseconds are lost each time, as many as an operation on 2 ** 18 entries takes."""

DEVICE_CHUNK = 2**22
"""The same on a device, where a chunk has to be large enough to hide the launches."""

INTEGER_OF = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
"""The floating-point types that can be pruned, and the integers of their width."""


def check_dtype(tensor: Tensor, name: str) -> None:
    """Raise an error that names the tensor unless it is a dense one with values of a type that keys can order."""
    if tensor.dtype not in INTEGER_OF:
        types = ", ".join(str(dtype).removeprefix("torch.") for dtype in INTEGER_OF)
        raise TypeError(f"{name} must be a real floating-point tensor ({types}), got {tensor.dtype}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {tensor.layout}; call its to_dense() first")
    if tensor.is_meta:
        raise ValueError(f"{name} must have values, but it is on the meta device")


def common_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The narrowest type that holds all the tensors' values exactly, so that keys of all of them compare."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def key_end(dtype: torch.dtype) -> int:
    """One more than the largest key of a type, which belongs to a NaN."""
    return int(2 ** (8 * dtype.itemsize - 1))


def is_dense(tensor: Tensor) -> bool:
    """Whether the tensor fills its memory, so that an empty_like() has its strides."""
    return tensor.is_contiguous() or torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def flatten(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor as one dimension, in the order in which ``like`` lies in memory.

    A view for ``like`` itself and for tensors with its strides (channels_last too), unless ``like`` has gaps or
    overlaps.
    """
    order = sorted(range(like.dim()), key=lambda dim: like.stride()[dim], reverse=True)
    return tensor.permute(order).reshape(-1)


def flatten_all(tensors: Iterable[tuple[Tensor, Tensor | None]]) -> list[tuple[Tensor, Tensor | None]]:
    """Scores and masks (or None), both in the order in which the scores lie in memory."""
    return [(flatten(scores, scores), None if mask is None else flatten(mask, scores)) for scores, mask in tensors]


def chunk_size(on_host: bool) -> int:
    """Entries that are worked on at once."""
    return HOST_CHUNK if on_host else DEVICE_CHUNK


def chunks(*flats: Tensor | None, on_host: bool) -> Iterator[tuple[Any, ...]]:
    """Cut one-dimensional tensors of one length into pieces, together. None stays None.

    On the host the pieces are arrays: those are cut in a tenth of the time, in which the other threads wait.
    """
    size = chunk_size(on_host)
    length = next(flat.numel() for flat in flats if flat is not None)
    sources = [as_array(flat) if on_host and flat is not None else flat for flat in flats]
    for start in range(0, length, size):
        yield tuple(None if source is None else source[start : start + size] for source in sources)


def as_array(tensor: Tensor) -> NDArray[Any]:
    """The memory of a tensor on the host as an array; of bfloat16, which numpy does not have, the bits as int16."""
    array: NDArray[Any] = (tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).numpy()
    return array


def count_true(mask: Tensor) -> Any:
    """How many entries of a bool mask are True: int on the CPU, int64 scalar tensor on a device."""
    return int(np.count_nonzero(mask.numpy())) if mask.is_cpu else mask.sum()


def keys_of(scores: Any, mask: Any, dtype: torch.dtype, *, on_host: bool, reuse: bool = False) -> Any:
    """Keys of |scores| in ``dtype``, 0 where the mask is False, of the scores' shape.

    Scores and mask (or None) are tensors, on the host also what :func:`as_array` makes of them. The keys are in new
    memory, or (on the host, ``reuse``) in memory that the next such call of this thread overwrites.
    """
    largest = key_end(dtype) - 1
    if not on_host:
        keys = scores.to(dtype).view(INTEGER_OF[dtype]) & largest
        return keys if mask is None else keys.mul_(mask)
    source = _bits(as_array(scores) if isinstance(scores, Tensor) else scores, dtype)
    out = scratch("keys", source.shape, source.dtype) if reuse else np.empty(source.shape, source.dtype)
    np.bitwise_and(source, largest, out=out)
    return out if mask is None else np.multiply(out, np.asarray(mask).view(np.int8), out=out)


def _bits(scores: NDArray[Any], dtype: torch.dtype) -> NDArray[Any]:
    """The bit patterns of an array of scores converted to a type, as integers."""
    if scores.dtype == np.int16:  # those of bfloat16 already
        if dtype is torch.bfloat16:
            return scores
        scores = _floats(scores, torch.bfloat16)
    return scores.astype(f"f{dtype.itemsize}", copy=False).view(f"i{dtype.itemsize}")


def magnitudes(keys: Any, dtype: torch.dtype, *, reuse: bool = False) -> Any:
    """The float64 magnitudes that keys of a type stand for, array for array and tensor for tensor.

    In new memory, or (arrays, ``reuse``) in memory that the next such call of this thread overwrites.
    """
    if isinstance(keys, Tensor):
        return keys.view(dtype).double()
    floats = _floats(keys, dtype)
    if not reuse:
        return floats.astype(np.float64)
    out = scratch("magnitudes", keys.shape, np.float64)
    out[...] = floats
    return out


def _floats(keys: NDArray[Any], dtype: torch.dtype) -> NDArray[Any]:
    if dtype is torch.bfloat16:  # the upper half of a float32
        out = scratch("floats", keys.shape, np.int32)
        np.copyto(out, keys)
        np.left_shift(out, 16, out=out)
        return out.view(np.float32)
    return keys.view(f"f{dtype.itemsize}")


def sort_rows(keys: Any) -> Any:
    """Each row of two-dimensional keys in ascending order; numpy sorts integers several times faster than torch."""
    return keys.sort(dim=1).values if isinstance(keys, Tensor) else np.sort(keys, axis=1)
