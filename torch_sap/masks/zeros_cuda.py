"""Store the zeros of many tensors on a GPU in one launch, which reads one byte per entry: its mask's.

The table of addresses that the launch needs is a function of the tensors' addresses, types and strides, which are read
at every call. So a table that is kept from an earlier call with the same ones cannot be wrong.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torch_sap.decide.keys import INTEGER_OF
from torch_sap.decide.triton_backend import import_kernels, numbers, run, send, starts, usable
from torch_sap.masks.small import Pair

BLOCK = 2**11
"""Entries per program."""

KEPT = 64
"""Tables that are kept: gradients and weights of some models, or of one whose gradients move."""


class Table(NamedTuple):
    """What a launch needs."""

    items: Tensor
    item_of: Tensor
    programs: int
    rest: list[int]
    """Numbers of the pairs that the kernel cannot take: memory in another order than the mask's, or with gaps."""


def store_zeros_(pairs: list[Pair]) -> list[Pair]:
    """Set entries of tensors on GPUs to +0.0 where their masks are False, and return the pairs that are left to do.

    All are left where Triton does not run, and while a CUDA graph is captured: a graph must not depend on a table that
    may be dropped before it is replayed.
    """
    if torch.cuda.is_current_stream_capturing():
        return pairs
    by_device: dict[torch.device, list[Pair]] = {}
    for pair in pairs:
        by_device.setdefault(pair[0].device, []).append(pair)
    return [pair for device, here in by_device.items() for pair in _store_on_one_device(here, device)]


def _store_on_one_device(pairs: list[Pair], device: torch.device) -> list[Pair]:
    if not usable(device):
        return pairs
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    table = _table(tuple([_layout(*pair) for pair in pairs]), device, stream)
    run(import_kernels().store_zeros, table.programs, table.items, table.item_of, BLOCK=BLOCK)
    return [pairs[number] for number in table.rest]


def _layout(tensor: Tensor, mask: Tensor) -> tuple[Any, ...]:
    return (
        tensor.data_ptr(),
        mask.data_ptr(),
        tensor.dtype,
        mask.dtype,
        tensor.shape,
        mask.shape,
        tensor.stride(),
        mask.stride(),
        mask.device,
    )


@lru_cache(KEPT)
def _table(layouts: tuple[tuple[Any, ...], ...], device: torch.device, stream: int) -> Table:
    """The table of some layouts. Another stream has its own: it does not wait for the copy of this one's."""
    items, rest = [], []
    for number, (at, at_mask, dtype, of_mask, shape, shape_of_mask, strides, strides_of_mask, place) in enumerate(
        layouts
    ):
        alike = shape == shape_of_mask and of_mask is torch.bool and place == device
        if alike and dtype in INTEGER_OF and fills_memory(shape, strides, strides_of_mask):
            items.append((at, at_mask, shape.numel(), dtype.itemsize, 0))
        else:
            rest.append(number)
    table = np.array(items, np.int64).reshape(-1, 5)
    programs = -(-table[:, 2] // BLOCK)
    table[:, 4] = starts(programs)
    sent, item_of = send([table, numbers(programs)], device)
    return Table(sent, item_of, len(item_of), rest)


def fills_memory(shape: tuple[int, ...], strides: tuple[int, ...], others: tuple[int, ...]) -> bool:
    """Whether two tensors of a shape fill the memory from their addresses on without gaps, in the same order."""
    length = 1
    dims = (dim for dim in zip(strides, others, shape, strict=True) if dim[2] != 1)
    for stride, other, size in sorted(dims):
        if size and not stride == other == length:
            return False
        length *= size
    return True
