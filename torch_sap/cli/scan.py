"""Measure what SAP would prune of a model or a checkpoint, layer by layer.

The weights are read twice: once for their power sums, and once for a histogram per tensor. The histogram gives the
Gini index without a sort, and the share of each layer in the global scope.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

from torch_sap.decide.bounds import Hyperparameters
from torch_sap.decide.groups import Entry, Scope
from torch_sap.decide.keys import INTEGER_OF
from torch_sap.decide.sums import power_sums
from torch_sap.files.weights import open_checkpoint
from torch_sap.masks.parameters import resolve

CHUNK = 2**19
"""Entries that are counted at once: some MB, which stay in the cache; a mapped tensor is never copied as a whole."""

DIGITS = 8
"""Binary digits of a magnitude, behind the leading one, that tell the bins of the histogram apart. A bin of float16 or
bfloat16 holds a single magnitude; in float32 and float64 it is one of 256 between a power of two and the next."""

MANTISSA = {torch.float32: 23, torch.float64: 52}


@dataclass(frozen=True)
class LayerScan:
    """The findings about one tensor, or about all together.

    Attributes:
        name: Its name; "overall" for all.
        shape: Its shape; empty for all.
        weights: Number of entries.
        pqi: PQ Index of all entries; NaN if they are zeros.
        gini: Gini index of all entries, from the histogram; NaN if they are zeros.
        pruned_global: Share that SAP prunes in the global scope. For a single layer it is an estimate: the bin of the
            threshold is divided in proportion.
        pruned_layer: Share that SAP prunes in the layer scope.
        pruned_neuron: Share that SAP prunes in the neuron scope.
        dead_rows: Rows (output channels) that are all zero.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    pqi: float
    gini: float
    pruned_global: float
    pruned_layer: float
    pruned_neuron: float
    dead_rows: int


@dataclass(frozen=True)
class Scan:
    """A model or a checkpoint, layer by layer.

    Attributes:
        source: Name of the model or path of the checkpoint.
        hyperparameters: p, q, eta_r, gamma, beta.
        overall: All weights together.
        layers: Each tensor.
    """

    source: str
    hyperparameters: dict[str, float]
    overall: LayerScan
    layers: tuple[LayerScan, ...]


def scan_model(
    model: nn.Module, rule: Hyperparameters, *, source: str = "model", exclude: str | Iterable[str] = ()
) -> Scan:
    """Scan the prunable weights of a model on the CPU; zeros of an earlier pruning count as zeros.

    Raises:
        ValueError: if a weight is NaN or infinite, or there is none.
        TypeError: if a weight is not of a real floating-point type.

    Example:
        >>> from torch_sap.cli.scan import scan_model
        >>> from torch_sap.decide.bounds import Hyperparameters
        >>> scan = scan_model(nn.Linear(1000, 10), Hyperparameters())
        >>> abs(scan.overall.pruned_global - scan.overall.pqi) < 0.001
        True
    """
    entries = [prunable.entry() for prunable in resolve(model, exclude)]
    return _scan(entries, rule, source)


def scan_checkpoint(
    path: str | os.PathLike[str], rule: Hyperparameters, *, exclude: str | Iterable[str] = (), key: str | None = None
) -> Scan:
    """Scan the weights of a checkpoint; the rows are dimension 0 of each tensor.

    Arguments are those of :func:`torch_sap.files.weights.prune_checkpoint`.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if a weight is NaN or infinite, there is none, or a file is damaged.
        TypeError: if a weight is not of a real floating-point type.
    """
    weights = open_checkpoint(path, key).weights(exclude)
    return _scan([Entry(one.name, one.tensor) for one in weights if one.tensor is not None], rule, os.fspath(path))


