"""The c smallest magnitudes of a group, exactly: one search, with ties by position.

The k-th smallest key is found by counting. An interval of keys that holds it is cut into bins, the entries in each bin
are counted, and the bin with the k-th entry becomes the next interval, until that is a single key. Counts add up over
pieces, tensors and processes. On the CPU a sample gives a first, short interval while the sums are made: the few keys
in it are kept, and mostly the k-th is among them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
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
"""Group size above which a sample is worth its time."""

SAMPLE = (2**12, 2**17)
"""Least and most entries of a sample, which is one in 128 of a group in between."""

RUN = 8
"""Neighbors that a sample takes: they come from memory together. More of them would say less, since they are often of
one row, whose magnitudes may be larger or smaller than others'."""

MARGIN = 1.25
"""Half the width of the interval, in square roots of the sample's size. The rank that a sample lets expect spreads by
0.2 to 0.35 of them for normal, uniform and Laplace weights and (p, q) of (0.5, 1) and (1, 2)."""

BATCH = 16
"""Histograms in memory at once: half a megabyte each on the CPU."""

MOST_KEPT = NUMPY.chunk // 16
"""Most keys of a piece that are kept; with more in the interval (equal weights) it is given up."""


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


def expected_window(group: Group, rule: Hyperparameters) -> Window | None:
    """Estimate a window for what a rule will prune of a group on the CPU, from a sample.

    None for groups that are small or sharded, lose nothing by the sample, or lose zeros.
    """
    if group.size < WORTHWHILE or group.part is not None:
        return None
    sample = _sample(group)
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


