"""The SAP step for one group that is never in memory as a whole: its tensors come one by one, several times."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from torch_sap.bounds import Hyperparameters
from torch_sap.keys import check_dtype, flatten
from torch_sap.selection import _find_on_host, masks_above
from torch_sap.step import GroupValues
from torch_sap.sums import flat_sums, index_from_sums

Stream = Callable[[], Iterable[Tensor]]
"""Gives the tensors of a group on the CPU, in order of position: the same ones each time that it is called."""


class _Flats:
    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[tuple[Tensor, None]]:
        return ((flatten(tensor, tensor), None) for tensor in self.stream())


def prune_stream(stream: Stream, rule: Hyperparameters) -> tuple[GroupValues, Iterator[Tensor]]:
    """Decide what SAP prunes of a group of any size, all of whose entries are unpruned.

    The stream is read three or four times before the masks, and once more for them; one tensor is held at a time.

    Args:
        stream: Called without arguments each time that the tensors are needed; real floating point, on the CPU.
        rule: The five numbers.

    Returns:
        d, I, r and c, arrays of one value; and the masks of the tensors, made while they are iterated over.

    Raises:
        ValueError: if the sums of the magnitudes' powers are not finite: an entry is NaN or infinite, or too large.
        TypeError: if stream is no function, or a tensor is not of a real floating-point type.

    Example:
        >>> from torch_sap.bounds import Hyperparameters
        >>> numbers = lambda: (torch.arange(1.0 + i, 100.0 + i) for i in range(3))
        >>> values, masks = prune_stream(numbers, Hyperparameters())
        >>> int(values.c[0]) == sum(int((~mask).sum()) for mask in masks)
        True

    Source: Algorithm 1 of the paper.
    """
    if not callable(stream):
        raise TypeError(
            f"stream must be a function that gives the tensors, each time anew, got {type(stream).__name__}"
        )
    tables, d, dtype = [], 0, torch.float16
    for number, tensor in enumerate(stream()):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"tensor {number} of the stream must be a tensor, got {type(tensor).__name__}")
        check_dtype(tensor, f"tensor {number} of the stream")
        flat = flatten(tensor, tensor)
        (table,), _ = flat_sums([(flat, None)], tensor.dtype, (rule.p, rule.q), on_host=True)
        if not np.isfinite(table).all():
            raise ValueError(f"tensor {number} of the stream must be finite and so must the sums of its powers")
        dtype = tensor.dtype if number == 0 else torch.promote_types(dtype, tensor.dtype)
        tables.append(table)
        d += tensor.numel()
    sum_p, sum_q = (np.array([math.fsum(row)]) for row in np.hstack([np.zeros((2, 1)), *tables]))
    size = np.array([d])
    index = index_from_sums(sum_p, sum_q, size, p=rule.p, q=rule.q)
    values = GroupValues(size, index, rule.retain(index, size), rule.count(index, size))
    return values, _masks(stream, int(values.c[0]), dtype)


def _masks(stream: Stream, count: int, dtype: torch.dtype) -> Iterator[Tensor]:
    if count == 0:
        return (torch.ones_like(tensor, dtype=torch.bool) for tensor in stream())
    key, below, _ = _find_on_host(_Flats(stream), count, dtype, add_up=lambda counts: counts)
    return masks_above(((tensor, None) for tensor in stream()), key, count - below, dtype, on_host=True)
