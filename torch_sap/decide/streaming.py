"""The SAP step for one group that is never in memory as a whole: its tensors come one by one, or in pieces."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_sap.decide.bounds import Hyperparameters
from torch_sap.decide.exact import find_on_host, masks_above
from torch_sap.decide.histogram import empty_bins
from torch_sap.decide.keys import check_dtype, chunks, flatten, keys_of
from torch_sap.decide.sieve import count_in
from torch_sap.decide.step import GroupValues
from torch_sap.decide.sums import Bins, block_sums, exact_sum, index_from_sums, power_sums
from torch_sap.decide.threads import map_pieces, scratch

Stream = Callable[[], Iterable[Tensor]]
"""Gives the tensors of a group on the CPU, in order of position: the same ones each time that it is called."""

MARGIN = 0.01
"""Distance of the two keys of a guess from the one expected, as a share of the sample."""

MOST_KEYS = 2**22
"""Keys between the two at most: so many numbers are kept of a group while its sums are made."""


class Piece(NamedTuple):
    """A tensor on the CPU or the next part of one: a number of sums.BLOCK entries unless it is the last."""

    name: str
    values: Tensor
    is_last: bool = True


Pieces = Callable[[], Iterable[Piece]]
"""Gives the pieces of a group in order of position: the same ones each time that it is called."""


class Threshold(NamedTuple):
    """What goes: entries with a smaller key, and the first ``left`` of those with just this key."""

    key: int
    left: int
    dtype: torch.dtype

    def masks(self, tensors: Iterable[Tensor]) -> Iterator[Tensor]:
        """Masks of the group's tensors or pieces, in order of position, one for each that is taken."""
        left = self.left
        for tensor in tensors:
            ties = self._ties(tensor) if left else 0
            key, go = (self.key, left) if left else (self.key - 1, 0)
            yield from masks_above([(tensor, None)], key, go, self.dtype, all_ties_go=not left or ties <= left)
            left = max(0, left - ties)

    def _ties(self, tensor: Tensor) -> int:
        def count(piece: Any) -> int:
            keys = keys_of(piece, None, self.dtype, on_host=True, reuse=True)
            return int(np.count_nonzero(np.equal(keys, self.key, out=scratch("equal", keys.shape, np.bool_))))

        return sum(map_pieces(count, list(chunks(flatten(tensor, tensor), on_host=True)), on_host=True))


