"""The c smallest magnitudes of a group, exactly: one search, with ties by position.

The k-th smallest key is found by counting. An interval of keys that holds it is cut into bins, the entries in each bin
are counted, and the bin with the k-th entry becomes the next interval, until that is a single key. Counts add up over
pieces, tensors and processes. On the CPU a sample gives a first, short interval while the sums are made: the few keys
in it are kept, and mostly the k-th is among them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_sap.decide.backends import NUMPY, Backend
from torch_sap.decide.bounds import Hyperparameters
from torch_sap.decide.groups import Entry, Group, Piece, Shard, pieces
from torch_sap.decide.keys import key_bits
from torch_sap.decide.sums import index_from_sums
from torch_sap.decide.threads import scratch

WORTHWHILE = 2**16
"""Entries of a group from which on a sample is worth its time."""

SAMPLE = (2**12, 2**17)
"""The sample is one in 128 entries of a group, but so many at least and at most."""

RUN = 8
"""Neighbors that a sample takes: they come from memory together. More of them would say less, since they are often of
one row, whose magnitudes may be larger or smaller than others'."""

MARGIN = 1.25
"""Half the width of the interval, in square roots of the sample's size. The rank that a sample lets expect spreads by
0.2 to 0.35 of them for normal, uniform and Laplace weights and (p, q) of (0.5, 1) and (1, 2)."""

MOST_KEPT = NUMPY.chunk // 16
"""Keys of a piece that are kept; where more lie in the interval (equal weights) it is given up."""


class Window(NamedTuple):
    """An interval of keys, from ``low`` to below ``high``, that should hold the last one to go."""

    low: int
    high: int

    def look(self, piece: Piece, keys: NDArray[Any], d: NDArray[np.int64], sums: object) -> tuple[int, Any]:
        """Count the unpruned keys of a piece below the window, and return those in it; None if they are too many."""
        smaller = np.less(keys, self.low, out=scratch("smaller", keys.shape, np.bool_))
        inside = np.less(keys, self.high, out=scratch("inside", keys.shape, np.bool_))
        np.logical_xor(inside, smaller, out=inside)
        below = int(np.count_nonzero(smaller)) - (len(keys) - int(d.sum()))  # pruned entries have the key 0
        places = np.flatnonzero(inside)
        return below, keys.take(places) if len(places) <= MOST_KEPT else None


def expected_window(entries: Sequence[Entry], group: Group, rule: Hyperparameters) -> Window | None:
    """The window for what a rule will prune of a group on the CPU, judged by a sample; None if there is none.

    Groups that are small, sharded, or lose nothing by the sample have no window, and those that lose zeros.
    """
    members = [entries[i] for i in group.members]
    total = sum(entry.scores.numel() for entry in members)
    if total < WORTHWHILE or any(entry.part is not None for entry in members):
        return None
    sample = _sample(members, total, group.dtype)
    count = _count_in(sample, group.dtype, rule)
    if count == 0:
        return None
    margin = int(MARGIN * len(sample) ** 0.5)
    ranks = np.clip([count - margin, count + margin], 0, len(sample) - 1)
    low, high = np.partition(sample, ranks)[ranks].tolist()
    return Window(low, high + 1) if low > 0 else None