def _scan(entries: Sequence[Entry], rule: Hyperparameters, source: str) -> Scan:
    sums = power_sums(entries, rule.p, rule.q)
    scopes: tuple[Scope, ...] = get_args(Scope)
    index = {scope: sums.index(scope) for scope in scopes}
    d = {scope: sums.d(scope) for scope in scopes}
    counts = {
        scope: {name: int(rule.count(index[scope][name], d[scope][name]).sum()) for name in index[scope]}
        for scope in scopes
    }
    # backwards: the last tensors that were read are still in the page cache if a file is larger than memory
    histograms = [Histogram.of(entry.scores.detach()) for entry in reversed(entries)][::-1]
    together = Histogram.together(histograms)
    c = counts["global"]["global"]
    threshold = together.smallest(c)
    layers = []
    for entry, histogram in zip(entries, histograms, strict=True):
        name = entry.name
        pruned = histogram.below(*threshold), counts["layer"][name], counts["neuron"][name]
        dead = int((np.isnan(index["neuron"][name]) & (d["neuron"][name] > 0)).sum())
        layers.append(_layer(name, entry.shape, float(index["layer"][name][0]), histogram, pruned, dead))
    everywhere = c, sum(counts["layer"].values()), sum(counts["neuron"].values())
    dead = sum(layer.dead_rows for layer in layers)
    overall = _layer("overall", (), float(index["global"]["global"][0]), together, everywhere, dead)
    return Scan(source, rule.to_dict(), overall, tuple(layers))


def _layer(
    name: str, shape: tuple[int, ...], index: float, histogram: Histogram, pruned: Sequence[float], dead: int
) -> LayerScan:
    total = int(histogram.counts.sum())
    in_global, in_layer, in_neuron = (count / total if total else math.nan for count in pruned)
    return LayerScan(name, shape, total, index, histogram.gini(), in_global, in_layer, in_neuron, dead)


class Histogram(NamedTuple):
    """Magnitudes in ascending order, float64, and how often each occurs, int64.

    The bins are as wide as the last of DIGITS binary digits. Histograms of several tensors add up.
    """

    values: Tensor
    counts: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> Histogram:
        """Count the magnitudes of a tensor, a chunk at a time; the middle of a bin stands for its contents."""
        integer, largest = INTEGER_OF[tensor.dtype], 2 ** (8 * tensor.itemsize - 1) - 1
        shift = MANTISSA.get(tensor.dtype, DIGITS) - DIGITS
        bins = torch.zeros((largest >> shift) + 1, dtype=torch.int64)
        for chunk in tensor.reshape(-1).view(integer).split(CHUNK):
            bins += torch.bincount((chunk & largest) >> shift, minlength=len(bins))
        places = bins.nonzero().flatten()
        middle = (places > 0) * (1 << shift >> 1)  # zero is the lowest of its bin, and nearly all there is
        values = ((places << shift) + middle).to(integer).view(tensor.dtype).double()
        return cls(values, bins[places])

    @classmethod
    def together(cls, histograms: Sequence[Histogram]) -> Histogram:
        """Add up the histograms of several tensors, of one type or more."""
        values, places = torch.cat([one.values for one in histograms]).unique(return_inverse=True)
        counts = torch.zeros(len(values), dtype=torch.int64)
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
        r"""Gini index; NaN if there is no entry or all are zero.

        .. math:: G = 1 - 2 \sum_i \frac{n_i v_i}{S} \, \frac{d - a_i - n_i / 2}{d}

        with :math:`n_i` entries of magnitude :math:`v_i`, :math:`a_i` smaller ones, and S the sum of all magnitudes:
        the sum of Hurley and Rickard with equal values taken together.

        Example:
            >>> from torch_sap.cli.scan import Histogram
            >>> Histogram(torch.tensor([0.0, 1.0]), torch.tensor([3, 1])).gini()
            0.75
        """
        d, total = int(self.counts.sum()), float((self.values * self.counts).sum())
        if not total:
            return math.nan
        larger = d - self.counts.cumsum(0) + self.counts / 2
        return 1 - 2 * float((self.values * self.counts * larger).sum()) / (total * d)
