"""How a device works through many tensors: joined into batches, so that an operation that is launched does much.

To launch one takes the host some microseconds, and the device less than that for most tensors of a model. A batch has
a limited size, whatever the model's: nothing of a group's size is made but its masks. Nothing is read back to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_sap.decide.keys import INTEGER_OF, chunk_size, common_dtype, flatten_all, key_end
from torch_sap.decide.sums import power_sums
from torch_sap.decide.threads import Job

BIN_BITS = 11
"""The bits of a key that are found at once: as many bins as a GPU's multiprocessor can count in its own memory."""

Tensors = Sequence[tuple[Tensor, Tensor | None]]
"""Scores and bool mask (None: nothing pruned) of each tensor of a group, in order of position."""

AddUp = Callable[[Tensor], Tensor]
"""Makes the sum over all processes of int64 counts."""


class Batch(NamedTuple):
    """Pieces of consecutive tensors, of one device."""

    scores: list[Tensor]
    masks: list[Tensor | None]
    outputs: list[Tensor]

    def mask(self) -> Tensor | None:
        """The masks, one after the other; None if nothing is pruned."""
        if all(mask is None for mask in self.masks):
            return None
        every = zip(self.scores, self.masks, strict=True)
        return _join([torch.ones_like(s, dtype=torch.bool) if mask is None else mask for s, mask in every])

    def keys(self, dtype: torch.dtype, mask: Tensor | None, pruned: int) -> Tensor:
        """Keys of the scores in ``dtype``, one after the other, in new memory; another number where a mask is False."""
        keys = _join([scores.to(dtype) for scores in self.scores]).view(INTEGER_OF[dtype]) & (key_end(dtype) - 1)
        return keys if mask is None else torch.where(mask, keys, pruned)

    def order_keys(self, dtype: torch.dtype) -> Tensor:
        """Keys that order the unpruned entries; -1, before all of them, for the pruned ones."""
        return self.keys(dtype, self.mask(), -1)

    def write(self, joined: Tensor) -> None:
        """Write what belongs to the scores, one after the other, to the outputs."""
        torch._foreach_copy_(self.outputs, joined.split([output.numel() for output in self.outputs]))


