"""What SAP would prune of a model or a checkpoint, layer by layer, in one pass over the weights.

Beside the sums of every row a histogram of the magnitudes is kept of each tensor. It gives the Gini index, which takes
a sort otherwise, and what each layer loses in the global scope.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from torch_sap.decide.bounds import Hyperparameters
from torch_sap.decide.histogram import Histogram, count_keys, empty_bins
from torch_sap.decide.keys import HOST_CHUNK, as_array, keys_of
from torch_sap.decide.sums import bin_sums, index_from_sums, row_sums
from torch_sap.decide.threads import map_pieces
from torch_sap.files.checkpoint_reading import pieces_of
from torch_sap.files.weights import open_checkpoint
from torch_sap.masks.parameters import resolve
from torch_sap.records.report import numbers


@dataclass(frozen=True)
class LayerScan:
    """What was found out about one tensor, or about all together.

    Attributes:
        name: Its name; "overall" for all.
        shape: Its shape; empty for all.
        weights: Number of entries.
        pqi: PQ Index of all of them; NaN if they are zeros.
        gini: Gini index of all of them, from the histogram; NaN if they are zeros.
        pruned_global: Share that SAP prunes in the global scope. Of a single layer it is an estimate: entries in the
            bin of the threshold are taken in proportion.
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

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; None for what is not defined."""
        return {
            key: numbers([value])[0] if isinstance(value, float) else list(value) if key == "shape" else value
            for key, value in asdict(self).items()
        }


@dataclass(frozen=True)
class Scan:
    """A model or a checkpoint, layer by layer.

    Attributes:
        source: What was scanned.
        hyperparameters: p, q, eta_r, gamma, beta.
        overall: All weights together.
        layers: Each tensor.
    """

    source: str
    hyperparameters: dict[str, float]
    overall: LayerScan
    layers: tuple[LayerScan, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {
            "source": self.source,
            "hyperparameters": self.hyperparameters,
            "overall": self.overall.to_dict(),
            "layers": [layer.to_dict() for layer in self.layers],
        }


class Rows(NamedTuple):
    """Some rows of a tensor: its name, its shape, the rows in two dimensions."""

    name: str
    shape: tuple[int, ...]
    values: Tensor


def scan_model(
    model: nn.Module, rule: Hyperparameters, *, source: str = "model", exclude: str | Iterable[str] = ()
) -> Scan:
    """Scan the weights that SAP prunes of a model, as they are: zeros of an earlier pruning count as zeros.

    Args:
        model: Any module on the CPU.
        rule: The five numbers.
        source: What to call it.
        exclude: Patterns of what to leave out, as of ``prunable_parameters``.

    Returns:
        What was found.

    Raises:
        ValueError: if a weight is NaN or infinite, or there is none.
        TypeError: if a weight is not of a real floating-point type.

    Example:
        >>> from torch_sap.decide.bounds import Hyperparameters
        >>> scan = scan_model(nn.Linear(1000, 10), Hyperparameters())
        >>> abs(scan.overall.pruned_global - scan.overall.pqi) < 0.001
        True
    """

    def rows() -> Iterator[Rows]:
        for prunable in resolve(model, exclude):
            entry = prunable.entry()
            for part in entry.rows(entry.scores.detach()):
                yield Rows(entry.name, entry.shape, part.flatten(1))

    return _scan(rows(), rule, source)


def scan_checkpoint(
    path: str | os.PathLike[str],
    rule: Hyperparameters,
    *,
    exclude: str | Iterable[str] = (),
    key: str | None = None,
) -> Scan:
    """Scan the weights of a checkpoint; they are read once, a few MB at a time.

    Args:
        path: A file, an index of several, or a folder with one checkpoint.
        rule: The five numbers.
        exclude: Patterns of what to leave out, as of ``prunable_parameters``.
        key: Name of the state_dict among several in a PyTorch file.

    Returns:
        What was found. The rows are dimension 0 of each tensor.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if a weight is NaN or infinite, there is none, or a file is damaged.
        TypeError: if a weight is not of a real floating-point type.
    """
    weights = open_checkpoint(path, key).weights(exclude)
    rows = (Rows(p.tensor.name, p.tensor.shape, p.values.flatten(1)) for p in pieces_of(weights, rows=True))
    return _scan(rows, rule, os.fspath(path))


class _Tensor:
    """What is kept of a tensor: the sums of its rows, and its histogram."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.name, self.shape, self.dtype = name, shape, dtype
        self.d = math.prod(shape)
        self.row_length = 0
        self.tables: list[NDArray[np.float64]] = [np.zeros((2, 0))]
        self.bins = empty_bins(dtype)

    def add(self, rows: Tensor, rule: Hyperparameters) -> None:
        self.row_length = rows.shape[1]

        def work(block: NDArray[Any]) -> tuple[Any, Any]:
            keys = keys_of(block, None, self.dtype, on_host=True, reuse=True)
            return count_keys(keys, self.dtype), row_sums(keys, self.dtype, (rule.p, rule.q))

        array, size = as_array(rows), max(1, HOST_CHUNK // max(1, self.row_length))
        blocks = [(array[start : start + size],) for start in range(0, len(array), size)]
        for counts, table in map_pieces(work, blocks, on_host=True):
            self.bins += counts
            self.tables.append(table)

    def close(self, rule: Hyperparameters) -> None:
        """Make the figures of the complete tensor, and keep of the bins what is not empty."""
        table = np.concatenate(self.tables, 1)
        if self.dtype.itemsize == 2:
            self.sums = bin_sums(self.bins, self.dtype, (rule.p, rule.q))
        else:
            self.sums = [math.fsum(row) if np.isfinite(row).all() else math.inf for row in table]
        if not np.isfinite(self.sums).all():
            raise ValueError(f"{self.name} must be finite and so must the sums of its powers")
        d = np.full(table.shape[1], self.row_length)
        rows = index_from_sums(table[0], table[1], d, p=rule.p, q=rule.q)
        self.c_neuron = int(rule.count(rows, d).sum())
        self.dead_rows = int(np.count_nonzero(table[1] == 0))
        self.index, self.c_layer = _decide(self.sums, self.d, rule)
        self.histogram = Histogram.of_bins(self.bins, self.dtype)
        self.bins, self.tables = self.bins[:0], []

    def found(self, lost: float) -> LayerScan:
        """The record, with what the tensor loses in the global scope."""
        in_global, in_layer, in_neuron = (
            count / self.d if self.d else math.nan for count in (lost, self.c_layer, self.c_neuron)
        )
        gini = self.histogram.gini()
        return LayerScan(
            self.name, self.shape, self.d, self.index, gini, in_global, in_layer, in_neuron, self.dead_rows
        )


def _decide(sums: list[float], d: int, rule: Hyperparameters) -> tuple[float, int]:
    """I and c of a group from its sums."""
    sum_p, sum_q, size = np.array([sums[0]]), np.array([sums[1]]), np.array([d])
    index = index_from_sums(sum_p, sum_q, size, p=rule.p, q=rule.q)
    return float(index[0]), int(rule.count(index, size)[0])


def _scan(rows: Iterable[Rows], rule: Hyperparameters, source: str) -> Scan:
    tensors = list(_tensors(rows, rule))
    every = _Tensor("overall", (), tensors[0].dtype)
    every.d = sum(tensor.d for tensor in tensors)
    every.c_layer = sum(tensor.c_layer for tensor in tensors)
    every.c_neuron = sum(tensor.c_neuron for tensor in tensors)
    every.dead_rows = sum(tensor.dead_rows for tensor in tensors)
    every.histogram = Histogram.together([tensor.histogram for tensor in tensors])
    sums = [math.fsum(tensor.sums[i] for tensor in tensors) for i in (0, 1)]
    every.index, c = _decide(sums, every.d, rule)
    value, share = every.histogram.smallest(c)
    layers = tuple(tensor.found(tensor.histogram.below(value, share)) for tensor in tensors)
    return Scan(source, rule.to_dict(), every.found(c), layers)


def _tensors(rows: Iterable[Rows], rule: Hyperparameters) -> Iterator[_Tensor]:
    """The tensors, each complete."""
    for name, pieces in groupby(rows, lambda piece: piece.name):
        tensor = None
        for piece in pieces:
            tensor = tensor or _Tensor(name, piece.shape, piece.values.dtype)
            tensor.add(piece.values, rule)
        assert tensor is not None
        tensor.close(rule)
        yield tensor