def _count_in(sample: NDArray[Any], dtype: torch.dtype, rule: Hyperparameters) -> int:
    """How many entries of a sample a rule would prune if they were the group."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        values = NUMPY.magnitudes(sample, dtype)
        d, sum_p, sum_q = np.array(len(sample)), np.sum(values**rule.p), np.sum(values**rule.q)
        index = index_from_sums(np.asarray(sum_p), np.asarray(sum_q), d, p=rule.p, q=rule.q)
    return int(rule.count(index, d))


def _sample(entries: Sequence[Entry], total: int, dtype: torch.dtype) -> NDArray[Any]:
    """Keys of unpruned entries, a few neighbors at regular distances."""
    step = RUN * (-(-total // max(SAMPLE[0], min(total // 128, SAMPLE[1]))) or 1)

    def take(scores: Tensor, mask: Tensor | None) -> NDArray[Any]:
        run = min(RUN, scores.numel())
        keys: NDArray[Any] = NUMPY.keys(NUMPY.view(_flat(scores).unfold(0, run, step)), None, dtype)
        if mask is None:
            return keys.copy()
        return keys.take(np.flatnonzero(_flat(mask).unfold(0, run, step).numpy()))

    return np.concatenate([take(entry.scores, entry.mask) for entry in entries if entry.scores.numel()])


def _flat(tensor: Tensor) -> Tensor:
    """The entries of a tensor in one dimension, as they lie in memory if it fills that: without a copy."""
    order = sorted(range(tensor.dim()), key=lambda dim: tensor.stride()[dim], reverse=True)
    return tensor.permute(order).reshape(-1)


class Cut(NamedTuple):
    """What goes of a group: entries with a smaller key, and the first ``left`` of the unpruned ones with just this key.

    Numbers on the CPU, tensors of one entry on a device, which is not waited for.
    """

    key: Any
    left: Any
    all_ties: bool
    """Whether all entries with just this key are known to go."""


def find(
    entries: Sequence[Entry],
    group: Group,
    count: int,
    unpruned: int,
    backend: Backend,
    window: Window | None = None,
    seen: Sequence[tuple[int, Any]] = (),
) -> Cut:
    """Find the ``count`` smallest of a group's unpruned entries.

    Args:
        entries: All entries.
        group: The group, not by row.
        count: Entries to take away, at least 1 and at most ``unpruned``.
        unpruned: Unpruned entries of the group, in all processes.
        backend: The arithmetic.
        window: The window that was looked through while the sums were made, if there was one.
        seen: What :meth:`Window.look` returned for each piece.
    """
    if window is not None and all(inside is not None for _, inside in seen):
        left = count - sum(below for below, _ in seen)
        inside = np.concatenate([keys for _, keys in seen])
        if 0 < left <= len(inside):
            key = int(np.partition(inside, left - 1)[left - 1])
            left -= int(np.count_nonzero(inside < key))
            return Cut(key, left, left == int(np.count_nonzero(inside == key)))
    work, part = _work(entries, group, backend), shared_part(entries, group)
    if part is None and sum(entries[i].scores.numel() for i in group.members) <= backend.chunk:
        pruned = sum(entries[i].scores.numel() for i in group.members) - unpruned
        keys = backend.join(backend.keys(*piece.views[:2], group.dtype) for piece, _ in work)
        key, left = first_to_stay(backend, keys[None], [count], [pruned])
        return Cut(key[0, 0], left[0, 0], False)
    if part is not None:  # whole tensors are counted once, by the first process
        work = [(piece, i) for piece, i in work if entries[i].part is not None or part.rank == 0]

    def histogram(low: Any, shift: int) -> Tensor:
        def count_piece(piece: Piece, i: int) -> Tensor:
            scores, mask = piece.views[:2]
            return backend.histogram(backend.keys(scores, mask, group.dtype), mask, low, shift)

        bins = torch.zeros(2**backend.bin_bits, dtype=torch.int64, device=entries[group.members[0]].scores.device)
        for counts in backend.map(count_piece, work):
            bins += counts.to(bins.device)
        return bins if part is None else part.add_up(bins)

    key, below, equal = narrow(histogram, count, key_bits(group.dtype), backend.bin_bits)
    if backend is NUMPY:
        return Cut(int(key), count - int(below), count - int(below) == int(equal))
    return Cut(key, count - below, False)


def first_to_stay(backend: Backend, keys: Any, count: Any, pruned: Any) -> tuple[Any, Any]:
    """For rows of keys (R, L) the last key to go of each row, and how many entries with just this key go.

    Args:
        backend: The arithmetic.
        keys: Keys, 0 for pruned entries.
        count: Unpruned entries of each row that go.
        pruned: Pruned entries of each row. They come before all others in the order of keys.

    Returns:
        Keys and numbers, of shape (R, 1); key -1 where nothing is pruned.
    """
    count, pruned = backend.numbers(count, keys), backend.numbers(pruned, keys)
    key, smaller = backend.kth(keys, count + pruned)
    return key, count[:, None] + (pruned[:, None] - smaller) * (key > 0)


def narrow(
    histogram: Callable[[Any, int], Tensor], rank: int, bits: int, bin_bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the rank-th smallest key (from 1), how many are smaller, and how many equal it.

    Args:
        histogram: Of the keys from its first argument on, in bins of ``2 ** shift`` keys; int64 of shape (2^bin_bits,).
        rank: At most the number of keys.
        bits: Bits of a key.
        bin_bits: Bits that one histogram finds.

    Returns:
        Three int64 tensors of one entry, on the device of the histograms, which is not waited for.
    """
    low: Any = torch.zeros((), dtype=torch.int64)
    below: Any = 0
    for shift in range((bits - 1) // bin_bits * bin_bits, -1, -bin_bits):
        bins = histogram(low, shift)
        low = low.to(bins.device)
        cumulative = below + bins.cumsum(0)
        chosen = torch.searchsorted(cumulative, torch.full_like(low, rank)).clamp_max(len(bins) - 1)
        low = low + (chosen << shift)
        below = cumulative.gather(0, chosen) - bins.gather(0, chosen)
    return low, below, bins.gather(0, chosen)


def shared_part(entries: Sequence[Entry], group: Group) -> Shard | None:
    """A part that stands for the processes that hold a group; None if nothing of it is sharded.

    Raises:
        NotImplementedError: if its tensors are sharded over different processes.
    """
    parts = [part for i in group.members if (part := entries[i].part) is not None]
    if any(not part.same_processes(parts[0]) for part in parts):
        raise NotImplementedError(
            "parameters of one group must be sharded over the same processes; use scope 'layer' or 'neuron'"
        )
    return parts[0] if parts else None


def _work(
    entries: Sequence[Entry], group: Group, backend: Backend, outputs: Sequence[Tensor | None] = ()
) -> list[tuple[Piece, int]]:
    """The pieces of a group in order of position, each with the number of its entry."""
    work = []
    for i in group.members:
        tensors = (entries[i].scores, entries[i].mask, outputs[i] if outputs else None)
        work += [(piece, i) for piece in pieces(entries[i], tensors, backend.chunk, backend.view)]
    return work


def apply(
    entries: Sequence[Entry],
    group: Group,
    cut: Cut,
    backend: Backend,
    outputs: Sequence[Tensor],
    store: Callable[[Piece, Any, Any, Any], Any],
) -> list[Any]:
    """Store what stays of a group, piece by piece.

    Args:
        entries: All entries.
        group: The group, not by row.
        cut: What goes.
        backend: The arithmetic.
        outputs: Per entry, a tensor whose pieces ``store`` gets.
        store: Called with a piece, its keys (1, L), the last key to go, and how many entries with just this key go.

    Returns:
        What ``store`` returned for each entry, added up; in the order of the members.
    """
    work, part = _work(entries, group, backend, outputs), shared_part(entries, group)

    def keys_of(piece: Piece) -> Any:
        return backend.keys(piece.views[0], None, group.dtype)  # pruned ones are left out by their mask

    lefts: list[Any] = [None] * len(work)
    interleaved: dict[int, int] = {}
    if not cut.all_ties:
        found = backend.map(lambda piece, i: backend.ties(keys_of(piece), piece.views[1], cut.key), work)
        starts = {group.members[0]: cut.left}
        if part is not None:
            starts, interleaved = _shares(entries, group, int(cut.left), [i for _, i in work], found, part)
        lefts, left = [], cut.left
        for number, ((_, i), here) in enumerate(zip(work, found, strict=True)):
            if i in starts and (number == 0 or work[number - 1][1] != i):
                left = starts[i]
            lefts.append(left if isinstance(left, Tensor) else max(0, left))
            left = left - here
    jobs = [(piece, i, left) for (piece, i), left in zip(work, lefts, strict=True)]
    kept = backend.map(lambda piece, i, left: store(piece, keys_of(piece)[None], cut.key, left), jobs)
    totals: dict[int, Any] = dict.fromkeys(group.members, 0)
    for (_, i), number in zip(work, kept, strict=True):
        totals[i] = totals[i] + number
    for i, left in interleaved.items():
        totals[i] = totals[i] - _take_interleaved(entries[i], group.dtype, cut.key, left, backend, outputs[i])
    return list(totals.values())


def _shares(
    entries: Sequence[Entry], group: Group, left: int, members: Sequence[int], ties: Sequence[Any], part: Shard
) -> tuple[dict[int, int], dict[int, int]]:
    """How many ties of each entry go in this process, in the order of the unsharded tensors.

    Returns:
        By entry, the ties that go here; and, for those whose parts interleave in that order, the ties that go of the
        whole (none of them is to go here for now).
    """
    table = torch.zeros(1, len(group.members), dtype=torch.int64)
    for i, here in zip(members, ties, strict=True):
        table[0, group.members.index(i)] += int(here)
    every = torch.cat(part.gather(table))
    shares, interleaved = {}, {}
    for number, i in enumerate(group.members):
        own = entries[i].part
        total = int(every[0, number] if own is None else every[:, number].sum())
        shares[i] = left
        if own is not None and own.dim == 0:
            shares[i] = left - int(every[: own.rank, number].sum())
        elif own is not None:
            shares[i], interleaved[i] = 0, left
        left = max(0, left - total)
    return shares, interleaved


def _take_interleaved(entry: Entry, dtype: torch.dtype, key: Any, left: int, backend: Backend, keep: Tensor) -> int:
    """Take the first ``left`` ties of a whole tensor, of which every process has a slice of each row, out of a mask."""
    assert entry.part is not None
    magnitude = torch.empty_like(entry.scores, dtype=torch.bool)
    for piece in pieces(entry, (entry.scores, entry.mask, magnitude), backend.chunk, backend.view):
        scores, mask, out = piece.views
        equal = backend.keys(scores, mask, dtype) == key
        out[...] = (equal if mask is None else equal & mask.reshape(-1)).reshape(out.shape)
    whole = entry.part.gather_along(magnitude)
    go = entry.part.own(whole & (whole.reshape(-1).cumsum(0).view(whole.shape) <= left))
    keep &= ~go
    return int(go.sum())