def _join(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def batches(flats: Iterable[tuple[Any, ...]]) -> Iterator[Batch]:
    """All entries in their order, in batches of up to DEVICE_CHUNK.

    Args:
        flats: Scores, mask or None, and perhaps an output of each tensor, of one dimension and one length.
    """
    batch, room = Batch([], [], []), chunk_size(on_host=False)
    for scores, mask, *outputs in flats:
        start, length = 0, scores.numel()
        while start < length:
            if batch.scores and (room == 0 or batch.scores[0].device != scores.device):
                yield batch
                batch, room = Batch([], [], []), chunk_size(on_host=False)
            end = min(length, start + room)
            batch.scores.append(scores[start:end])
            batch.masks.append(None if mask is None else mask[start:end])
            batch.outputs.extend(output[start:end] for output in outputs)
            start, room = end, room - (end - start)
    if batch.scores:
        yield batch


def batch_sums(groups: Sequence[Tensors], dtype: torch.dtype, exponents: Sequence[float], scale: float) -> Job:
    """Sums of ``|scale * w| ** exponent`` over the unpruned entries of several groups of flat tensors.

    Args:
        groups: Scores and masks of one dimension. Each group is on one device.
        dtype: Type that the keys are made in; the arithmetic is float64.
        exponents: Positive exponents.
        scale: Factor that keeps sums within the range of float64.

    Returns:
        A job that gives for each group a float64 tensor of shape (1 + exponents, 1): the number of unpruned entries,
        and the sums, not finite if a score is not finite or a sum overflows.
    """

    def table(number: int, batch: Batch) -> tuple[int, Tensor]:
        mask = batch.mask()
        keys = batch.keys(dtype, mask, 0)
        sums = power_sums(keys, dtype, exponents, scale, torch.sum)
        d = torch.full_like(sums[0], keys.numel()) if mask is None else mask.sum(dtype=torch.float64)
        return number, torch.stack([d, *sums])[:, None]

    def gather(found: list[tuple[int, Tensor]]) -> list[Tensor]:
        shape = 1 + len(exponents), 1
        tables = [torch.zeros(shape, dtype=torch.float64, device=group[0][0].device) for group in groups]
        for number, of_batch in found:
            tables[number] += of_batch
        return tables

    return Job(table, [(i, batch) for i, group in enumerate(groups) for batch in batches(group)], gather)


def keep_largest_on_device(tensors: Tensors, count: int, pruned: int) -> list[Tensor]:
    """As :func:`torch_sap.decide.exact.keep_largest`, for tensors that fill their memory."""
    dtype = common_dtype(scores for scores, _ in tensors)
    flats = [torch.empty_like(scores, dtype=torch.bool, memory_format=torch.contiguous_format) for scores, _ in tensors]
    by_position = (
        (scores.reshape(-1), None if mask is None else mask.reshape(-1), flat.view(-1))
        for (scores, mask), flat in zip(tensors, flats, strict=True)
    )
    entries, devices = sum(scores.numel() for scores, _ in tensors), {scores.device for scores, _ in tensors}
    if entries <= chunk_size(on_host=False) and len(devices) == 1:
        (batch,) = batches(by_position)
        order = batch.order_keys(dtype).sort(stable=True).indices
        batch.write(torch.ones_like(order, dtype=torch.bool).index_fill_(0, order[: pruned + count], False))
    else:
        key, below, _ = find_on_device(flatten_all(tensors), count, dtype)
        left, ties = count - below, torch.zeros_like(below)  # entries with just this key: that have to go, seen so far
        for batch in batches(by_position):
            keys = batch.order_keys(dtype)
            key, left, ties = (number.to(keys.device) for number in (key, left, ties))
            equal = keys == key
            rank = equal.cumsum(0).add_(ties)
            ties = rank[-1].clone()
            batch.write((keys > key) | (equal & (rank > left)))
    return [
        flat if scores.is_contiguous() else torch.empty_like(scores, dtype=torch.bool).copy_(flat)
        for (scores, _), flat in zip(tensors, flats, strict=True)
    ]


def find_on_device(
    flats: Tensors, rank: int, dtype: torch.dtype, add_up: AddUp | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The rank-th smallest key of the unpruned entries (from 1), how many of them are smaller, how many equal it.

    Here, or in all processes together if ``add_up`` makes the sum over them of int64 counts.
    """
    home = flats[0][0].device
    low = torch.zeros((), dtype=torch.int64, device=home)
    below = low.clone()
    every, bits = list(batches(flats)), key_end(dtype).bit_length() - 1
    for shift in range((bits - 1) // BIN_BITS * BIN_BITS, -1, -BIN_BITS):
        bins = torch.zeros(2**BIN_BITS, dtype=torch.int64, device=home)
        for batch in every:
            keys = batch.order_keys(dtype)
            keys -= low.to(keys.device, keys.dtype)
            keys >>= shift
            bins += _count(keys).to(home)
        if add_up is not None:
            bins = add_up(bins)
        cumulative = below + bins.cumsum(0)
        chosen = torch.searchsorted(cumulative, torch.full_like(low, rank)).clamp_max(2**BIN_BITS - 1)
        low = low + (chosen << shift)
        below = cumulative.gather(0, chosen) - bins.gather(0, chosen)
    return low, below, bins.gather(0, chosen)


def _count(numbers: Tensor) -> Tensor:
    """How many integers are 0, 1, ..., 2 ** BIN_BITS - 1; others are not counted. They are overwritten."""
    bins = 2**BIN_BITS
    if numbers.is_cuda and not torch.are_deterministic_algorithms_enabled():  # old versions refuse histc then
        return torch.histc(numbers.clamp_(-1, bins).int(), bins, 0, bins - 1)
    places = torch.where((numbers < 0) | (numbers >= bins), bins, numbers.long())
    counts = torch.zeros(bins + 1, dtype=torch.int64, device=numbers.device)
    return counts.scatter_add_(0, places, torch.ones_like(places))[:-1]


def keep_largest_in_rows_on_device(
    out: Tensor, keys: Tensor, mask: Tensor | None, counts: Tensor, unpruned: Tensor
) -> None:
    """As :func:`torch_sap.decide.exact.keep_largest_in_rows`."""
    if mask is not None:
        keys.masked_fill_(~mask, -1)
    go = (keys.shape[1] - unpruned + counts)[:, None]  # the pruned ones come first
    stay = torch.arange(keys.shape[1], device=keys.device) >= go
    out.copy_(torch.empty_like(stay).scatter_(1, keys.sort(dim=1, stable=True).indices, stay).view(out.shape))
