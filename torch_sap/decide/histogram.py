"""Histograms of magnitudes, whose bins are as wide as the last of eight binary digits.

For float16 and bfloat16 a bin holds a single magnitude; in the wider types it is one of 256 between a power of two and
the next. They add up over tensors, and give the Gini index without a sort.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from torch_sap.decide.keys import key_end, magnitudes

DIGITS = 8
"""Binary digits of a magnitude that are looked at, behind the leading one."""

MANTISSA = {torch.float16: 10, torch.bfloat16: 7, torch.float32: 23, torch.float64: 52}


def _shift(dtype: torch.dtype) -> int:
    return MANTISSA[dtype] - DIGITS if dtype.itemsize > 2 else 0


def empty_bins(dtype: torch.dtype) -> NDArray[np.int64]:
    """Bins for the keys of a type, none counted yet."""
    return np.zeros(key_end(dtype) >> _shift(dtype), np.int64)


def count_keys(keys: NDArray[Any], dtype: torch.dtype) -> NDArray[np.int64]:
    """How many of the keys are in each bin."""
    bins = keys.reshape(-1) >> _shift(dtype) if _shift(dtype) else keys.reshape(-1)
    # several times faster than numpy's, which makes an int64 of each key first
    return torch.bincount(torch.from_numpy(bins), minlength=key_end(dtype) >> _shift(dtype)).numpy()


class Histogram(NamedTuple):
    """Magnitudes in ascending order, float64, and how often each occurs, int64."""

    values: NDArray[np.float64]
    counts: NDArray[np.int64]

    @classmethod
    def of_bins(cls, bins: NDArray[np.int64], dtype: torch.dtype) -> Histogram:
        """What is in the bins; the middle of a bin stands for what is in it."""
        places = np.flatnonzero(bins)
        middle = (places > 0) * (1 << _shift(dtype) >> 1)  # zero is the lowest of its bin, and nearly all there is
        keys = ((places << _shift(dtype)) + middle).astype(f"i{dtype.itemsize}")
        return cls(magnitudes(keys, dtype), bins[places])

    @classmethod
    def together(cls, histograms: Sequence[Histogram]) -> Histogram:
        """The histogram of several tensors, of one type or more."""
        values, place = np.unique(np.concatenate([h.values for h in histograms]), return_inverse=True)
        counts = np.zeros(len(values), np.int64)
        np.add.at(counts, place, np.concatenate([h.counts for h in histograms]))
        return cls(values, counts)

    def smallest(self, count: int) -> tuple[float, float]:
        """The magnitude of the last of the ``count`` smallest entries, and the share of its equals that they are."""
        if count == 0:
            return 0.0, 0.0
        up_to = np.cumsum(self.counts)
        place = int(np.searchsorted(up_to, count))
        return float(self.values[place]), 1 - int(up_to[place] - count) / int(self.counts[place])

    def below(self, value: float, share: float) -> float:
        """How many entries are smaller than a magnitude, with a share of those that equal it."""
        return float(self.counts[self.values < value].sum() + share * self.counts[self.values == value].sum())

    def gini(self) -> float:
        r"""Gini index; NaN if there is no entry or all are zero.

        .. math:: G = 1 - 2 \sum_i \frac{n_i v_i}{S} \, \frac{d - a_i - n_i / 2}{d}

        with :math:`n_i` entries of magnitude :math:`v_i` and :math:`a_i` smaller ones: the sum of Hurley and Rickard
        with equal values taken together.

        Example:
            >>> import numpy as np
            >>> Histogram(np.array([0.0, 1.0]), np.array([3, 1])).gini()
            0.75
        """
        d = int(self.counts.sum())
        total = float((self.values * self.counts).sum())
        if not total:
            return math.nan
        smaller = np.cumsum(self.counts) - self.counts
        return 1 - 2 * float((self.values * self.counts * (d - smaller - self.counts / 2)).sum()) / (total * d)
