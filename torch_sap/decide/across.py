"""The selection over several processes: counts are added up, ties are shared out by their position in the whole.

The order of position is that of the unsharded tensors: of a tensor that is cut along dimension 0 the first process's
part comes first, and so on. A tensor that every process has whole is counted once, by the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_sap.decide.device import Tensors, find_on_device
from torch_sap.decide.exact import _keep_larger, _keep_late_ties, find_on_host
from torch_sap.decide.keys import chunks, common_dtype, flatten, flatten_all, keys_of
from torch_sap.distributed.sharded import Part, add_up, common_part, gather, gather_along


def keep_largest_across(
    tensors: Tensors, parts: Sequence[Part | None], count: int, pruned: int, *, on_host: bool
) -> list[Tensor]:
    """As :func:`torch_sap.decide.exact.keep_largest`, for a group of which every process has parts.

    Args:
        tensors: What this process has of the group.
        parts: Where it lies in the whole; None: all of it is here, as on every process.
        count: Entries of the whole group to take away, at least 1.
        pruned: Entries of the whole group that the masks exclude already.
        on_host: Whether to work with numpy. All tensors must be on the CPU then.

    Returns:
        New bool masks of what is here.
    """
    shared = common_part(parts)
    assert shared is not None
    dtype = common_dtype(scores for scores, _ in tensors)
    tensors = [(scores.contiguous(), mask) for scores, mask in tensors]
    flats = flatten_all(tensors)
    counted = [flat for flat, part in zip(flats, parts, strict=True) if part is not None or shared.rank == 0]
    everywhere = partial(add_up, part=shared)
    if on_host:
        key, below, _ = find_on_host(counted, count + pruned, dtype, everywhere)
        left = count + pruned * (key != 0) - below  # entries with just this key that have to go
    else:
        key, below, _ = _numbers(find_on_device(counted, count, dtype, everywhere))
        left = count - below
    masks = [torch.empty_like(scores, dtype=torch.bool) for scores, _ in tensors]
    for keep, flat in zip(masks, flats, strict=True):
        _keep_larger(flatten(keep, keep), flat, key, dtype, on_host)
    ties = _numbers([_count_ties(flat, key, dtype, on_host) for flat in flats])
    table = np.stack([row for (row,) in gather([np.array(ties, np.float64)], shared)]).astype(np.int64)
    for i, (keep, (scores, mask), part) in enumerate(zip(masks, tensors, parts, strict=True)):
        here = table[:1, i] if part is None else table[:, i]
        if left < here.sum():
            _keep_ties_across(keep, scores, mask, key, left, here, part, dtype, on_host)
        left = max(0, left - int(here.sum()))
    return masks


def _numbers(numbers: Sequence[Any]) -> list[int]:
    """The numbers, with one read if they are on a device."""
    if numbers and isinstance(numbers[0], Tensor):
        numbers = torch.stack([number.to(numbers[0].device) for number in numbers]).tolist()
    return [int(number) for number in numbers]


def _count_ties(flat: tuple[Tensor, Tensor | None], key: int, dtype: torch.dtype, on_host: bool) -> Any:
    """Unpruned entries that equal the key: a number, int64 tensor on a device."""
    ties: Any = 0 if on_host else torch.zeros((), dtype=torch.int64, device=flat[0].device)
    for scores, mask in chunks(*flat, on_host=on_host):
        equal = keys_of(scores, mask, dtype, on_host=on_host) == key
        ties = ties + (equal if mask is None else equal & mask).sum()
    return ties


def _keep_ties_across(
    keep: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    key: int,
    left: int,
    ties: NDArray[np.int64],
    part: Part | None,
    dtype: torch.dtype,
    on_host: bool,
) -> None:
    """Keep the ties of a tensor but for the first ``left`` of the whole."""
    if part is None or part.dim == 0:
        before = 0 if part is None else int(ties[: part.rank].sum())
        _keep_late_ties(keep, scores, mask, key, max(0, left - before), dtype, on_host)
    else:  # the parts interleave in the order of position: which entries are ties, a bit each, has to be known
        equal = torch.zeros_like(keep)
        _keep_late_ties(equal, scores, mask, key, 0, dtype, on_host)
        whole = gather_along(equal, part)
        late = whole.reshape(-1).cumsum(0).view(whole.shape) > left
        keep |= part.own(whole & late)
