"""A guess that saves passes: while power sums are made, masks are written for the count that a sample lets expect.

The sample gives two keys between which the last entry to go should lie. All entries below the lower one are pruned at
once; the few in between are kept and remembered, and when the count is known the smallest of them go too. A wrong
guess is noticed, and costs the time that it took.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_sap.decide.bounds import Hyperparameters
from torch_sap.decide.device import Tensors
from torch_sap.decide.keys import HOST_CHUNK, flatten, is_dense, keys_of, magnitudes
from torch_sap.decide.sums import index_from_sums
from torch_sap.decide.threads import scratch

WORTHWHILE = 2**16
"""Entries of a group that are not sorted faster than sieved."""

SAMPLE = (2**12, 2**17)
"""The guess is made from one in 128 entries of a group, but from so many at least and at most."""

RUN = 8
"""Entries side by side that a sample takes: they come from memory together. More of them would say less, since they are
often of one row, whose magnitudes may be larger or smaller than others'."""

MARGIN = 1.25
"""Half the distance between the two keys, in square roots of the sample's size. The number that a sample lets expect
spreads by 0.2 to 0.35 of them for normal, uniform and Laplace weights and (p, q) of (0.5, 1) and (1, 2)."""

MOST_REMEMBERED = HOST_CHUNK // 16
"""Entries of a piece that are remembered; where more lie between the keys (equal weights) the guess is given up."""


class Sifted(NamedTuple):
    """What was found in a piece: the entries that the guess keeps, and which of them lie between the two keys."""

    kept: int
    between: tuple[NDArray[np.int64], NDArray[Any]] | None
    """Their places in the piece and their keys; None if they are too many."""
    keep: NDArray[np.bool_]
    """The piece of the mask."""


class Sieve:
    """Masks for a guessed count, on the host.

    Args:
        tensors: The group, scores that fill their memory and masks.
        low: The smallest key that may stay.
        high: One more than the largest key that may go.
    """

    def __init__(self, tensors: Tensors, low: int, high: int) -> None:
        self.low, self.high = low, high
        self.masks = [torch.empty_like(scores, dtype=torch.bool) for scores, _ in tensors]
        self.flats = [flatten(mask, mask) for mask in self.masks]
        self.in_order = all(scores.is_contiguous() for scores, _ in tensors)

    def sift(self, keys: NDArray[Any], keep: NDArray[np.bool_]) -> Sifted:
        """Write the mask of a piece and remember what is not decided."""
        np.greater_equal(keys, self.low, out=keep)
        between = np.less(keys, self.high, out=scratch("between", keys.shape, np.bool_))
        np.logical_and(between, keep, out=between)
        (places,) = between.nonzero()
        undecided = (places, keys.take(places)) if len(places) <= MOST_REMEMBERED else None
        return Sifted(int(np.count_nonzero(keep)), undecided, keep)

    def finish(self, found: Sequence[Sifted], count: int, unpruned: int) -> list[Tensor] | None:
        """The masks without the ``count`` smallest of ``unpruned`` entries, or None if the guess was wrong."""
        left = count - (unpruned - sum(piece.kept for piece in found))
        between = [piece.between for piece in found if piece.between is not None]
        if len(between) < len(found) or not 0 <= left <= sum(len(places) for places, _ in between):
            return None
        keys = np.concatenate([keys for _, keys in between])
        go = np.zeros(len(keys), np.bool_)
        if left:
            last = np.partition(keys, left - 1)[left - 1]
            np.less(keys, last, out=go)
            ties = np.flatnonzero(keys == last)
            left -= int(np.count_nonzero(go))
            if left < len(ties) and not self.in_order:  # pieces are in the order of memory, not of position
                return None
            go[ties[:left]] = True
        start = 0
        for piece, (places, _) in zip(found, between, strict=True):
            piece.keep[places[go[start : start + len(places)]]] = False
            start += len(places)
        return self.masks


def expect(tensors: Tensors, dtype: torch.dtype, rule: Hyperparameters) -> Sieve | None:
    """The sieve for what a rule will prune of a group, judged by a sample; None if that is nothing or not worth it."""
    if sum(scores.numel() for scores, _ in tensors) < WORTHWHILE or not all(is_dense(scores) for scores, _ in tensors):
        return None
    sample = _sample(tensors, dtype)
    count = count_in(sample, dtype, rule)
    if count == 0:
        return None
    margin = int(MARGIN * len(sample) ** 0.5)
    ranks = np.clip([count - margin, count + margin], 0, len(sample) - 1)
    low, high = np.partition(sample, ranks)[ranks].tolist()
    return Sieve(tensors, low, high + 1) if low > 0 else None


def count_in(sample: NDArray[Any], dtype: torch.dtype, rule: Hyperparameters) -> int:
    """How many entries of a sample a rule would prune if they were the group.

    Args:
        sample: Keys, one dimension.
        dtype: Type that they are keys of.
        rule: The five numbers.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        values = magnitudes(sample, dtype)
        d, sum_p, sum_q = np.array(len(sample)), np.sum(values**rule.p), np.sum(values**rule.q)
        index = index_from_sums(np.asarray(sum_p), np.asarray(sum_q), d, p=rule.p, q=rule.q)
    return int(rule.count(index, d))


def _sample(tensors: Tensors, dtype: torch.dtype) -> NDArray[Any]:
    """Keys of unpruned entries, a few side by side at regular distances."""
    total = sum(scores.numel() for scores, _ in tensors)
    step = RUN * (-(-total // max(SAMPLE[0], min(total // 128, SAMPLE[1]))) or 1)

    def take(scores: Tensor, mask: Tensor | None) -> NDArray[Any]:
        run = min(RUN, scores.numel())
        keys: NDArray[Any] = keys_of(flatten(scores, scores).unfold(0, run, step), None, dtype, on_host=True)
        if mask is None:
            return keys.reshape(-1)
        unpruned = flatten(mask, scores).unfold(0, run, step).numpy().reshape(-1)
        return keys.take(np.flatnonzero(unpruned))  # keys[unpruned] takes several times as long

    return np.concatenate([take(*pair) for pair in tensors])
