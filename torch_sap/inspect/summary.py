"""A table of a model's weights: what remains of each, how sparse it is, and what it costs to compute."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torch_sap.decide.sums import power_sums
from torch_sap.distributed.replicas import unwrap
from torch_sap.inspect.example import whole_weights
from torch_sap.inspect.macs import count_macs
from torch_sap.masks.parameters import Prunable, entries_of
from torch_sap.records.codec import to_plain
from torch_sap.records.html import table
from torch_sap.records.report import OfTensors, TensorRecord
from torch_sap.records.round import mean_defined


@dataclass(frozen=True)
class LayerSummary(TensorRecord):
    """One weight tensor: its counts, without a mask (after :func:`remove`) of the nonzero entries, and what follows.

    Attributes:
        module: Class of the module that has it.
        pqi: PQ Index of the entries that no mask prunes, as a pruning step measures it; the mean over the matrices of a
            stack; NaN if undefined.
        empty_rows: Indices of the output channels without remaining entries.
        macs: Multiply-accumulate operations of the example with this tensor; None without an example.
    """

    module: str
    pqi: float
    empty_rows: tuple[int, ...]
    macs: int | None

    @property
    def sparse_macs(self) -> int | None:
        """``macs * density``, rounded: the cost of a computation that skips every pruned entry."""
        return None if self.macs is None else round(self.macs * self.remaining / max(self.total, 1))


@dataclass(frozen=True)
class Summary(OfTensors):
    """What :func:`summary` found.

    Attributes:
        tensors: One record per weight tensor, in the model's order.
        pqi: PQ Index of all weights together; NaN if undefined.
        parameters: Entries of all parameters of the model, including biases and norms.
        other_macs: Multiply-accumulate operations of the example without a weight, as in attention; None without an
            example.
    """

    tensors: Sequence[LayerSummary]
    pqi: float
    parameters: int
    other_macs: int | None

    @property
    def macs(self) -> int | None:
        """Multiply-accumulate operations of the example on dense weights, including other_macs."""
        return None if self.other_macs is None else self.other_macs + sum(t.macs or 0 for t in self.tensors)

    @property
    def sparse_macs(self) -> int | None:
        """The same, with the operations of each tensor multiplied by its density."""
        return None if self.other_macs is None else self.other_macs + sum(t.sparse_macs or 0 for t in self.tensors)

    @property
    def empty_rows(self) -> dict[str, tuple[int, ...]]:
        """Indices of the output channels without remaining entries, by tensor."""
        return {tensor.name: tensor.empty_rows for tensor in self.tensors if tensor.empty_rows}

    def to_dict(self) -> dict[str, Any]:
        """Convert to values that JSON can hold; None for an index that is undefined."""
        totals = {name: getattr(self, name) for name in ("total", "remaining", "sparsity", "macs", "sparse_macs")}
        each = [to_plain(t) | {"sparsity": to_plain(t.sparsity), "sparse_macs": t.sparse_macs} for t in self.tensors]
        return {**to_plain(self), **to_plain(totals), "tensors": each}

    def __str__(self) -> str:
        """A table with one line per tensor, and one in total."""
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        texts = [[*map(str.ljust, line[:3], widths), *map(str.rjust, line[3:], widths[3:])] for line in cells]
        first, *lines, last = ("  ".join(line).rstrip() for line in texts)
        rule = "-" * max(map(len, (first, *lines, last)))
        return "\n".join([first, rule, *lines, rule, last, *([self._note()] if self.other_macs else [])])

    def _repr_html_(self) -> str:
        titles, *rows = self._cells()
        head = f"{self.remaining:,} of {self.total:,} weights remain ({self.density:.1%})"
        return table(head, titles, rows, self._note() if self.other_macs else "")

    def _cells(self) -> list[list[str]]:
        """The texts of the table: titles, tensors, total."""
        head = ["weight", "module", "shape", "weights", "remaining", "remaining %", "PQI", "empty rows"]
        cells = [head if self.other_macs is None else [*head, "MACs", "sparse MACs"]]
        cells += [[t.name, t.module, str(t.shape), *_texts(t, len(t.empty_rows))] for t in self.tensors]
        return [*cells, ["total", "", "", *_texts(self, sum(map(len, self.empty_rows.values())))]]

    def _note(self) -> str:
        return f"{_short(self.other_macs or 0)} of the MACs are without a weight (as in attention)"


def _texts(record: LayerSummary | Summary, empty_rows: int) -> list[str]:
    pqi = "undefined" if math.isnan(record.pqi) else f"{record.pqi:.3f}"
    texts = [f"{record.total:,}", f"{record.remaining:,}", f"{100 * record.density:.1f}", pqi, f"{empty_rows:,}"]
    if record.macs is None or record.sparse_macs is None:
        return texts
    return [*texts, _short(record.macs), _short(record.sparse_macs)]


def _short(number: float) -> str:
    """Four digits and a unit."""
    for unit in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.4g}{unit}"
        number /= 1000
    return f"{number:.4g}T"


def summary(model: nn.Module, example_input: Any = None) -> Summary:
    """Tabulate a model's weights: shape, what remains, PQ Index, empty rows, and dense and sparse MACs.

    The model runs the example in eval mode, without gradients, eagerly, and is exactly as before afterwards. MACs are
    counted by the formulas of torch.utils.flop_counter and assigned to the tensors that take part in each operation,
    even where a weight is read without calling its module.

    Args:
        model: Any module, pruned or not, with a parameter that :func:`prunable_parameters` names.
        example_input: A tensor, a tuple of positional arguments, or a dict of keyword arguments for the model. None
            leaves MACs out.

    Returns:
        One record per weight tensor, with shared tensors once. Print it, show it in a notebook, or take ``to_dict``.

    Raises:
        TypeError: if the model is not a module, or a weight does not have a real floating-point type.
        ValueError: if the model has no such weight, or a weight is NaN or infinite.
        NotImplementedError: if a weight is sharded.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> print(summary(model, torch.ones(1, 64)).macs)
        2368
    """
    model = unwrap(model)
    prunables = whole_weights(model, "summary")
    with torch.no_grad():
        sums = power_sums(entries_of(prunables, None), 0.5, 1.0)
        pqi = {name: mean_defined({name: index}) for name, index in sums.index("layer").items()}
        whole = float(sums.index("global")["global"][0])
        macs: Sequence[int | None] = [None] * len(prunables)
        other = None
        if example_input is not None:
            macs, other = count_macs(model, example_input, [prunable.weight for prunable in prunables])
        layers = [_layer(p, pqi[p.name], count) for p, count in zip(prunables, macs, strict=True)]
    return Summary(tuple(layers), whole, sum(parameter.numel() for parameter in model.parameters()), other)


def _layer(prunable: Prunable, pqi: float, macs: int | None) -> LayerSummary:
    weight, entry = prunable.weight, prunable.entry()
    kept = entry.scores if entry.mask is None else entry.mask
    rows = [part.flatten(1) for part in entry.rows(kept)]
    counts = torch.cat([row.count_nonzero(1) for row in rows])
    return LayerSummary(
        name=prunable.name,
        shape=tuple(weight.shape),
        remaining=int(counts.sum()),
        total=weight.numel(),
        module=type(prunable.holders[0][0]).__name__,
        pqi=pqi,
        empty_rows=tuple((counts == 0).nonzero().flatten().tolist()),
        macs=macs,
    )