def prune_stream(stream: Stream, rule: Hyperparameters) -> tuple[GroupValues, Iterator[Tensor]]:
    """Decide what SAP prunes of a group of any size, all of whose entries are unpruned.

    The stream is read three or four times before the masks (once if all tensors are of one 16-bit type), and once more
    for them; one tensor is held at a time.

    Args:
        stream: Called without arguments each time that the tensors are needed; real floating point, on the CPU.
        rule: The five numbers.

    Returns:
        d, I, r and c, arrays of one value; and the masks of the tensors, made while they are iterated over.

    Raises:
        ValueError: if the sums of the magnitudes' powers are not finite: an entry is NaN or infinite, or too large.
        TypeError: if stream is no function, or a tensor is not of a real floating-point type.

    Example:
        >>> from torch_sap.decide.bounds import Hyperparameters
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
    if not isinstance(rule, Hyperparameters):
        raise TypeError(f"rule must be torch_sap.decide.bounds.Hyperparameters, got {type(rule).__name__}")

    def pieces() -> Iterator[Piece]:
        return (Piece(f"tensor {number} of the stream", tensor) for number, tensor in enumerate(stream()))

    values, threshold = decide(pieces, rule)
    if threshold is None:
        return values, (torch.ones_like(tensor, dtype=torch.bool) for tensor in stream())
    return values, threshold.masks(stream())


def decide(pieces: Pieces, rule: Hyperparameters, guess: Guess | None = None) -> tuple[GroupValues, Threshold | None]:
    """What SAP prunes of a group of pieces.

    Args:
        pieces: The group, all of whose entries are unpruned.
        rule: The five numbers.
        guess: Where the last entry to go should be. With a good one the pieces are read once, without one (or with a
            wrong one) two or three times more. Pieces that are all of one 16-bit type are read once without a guess.

    Returns:
        d, I, r and c, arrays of one value, equal to those of the whole tensors in memory; and what goes, None if
        nothing does.

    Raises:
        ValueError: if the sums are not finite; the piece is named.
        TypeError: if a piece is not of a real floating-point type.
    """
    sums = _Sums(rule, guess)
    for piece in pieces():
        sums.add(piece)
    values = sums.values()
    count = int(values.c[0])
    if count == 0:
        return values, None
    found = sums.find(count) if guess is None else guess.find(count)
    if found is None:
        found = find_on_host(_Flats(pieces), count, sums.dtype, add_up=lambda counts: counts)[:2]
    key, below = found
    return values, Threshold(key, count - below, sums.dtype)


class Guess:
    """Two keys between which the last entry to go should lie, and how often each key in between occurs.

    They are far apart, so that the guess is seldom wrong: an entry in between costs little.

    Args:
        sample: Keys of some entries of the group.
        dtype: Type that they are keys of: the common one of the group.
        rule: The five numbers.
    """

    def __init__(self, sample: NDArray[Any], dtype: torch.dtype, rule: Hyperparameters) -> None:
        sample = np.sort(sample)
        rank, margin = count_in(sample, dtype, rule), int(MARGIN * len(sample)) + 1
        middle, low, high = (int(sample[np.clip(i, 0, len(sample) - 1)]) for i in (rank, rank - margin, rank + margin))
        self.dtype, self.below = dtype, 0
        self.low, self.high = max(low, middle - MOST_KEYS // 2), min(high, middle + MOST_KEYS // 2) + 1
        self.counts = np.zeros(self.high - self.low, np.int64)

    def look(self, keys: NDArray[Any]) -> tuple[int, NDArray[Any]]:
        """How many keys of a piece are below, and those in between."""
        smaller = np.less(keys, self.low, out=scratch("smaller", keys.shape, np.bool_))
        inside = np.less(keys, self.high, out=scratch("inside", keys.shape, np.bool_))
        inside ^= smaller
        return int(np.count_nonzero(smaller)), keys[np.flatnonzero(inside)]

    def add(self, seen: Iterable[tuple[int, NDArray[Any]]]) -> None:
        """Remember what was seen."""
        for below, inside in seen:
            self.below += below
            if len(self.counts) < 2**16:
                self.counts += np.bincount(inside - self.low, minlength=len(self.counts))
            else:
                keys, counts = np.unique(inside, return_counts=True)
                self.counts[keys - self.low] += counts

    def find(self, rank: int) -> tuple[int, int] | None:
        """The rank-th smallest key (from 1) and how many are smaller; None if it lies elsewhere."""
        if not self.below < rank <= self.below + int(self.counts.sum()):
            return None
        place, before = _at_rank(self.counts, rank - self.below)
        return self.low + place, self.below + before


class _Flats:
    def __init__(self, pieces: Pieces) -> None:
        self.pieces = pieces

    def __iter__(self) -> Iterator[tuple[Tensor, None]]:
        return ((flatten(piece.values, piece.values), None) for piece in self.pieces())


class _Sums:
    """Power sums of a group, of each tensor for itself as in memory, and the counts of a guess in the same pass."""

    def __init__(self, rule: Hyperparameters, guess: Guess | None) -> None:
        self.rule, self.guess = rule, guess
        self.dtype = torch.float16 if guess is None else guess.dtype
        self.d = 0
        self.tables: list[list[float]] = []
        self.blocks: tuple[list[Any], list[Any]] = ([], [])
        self.bins: Bins | None = None
        self.counts: dict[torch.dtype, NDArray[np.int64] | None] = {}  # of the tensors that are complete, by type

    def add(self, piece: Piece) -> None:
        if not isinstance(piece.values, Tensor):
            raise TypeError(f"{piece.name} must be a tensor, got {type(piece.values).__name__}")
        check_dtype(piece.values, piece.name)
        flat, dtype = flatten(piece.values, piece.values), piece.values.dtype
        if self.guess is None:
            self.dtype = dtype if self.d == 0 else torch.promote_types(self.dtype, dtype)

        if dtype.itemsize == 2 and self.bins is None:
            self.bins = Bins(dtype)

        def work(scores: Any, _: None) -> tuple[list[Any], Any]:
            keys = keys_of(scores, None, self.dtype, on_host=True, reuse=True)
            seen = None if self.guess is None else self.guess.look(keys)
            if self.bins is None:
                return power_sums(keys, self.dtype, (self.rule.p, self.rule.q), 1.0, block_sums), seen
            self.bins.add(keys if dtype == self.dtype else keys_of(scores, None, dtype, on_host=True, reuse=True))
            return [[], []], seen

        found = map_pieces(work, list(chunks(flat, None, on_host=True)), on_host=True)
        if self.guess is not None:
            self.guess.add(seen for _, seen in found)
        for sums, _ in found:
            for blocks, more in zip(self.blocks, sums, strict=True):
                blocks += more
        self.d += flat.numel()
        if piece.is_last:
            self._end_tensor(piece.name, dtype)

    def _end_tensor(self, name: str, dtype: torch.dtype) -> None:
        if self.bins is None:
            self.counts[dtype] = None
            self.tables.append([exact_sum(blocks) for blocks in self.blocks])
        else:
            more = empty_bins(dtype) if self.bins.counts is None else self.bins.counts
            before = self.counts.get(dtype)
            self.counts[dtype] = more if before is None else before + more
            self.tables.append(self.bins.sums((self.rule.p, self.rule.q)))
        if not np.isfinite(self.tables[-1]).all():
            raise ValueError(f"{name} must be finite and so must the sums of its powers")
        self.blocks, self.bins = ([], []), None

    def values(self) -> GroupValues:
        sum_p, sum_q = (np.array([math.fsum(table[i] for table in self.tables)]) for i in (0, 1))
        size = np.array([self.d])
        index = index_from_sums(sum_p, sum_q, size, p=self.rule.p, q=self.rule.q)
        return GroupValues(size, index, self.rule.retain(index, size), self.rule.count(index, size))

    def find(self, rank: int) -> tuple[int, int] | None:
        """The rank-th smallest key (from 1) and how many are smaller; None if not all are of one type and counted."""
        counts = next(iter(self.counts.values())) if len(self.counts) == 1 else None
        return None if counts is None else _at_rank(counts, rank)


def _at_rank(counts: NDArray[np.int64], rank: int) -> tuple[int, int]:
    """Where the rank-th entry (from 1) lies of so many at each place, and how many lie before that place."""
    cumulative = np.cumsum(counts)
    place = int(np.searchsorted(cumulative, rank))
    return place, int(cumulative[place] - counts[place])
