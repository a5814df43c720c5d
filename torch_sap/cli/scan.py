"""Measure what SAP would prune of a model or a checkpoint, layer by layer.

The weights are read twice: once for their power sums, and once for a histogram per tensor. The histogram gives the
Gini index without a sort, and what remains of each layer in the global scope.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from torch_sap.decide.bounds import Hyperparameters
from torch_sap.decide.groups import Entry, Scope
from torch_sap.decide.keys import INTEGER_OF
from torch_sap.decide.step import GroupValues, group_values
from torch_sap.decide.sums import power_sums
from torch_sap.masks.kinds import ZERO
from torch_sap.masks.parameters import LeftOut
from torch_sap.records.round import mean_defined

CHUNK = 2**19
"""Entries that are counted at once: some MB, which stay in the cache; a mapped tensor is never copied as a whole."""

DIGITS = 8
"""Binary digits of a magnitude, after the leading one, that select its bin. A bin of float16 or bfloat16 holds a single
magnitude; of float32 and float64 there are 256 bins between a power of two and the next."""

MANTISSA = {torch.float32: 23, torch.float64: 52}


@dataclass(frozen=True)
class LayerScan:
    """The findings about one tensor, or about all together; NaN where an index or a share is not defined."""

    name: str
    """Dotted path, or "overall" for all together."""
    shape: tuple[int, ...]
    weights: int
    pqi: float
    gini: float
    remaining_global: float
    """Share that remains after one step in the global scope. For one layer an estimate: the threshold's bin is divided
    evenly."""
    remaining_layer: float
    remaining_neuron: float
    dead_rows: int
    """Rows (output channels) that are all zero."""


@dataclass(frozen=True)
class Scan:
    """A model or a checkpoint, layer by layer."""

    source: str
    """Name of the model or path of the checkpoint."""
    random_weights: bool
    """Whether the model has its initial weights; then the findings are about the initialization."""
    hyperparameters: dict[str, float]
    overall: LayerScan
    layers: tuple[LayerScan, ...]
    left_out: tuple[LeftOut, ...]
    """Tensors with more than one dimension that SAP does not prune, and why."""


def scan_entries(
    entries: Sequence[Entry],
    rule: Hyperparameters,
    source: str,
    *,
    random_weights: bool = False,
    left_out: Sequence[LeftOut] = (),
    advance: Callable[[int], object] = lambda done: None,
) -> Scan:
    """Scan tensors on the CPU without masks; zeros of an earlier pruning count as zeros.

    ``advance`` is called with the number of entries of each tensor that is done; most of the time is spent there.
    """
    sums = power_sums(entries, rule.p, rule.q)
    scopes: tuple[Scope, ...] = get_args(Scope)
    in_global, in_layer, in_neuron = groups = [group_values(sums, scope, rule) for scope in scopes]
    # backwards: the last tensors that were read are still in the page cache if a file is larger than memory
    histograms: list[Histogram] = []
    for entry in reversed(entries):
        histograms.append(Histogram.of(entry.scores.detach()))
        advance(entry.scores.numel())
    histograms.reverse()
    counted = [h for entry, h in zip(entries, histograms, strict=True) if entry.name not in sums.zero]
    together = Histogram.together(counted or histograms)
    threshold = together.smallest(int(in_global["global"].c[0]))
    layers = []
    for entry, histogram in zip(entries, histograms, strict=True):
        layer, rows = in_layer[entry.name], in_neuron[entry.name]
        share = histogram.below(*threshold) if entry.name not in sums.zero else 0
        pruned = [share, int(layer.c.sum()), int(rows.c.sum())]
        dead = int((np.isnan(rows.index) & (rows.d > 0)).sum())
        layers.append(_layer(entry.name, entry.shape, int(layer.d.sum()), layer, histogram, pruned, dead))
    pruned = [sum(int(group.c.sum()) for group in of_scope.values()) for of_scope in groups]
    dead = sum(layer.dead_rows for layer in layers)
    total = sum(layer.weights for layer in layers)
    overall = _layer("overall", (), total, in_global["global"], together, pruned, dead)
    zero = (LeftOut(entry.name, entry.shape, ZERO) for entry in entries if entry.name in sums.zero)
    return Scan(source, random_weights, rule.to_dict(), overall, tuple(layers), (*left_out, *zero))


def _layer(
    name: str,
    shape: tuple[int, ...],
    total: int,
    group: GroupValues,
    histogram: Histogram,
    pruned: Sequence[float],
    dead: int,
) -> LayerScan:
    in_global, in_layer, in_neuron = ((total - count) / total if total else math.nan for count in pruned)
    index = mean_defined({name: group.index})
    return LayerScan(name, shape, total, index, histogram.gini(), in_global, in_layer, in_neuron, dead)


class Histogram(NamedTuple):
    """Magnitudes in ascending order, float64, and how often each occurs, int64; tensors' histograms add up."""

    values: Tensor
    counts: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> Histogram:
        """Count the magnitudes of a tensor, a chunk at a time; the middle of a bin stands for its contents."""
        integer, largest = INTEGER_OF[tensor.dtype], 2 ** (8 * tensor.itemsize - 1) - 1
        shift = MANTISSA.get(tensor.dtype, DIGITS) - DIGITS
        counts = np.zeros((largest >> shift) + 1, np.int64)
        for chunk in tensor.reshape(-1).view(integer).split(CHUNK):  # numpy: PyTorch's threads stall on a busy machine
            counts += np.bincount((chunk.numpy() & largest) >> shift, minlength=len(counts))
        bins = torch.from_numpy(counts)
        places = bins.nonzero().flatten()
        middle = (places > 0) * (1 << shift >> 1)  # the lowest bin holds hardly anything but zero
        values = ((places << shift) + middle).to(integer).view(tensor.dtype).double()
        return cls(values, bins[places])

    @classmethod
    def together(cls, histograms: Sequence[Histogram]) -> Histogram:
        """Add up the histograms of several tensors, of one type or more."""
        values, places = torch.cat([one.values for one in histograms]).unique(return_inverse=True)
        counts = torch.zeros(len(values), dtype=torch.int64, device="cpu")
        return cls(values, counts.index_add_(0, places, torch.cat([one.counts for one in histograms])))

    def smallest(self, count: int) -> tuple[float, float]:
        """The magnitude of the last of the ``count`` smallest entries, and the share of its bin that is among them."""
        if count == 0:
            return 0.0, 0.0
        up_to = self.counts.cumsum(0)
        place = int(torch.searchsorted(up_to, count))
        return float(self.values[place]), 1 - int(up_to[place] - count) / int(self.counts[place])

    def below(self, value: float, share: float) -> float:
        """How many entries are smaller than a magnitude, plus a share of those in its bin."""
        smaller, equal = self.counts[self.values < value].sum(), self.counts[self.values == value].sum()
        return float(smaller + share * equal)

    def gini(self) -> float:
        r"""Gini index of Hurley and Rickard with equal values taken together; NaN if there is no entry or all are zero.

        .. math:: G = 1 - 2 \sum_i \frac{n_i v_i}{S} \, \frac{d - a_i - n_i / 2}{d}

        with :math:`n_i` entries of magnitude :math:`v_i`, :math:`a_i` smaller ones, and S the sum of all magnitudes.
        """
        d, total = int(self.counts.sum()), float((self.values * self.counts).sum())
        if not total:
            return math.nan
        larger = d - self.counts.cumsum(0) + self.counts / 2
        return 1 - 2 * float((self.values * self.counts * larger).sum()) / (total * d)