def _sample(group: Group) -> NDArray[Any]:
    """Keys of unpruned entries, a few neighbors at regular distances."""
    step = RUN * (-(-group.size // max(SAMPLE[0], min(group.size // 128, SAMPLE[1]))) or 1)
    step += step > RUN  # a multiple of the row length would see a few columns only

    def take(scores: Tensor, mask: Tensor | None) -> NDArray[Any]:
        run = min(RUN, scores.numel())
        keys: NDArray[Any] = NUMPY.keys(NUMPY.view(_flat(scores).unfold(0, run, step)), None, group.dtype)
        if mask is None:
            return keys.copy()
        return keys.take(np.flatnonzero(_flat(mask).unfold(0, run, step).numpy()))

    return np.concatenate([take(entry.scores, entry.mask) for entry in group.entries if entry.scores.numel()])


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


NOTHING = Cut(-1, 0, True)
"""Nothing goes."""


def find(
    group: Group, count: int, unpruned: int, backend: Backend, window: Window | None, seen: Sequence[tuple[int, Any]]
) -> Cut:
    """Find the ``count`` smallest of a group's ``unpruned`` entries (in all processes), at least 1; not by row.

    ``window`` was looked through while the sums were made, if there was one; ``seen`` is what :meth:`Window.look`
    returned for each piece.
    """
    if window is not None and all(inside is not None for _, inside in seen):
        left = count - sum(below for below, _ in seen)
        inside = np.concatenate([keys for _, keys in seen])
        if 0 < left <= len(inside):
            inside.partition(left - 1)
            key = int(inside[left - 1])
            left -= int(np.count_nonzero(inside < key))
            return Cut(key, left, left == int(np.count_nonzero(inside == key)))
    part = group.part
    if part is None and group.size <= backend.chunk:
        keys = backend.join(backend.keys(p.scores, p.mask, group.dtype) for p, _ in _pieces(group, backend))
        key, of_this = last_to_go(backend, keys[None], [count], [group.size - unpruned])
        return Cut(key[0, 0], of_this[0, 0], False)
    # whole tensors are counted once, by the first process
    work = [(p,) for p, entry in _pieces(group, backend) if part is None or entry.part is not None or part.rank == 0]
    home = group.entries[0].scores.device

    def histogram(low: Tensor, shift: int) -> Tensor:
        def count_piece(p: Piece) -> Tensor:
            return backend.histogram(backend.keys(p.scores, p.mask, group.dtype), p.mask, low, shift).to(home)

        bins = torch.zeros(2**backend.bin_bits, dtype=torch.int64, device=home)
        for start in range(0, len(work), BATCH):
            for counts in backend.map(count_piece, work[start : start + BATCH]):
                bins += counts
        return bins if part is None else part.add_up(bins)

    last, below, equal = narrow(histogram, count, key_bits(group.dtype), backend.bin_bits)
    if backend is NUMPY:
        return Cut(int(last), count - int(below), count - int(below) == int(equal))
    return Cut(last, count - below, False)


def _pieces(group: Group, backend: Backend) -> list[tuple[Piece, Entry]]:
    """The pieces of a group in order of position, each with its entry."""
    return [(p, entry) for entry in group.entries for p in pieces(entry, backend.chunk, backend.view)]


def last_to_go(backend: Backend, keys: Any, count: Any, pruned: Any) -> tuple[Any, Any]:
    """For rows of keys (R, L) the last key to go of each row, and how many entries with just this key go.

    Of each row ``count`` unpruned entries go; ``pruned`` ones, whose keys are 0, come before all others. Both results
    have shape (R, 1); the key is -1 where neither is.
    """
    count, pruned = backend.numbers(count, keys), backend.numbers(pruned, keys)
    key, smaller = backend.kth(keys, count + pruned)
    return key, count[:, None] + (pruned[:, None] - smaller) * (key > 0)


def narrow(
    histogram: Callable[[Any, int], Tensor], rank: int, bits: int, bin_bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the rank-th smallest key (from 1), how many are smaller, and how many equal it.

    ``histogram(low, shift)`` counts the keys from ``low`` on in 2^bin_bits bins of 2^shift keys. The results are int64
    tensors of one entry on the device of the histograms, which is not waited for.
    """
    low: Any = torch.zeros((), dtype=torch.int64, device="cpu")
    below: Any = 0
    for shift in range((bits - 1) // bin_bits * bin_bits, -1, -bin_bits):
        bins = histogram(low, shift)
        low = low.to(bins.device)
        cumulative = below + bins.cumsum(0)
        chosen = torch.searchsorted(cumulative, torch.full_like(low, rank)).clamp_max(len(bins) - 1)
        low = low + (chosen << shift)
        below = cumulative.gather(0, chosen) - bins.gather(0, chosen)
    return low, below, bins.gather(0, chosen)


def apply(group: Group, cut: Cut, backend: Backend, store: Callable[[Piece, Any, Any, Any], Any]) -> list[Any]:
    """Store what stays of a group, not by row, piece by piece.

    ``store`` is called with a piece, its keys (1, L), the last key to go, and how many entries with just this key go
    (None: all). Returned is what it returned for each entry, added up.
    """
    work, part = _pieces(group, backend), group.part

    def keys_of(p: Piece) -> Any:
        return backend.keys(p.scores, None, group.dtype)  # pruned ones are left out by their mask

    lefts: list[Any] = [None] * len(work)
    interleaved: dict[int, int] = {}
    if not cut.all_ties:
        ties = backend.map(lambda p, _: backend.ties(keys_of(p), p.mask, cut.key), work)
        starts = {id(group.entries[0]): cut.left}
        if part is not None:
            starts, interleaved = _shares(group, int(cut.left), [entry for _, entry in work], ties, part)
        lefts, left = [], cut.left
        for (_, entry), here in zip(work, ties, strict=True):
            left = starts.pop(id(entry), left)
            lefts.append(left if isinstance(left, Tensor) else max(0, left))
            left = left - here
    jobs = [(p, left) for (p, _), left in zip(work, lefts, strict=True)]
    kept = backend.map(lambda p, left: store(p, keys_of(p)[None], cut.key, left), jobs)
    totals: dict[int, Any] = dict.fromkeys(map(id, group.entries), 0)
    for (_, entry), number in zip(work, kept, strict=True):
        totals[id(entry)] = totals[id(entry)] + number
    for entry in group.entries:
        if (left := interleaved.get(id(entry))) is not None:
            totals[id(entry)] -= _take_interleaved(entry, group.dtype, cut.key, left, backend)
    return list(totals.values())


def _shares(
    group: Group, left: int, owners: Sequence[Entry], ties: Sequence[Any], part: Shard
) -> tuple[dict[int, int], dict[int, int]]:
    """Count the ties of each entry that go in this process, in the order of the unsharded tensors.

    Returns:
        By the id of the entry, the ties that go here; and, for those whose parts interleave in that order, the ties
        that go of the whole (none of them is to go here for now).
    """
    own = torch.tensor(
        [[sum(int(n) for o, n in zip(owners, ties, strict=True) if o is e) for e in group.entries]],
        device="cpu",
    )
    every = torch.cat(part.gather(own))
    shares, interleaved = {}, {}
    for number, entry in enumerate(group.entries):
        held = entry.part
        shares[id(entry)] = left
        if held is not None and held.dim == 0:
            shares[id(entry)] = left - int(every[: held.rank, number].sum())
        elif held is not None:
            shares[id(entry)], interleaved[id(entry)] = 0, left
        left = max(0, left - int(every[0, number] if held is None else every[:, number].sum()))
    return shares, interleaved


def _take_interleaved(entry: Entry, dtype: torch.dtype, key: Any, left: int, backend: Backend) -> int:
    """Take the first ``left`` ties of a whole tensor, of which every process has a slice of each row, out of a mask."""
    assert entry.part is not None and entry.out is not None
    tied = replace(entry, out=torch.empty_like(entry.out))
    for p in pieces(tied, backend.chunk, backend.view):
        equal = (backend.keys(p.scores, None, dtype) == key).reshape(p.out.shape)
        p.out[...] = equal if p.mask is None else equal & p.mask
    assert tied.out is not None
    whole = entry.part.gather_along(tied.out)
    go = entry.part.own(whole & (whole.reshape(-1).cumsum(0).view(whole.shape) <= left))
    entry.out.logical_and_(~go)
    return int(go.sum())
