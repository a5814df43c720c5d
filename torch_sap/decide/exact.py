"""The smallest magnitudes of many tensors, exactly: c of them, ties by position, nothing concatenated.

The k-th smallest key is found by counting: an interval of keys that holds it is cut into bins, the entries in each
bin are counted, and the bin that holds the k-th entry becomes the next interval, until that is a single key. Counts
add up over chunks and tensors. A sample gives a first, short interval; a wrong guess costs one pass. That is how it is
done on the host; for other devices see :mod:`torch_sap.decide.device`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_sap.decide.device import AddUp, Tensors, keep_largest_in_rows_on_device, keep_largest_on_device
from torch_sap.decide.keys import HOST_CHUNK, chunks, common_dtype, flatten, flatten_all, is_dense, key_end, keys_of
from torch_sap.decide.threads import map_pieces, scratch

BIN_BITS = 16
"""An interval is cut into at most 2 ** BIN_BITS bins."""

SAMPLE = 2**16
"""Entries of a group that the first guess on the host looks at."""

MOST_COLLECTED = HOST_CHUNK // 16
"""Entries of a chunk that are kept to find the key among them; if there are more, bins are counted."""

LONG_ROW = 2**10
"""Entries of a row from which on parting it is faster than sorting all of it, if few go."""


def keep_largest(tensors: Tensors, count: int, pruned: int, *, on_host: bool) -> list[Tensor]:
    """Masks of a group after its ``count`` smallest unpruned magnitudes are taken away.

    Args:
        tensors: The group; scores of any shape and strides, masks of the same shapes.
        count: Entries to take away, at least 1 and at most as many as are unpruned.
        pruned: Entries that the masks exclude already.
        on_host: Whether to work with numpy. All tensors must be on the CPU then.

    Returns:
        New bool masks, one a tensor. Of equal magnitudes those that come first (order of tensors, then flat index) go.
    """
    tensors = [(scores if is_dense(scores) else scores.contiguous(), mask) for scores, mask in tensors]
    if not on_host:
        return keep_largest_on_device(tensors, count, pruned)
    dtype, flats = common_dtype(scores for scores, _ in tensors), flatten_all(tensors)
    # A pruned entry has the key 0: it is smaller than all that may go, and equal only to unpruned zeros.
    key, below, equal = find_on_host(flats, count + pruned, dtype)
    left = count + pruned * (key != 0) - below  # entries with just this key that have to go
    all_go = left == (equal if key else equal - pruned)
    return list(masks_above(tensors, key, left, dtype, all_ties_go=all_go))


def masks_above(
    tensors: Iterable[tuple[Tensor, Tensor | None]], key: int, left: int, dtype: torch.dtype, *, all_ties_go: bool
) -> Iterator[Tensor]:
    """Masks, on the host, that keep the unpruned entries above a key, and those equal to it but the first ``left``."""
    for scores, mask in tensors:
        keep = torch.empty_like(scores, dtype=torch.bool)
        flat = flatten(scores, scores), None if mask is None else flatten(mask, scores)
        _keep_larger(flatten(keep, scores), flat, key, dtype, on_host=True)
        if not all_ties_go:
            left = max(0, left - _keep_late_ties(keep, scores, mask, key, left, dtype, on_host=True))
        yield keep


def _keep_larger(out: Tensor, flat: tuple[Tensor, Tensor | None], key: Any, dtype: torch.dtype, on_host: bool) -> None:
    """Write ``keys > key``."""
    greater: Any = np.greater if on_host else torch.gt

    def write(keep: Any, scores: Any, mask: Any) -> None:
        greater(keys_of(scores, mask, dtype, on_host=on_host, reuse=True), key, out=keep)

    map_pieces(write, list(chunks(out, *flat, on_host=on_host)), on_host=on_host)


def _keep_late_ties(
    keep: Tensor, scores: Tensor, mask: Tensor | None, key: Any, left: Any, dtype: torch.dtype, on_host: bool
) -> Any:
    """Keep the unpruned entries that equal the key, but for the first ``left``; return how many there are."""
    late = torch.zeros(keep.numel(), dtype=torch.bool, device=keep.device)
    ties: Any = 0
    flat_mask = None if mask is None else mask.reshape(-1)
    for out, piece, piece_mask in chunks(late, scores.reshape(-1), flat_mask, on_host=on_host):
        equal = keys_of(piece, piece_mask, dtype, on_host=on_host, reuse=True) == key
        equal = equal if piece_mask is None else equal & piece_mask
        if on_host:
            places = np.flatnonzero(equal)
            out[places[max(0, left - ties) :]] = True
            ties += len(places)
        else:
            rank = ties + equal.cumsum(0)
            torch.logical_and(equal, rank > left, out=out)
            ties = rank[-1]
    keep |= late.view(keep.shape)
    return ties


def find_on_host(flats: Any, rank: int, dtype: torch.dtype, add_up: AddUp | None = None) -> tuple[int, int, int]:
    """The rank-th smallest key (from 1), how many are smaller, how many equal it; here or in all processes together."""
    if add_up is None:
        total = sum(scores.numel() for scores, _ in flats)
        sample = _sample(flats, -(-total // SAMPLE), dtype)
        if len(sample) == total:
            key = sample[rank - 1]
            below, end = np.searchsorted(sample, key), np.searchsorted(sample, key, "right")
            return int(key), int(below), int(end - below)
        low, high = _guess(sample, rank * len(sample) // total)
        below, inside = _collect(flats, low, high, dtype)
        if inside is not None and below < rank <= below + len(inside):
            key = int(np.partition(inside, rank - below - 1)[rank - below - 1])
            return key, below + int(np.count_nonzero(inside < key)), int(np.count_nonzero(inside == key))
    low, high = 0, key_end(dtype)
    while True:
        shift = max(0, (high - low - 1).bit_length() - BIN_BITS)
        below, bins = _count(flats, low, high, shift, dtype)
        if add_up is not None:
            counts = add_up(torch.from_numpy(np.append(bins, below))).numpy()
            below, bins = int(counts[-1]), counts[:-1]
        cumulative = below + np.cumsum(bins)
        chosen = int(np.searchsorted(cumulative, rank))
        low, high = low + (chosen << shift), min(high, low + ((chosen + 1) << shift))
        if high - low == 1:
            return low, int(cumulative[chosen] - bins[chosen]), int(bins[chosen])


def _sample(flats: Tensors, stride: int, dtype: torch.dtype) -> NDArray[Any]:
    """Keys at regular distances, sorted."""
    pieces = [(scores[::stride], None if mask is None else mask[::stride]) for scores, mask in flats]
    return np.sort(np.concatenate([keys_of(*piece, dtype, on_host=True) for piece in pieces]))


def _guess(sample: NDArray[Any], rank: int) -> tuple[int, int]:
    """An interval of keys that should hold the one at this rank of a sorted sample."""
    margin = 3 * int(len(sample) ** 0.5)
    return int(sample[max(0, rank - margin)]), int(sample[min(len(sample) - 1, rank + margin)]) + 1


def _collect(flats: Tensors, low: int, high: int, dtype: torch.dtype) -> tuple[int, NDArray[Any] | None]:
    """How many keys are below ``low``, and those from there to ``high``; None if they are too many to keep."""

    def collect(scores: Any, mask: Any) -> tuple[int, NDArray[Any] | None]:
        keys = keys_of(scores, mask, dtype, on_host=True, reuse=True)
        smaller = np.less(keys, low, out=scratch("smaller", keys.shape, np.bool_))
        inside = np.less(keys, high, out=scratch("inside", keys.shape, np.bool_))
        inside ^= smaller
        few = np.count_nonzero(inside) <= MOST_COLLECTED
        return int(np.count_nonzero(smaller)), keys[np.flatnonzero(inside)] if few else None

    pieces = [piece for flat in flats for piece in chunks(*flat, on_host=True)]
    belows, found = zip(*map_pieces(collect, pieces, on_host=True), strict=True)
    few = [keys for keys in found if keys is not None]
    return sum(belows), np.concatenate(few) if len(few) == len(found) else None


def _count(flats: Iterable[Any], low: int, high: int, shift: int, dtype: torch.dtype) -> tuple[int, NDArray[np.int64]]:
    """How many keys are below ``low``, and how many lie in each bin of ``2 ** shift`` keys from there to ``high``."""
    bins = np.zeros(((high - low - 1) >> shift) + 1, np.int64)
    adding = Lock()

    def count(scores: Any, mask: Any) -> int:
        keys = keys_of(scores, mask, dtype, on_host=True)
        smaller = keys < low
        counts = np.bincount((keys[(keys < high) ^ smaller] - low) >> shift, minlength=len(bins))
        with adding:
            np.add(bins, counts, out=bins)
        return int(np.count_nonzero(smaller))

    # tensor by tensor: they may be read from somewhere one by one
    return sum(sum(map_pieces(count, list(chunks(*flat, on_host=True)), on_host=True)) for flat in flats), bins


def keep_largest_in_rows(out: Any, keys: Any, mask: Any, counts: Any, unpruned: Any, *, on_host: bool) -> None:
    """Write the mask of some rows after the ``counts`` smallest unpruned magnitudes of each are taken away.

    Args:
        out: Bool, the new mask: first dimension rows, otherwise of any shape with as many entries, and any strides.
        keys: Keys of the scores, shape (rows, entries), those of pruned entries of any value; they are overwritten.
        mask: Bool mask of the same shape, or None.
        counts: int64, shape (rows,): entries to take away, from 0 to the number of unpruned ones.
        unpruned: int64, shape (rows,): that number.
        on_host: Whether all of these are arrays, or else tensors.

    Of equal magnitudes in a row the first go.
    """
    if not on_host:
        keep_largest_in_rows_on_device(out, keys, mask, counts, unpruned)
        return
    first = (keys.shape[1] - unpruned)[:, None]  # as many keys of pruned entries, -1, come before all others
    in_place = out.flags.c_contiguous
    keep = out.reshape(keys.shape) if in_place else scratch("keep", keys.shape, np.bool_)
    _keep_rows_on_host(keep, keys, mask, first, first + counts[:, None])
    if not in_place:
        out[...] = keep.reshape(out.shape)


def _keep_rows_on_host(
    keep: NDArray[np.bool_],
    keys: NDArray[Any],
    mask: NDArray[np.bool_] | None,
    first: NDArray[np.int64],
    go: NDArray[np.int64],
) -> None:
    """Write which keys stay: all but the ``go`` smallest of each row; ``first`` of these are of pruned entries."""
    if not keys.size:
        return
    if mask is not None:
        excluded = np.subtract(mask.view(np.int8), 1, out=scratch("excluded", mask.shape, np.int8))
        np.bitwise_or(keys, excluded, out=keys)
    ordered = scratch("ordered", keys.shape, keys.dtype)
    ordered[...] = keys
    end = int(go.max(initial=1))  # the keys that go are among so many smallest
    if keys.shape[1] >= LONG_ROW and end <= keys.shape[1] // 2:
        ordered.partition(end - 1, axis=1)
        ordered = ordered[:, :end]
    ordered.sort(axis=1)
    last = np.where(go > first, np.take_along_axis(ordered, np.maximum(go - 1, 0), 1), -1).astype(keys.dtype)
    np.greater(keys, last, out=keep)
    if np.count_nonzero(keep) == keep.size - int(go.sum()):  # what equals the last goes, too
        return
    left = go - (ordered == last).argmax(axis=1, keepdims=True)  # that go of those that equal the last
    equal = np.equal(keys, last, out=scratch("equal", keys.shape, np.bool_))
    places = np.flatnonzero(equal)  # in one dimension numpy is several times faster
    rows = places // max(1, keys.shape[1])
    rank = np.arange(len(rows)) - np.searchsorted(rows, np.arange(len(keys)))[rows]  # among the equal ones of a row
    keep.reshape(-1)[places[rank >= left[rows, 0]]] = True
