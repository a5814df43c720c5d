"""One round of an iterative pruning: the trained model as measured, and what was pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from torch_sap.decide.groups import Entry, Scope
from torch_sap.decide.measures import gini as gini_of_groups
from torch_sap.decide.step import GroupValues
from torch_sap.decide.sums import PowerSums
from torch_sap.records.codec import from_plain, to_plain
from torch_sap.records.html import table
from torch_sap.records.report import OfTensors, TensorRecord


@dataclass(frozen=True, eq=False)
class Sparsity:
    """Sparsity of a model at one moment, by scope and then by name, as arrays with one value per group.

    Attributes:
        pqi: PQ Index, ``pqi["global"]["global"][0]``, ``pqi["layer"][name][0]`` (one value per matrix
            of a stack), ``pqi["neuron"][name][row]``; NaN if undefined.
        gini: Gini index in the same form; None unless it was requested.
    """

    pqi: Mapping[str, Mapping[str, NDArray[np.float64]]]
    gini: Mapping[str, Mapping[str, NDArray[np.float64]]] | None = None

    @classmethod
    def of(cls, sums: PowerSums, gini_of: Sequence[Entry] | None = None) -> Sparsity:
        """Compute the PQ Index from power sums, and the Gini index from entries if they are given."""
        scopes: tuple[Scope, ...] = get_args(Scope)
        gini = None if gini_of is None else {str(scope): gini_of_groups(gini_of, scope) for scope in scopes}
        return cls({scope: sums.index(scope) for scope in scopes}, gini)


@dataclass(frozen=True, eq=False, repr=False)
class Measured(OfTensors):
    """The trained model of a round before its pruning: what stopping rules judge.

    Attributes:
        number: 0 for the dense model.
        scope: "global", "layer" or "neuron".
        hyperparameters: Numbers of the pruning rule: p, q, eta_r, gamma, beta of SAP; p, q, ratio of the baselines.
        groups: By name, arrays with one value per group: d, index (I), r, and c, the entries that the round prunes.
        tensors: Counts of each tensor.
        retrained: Sparsity of the trained model.
        metrics: What the user measured.
    """

    number: int
    scope: str
    hyperparameters: Mapping[str, float]
    groups: Mapping[str, GroupValues]
    tensors: Sequence[TensorRecord]
    retrained: Sparsity
    metrics: Mapping[str, float]

    def __repr__(self) -> str:
        """One line; the groups and tensors would be thousands."""
        metrics = "".join(f", {name} {value:.4g}" for name, value in self.metrics.items())
        counts = (
            f"{type(self).__name__} {self.number}: {self.remaining:,} of {self.total:,} weights ({self.density:.1%})"
        )
        return f"<{counts}, PQ Index {self.pqi:.3f}{metrics}; {self.pruned_count:,} pruned>"

    def _repr_html_(self) -> str:
        return rounds_table([self], f"{self.scope} scope, {self.total:,} weights")

    @property
    def pruned_count(self) -> int:
        """Entries that the round prunes, the sum of all c; 0 in a recorded last round."""
        return sum(int(group.c.sum()) for group in self.groups.values())

    @property
    def pqi(self) -> float:
        """PQ Index of the trained model, all its weights together."""
        return float(self.retrained.pqi["global"]["global"][0])


@dataclass(frozen=True, eq=False, repr=False)
class Round(Measured):
    """One complete round: the trained model as measured, and what was pruned.

    Attributes:
        tensors_after: Counts of each tensor after the pruning.
        pruned: Sparsity of the pruned model before rewinding; None in a last round, which prunes nothing.
        pruned_metrics: Metrics of the pruned model before rewinding; empty if it was not evaluated.
        seconds: Time since the end of the previous round, training included.
    """

    tensors_after: Sequence[TensorRecord]
    pruned: Sparsity | None
    pruned_metrics: Mapping[str, float]
    seconds: float

    def row(self) -> dict[str, Any]:
        """Give the round as one row of a table; metrics of the pruned model have the prefix ``pruned_``.

        A metric with the name of another column has the prefix ``metric_``.
        """
        row: dict[str, Any] = {
            "round": self.number,
            "scope": self.scope,
            "remaining": self.remaining,
            "total": self.total,
            "remaining_pct": 100 * self.density,
            "pruned": self.pruned_count,
        }
        for prefix, sparsity in (("", self.retrained), ("pruned_", self.pruned)):
            if sparsity is not None:
                row[prefix + "pqi"] = float(sparsity.pqi["global"]["global"][0])
                for scope in ("layer", "neuron"):
                    row[f"{prefix}pqi_{scope}_mean"] = mean_defined(sparsity.pqi[scope])
                if sparsity.gini is not None:
                    row[prefix + "gini"] = float(sparsity.gini["global"]["global"][0])
        seconds = {"seconds": self.seconds}
        for metrics in (self.metrics, {"pruned_" + key: value for key, value in self.pruned_metrics.items()}):
            row |= {"metric_" + key if key in row | seconds else key: value for key, value in metrics.items()}
        return row | seconds

    def to_dict(self) -> dict[str, Any]:
        """Convert to values that JSON can hold."""
        return dict(to_plain(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Round:
        """Read the values of :meth:`to_dict`; a ValueError says what is missing or of another type."""
        return from_plain(cls, values)


def mean_defined(groups: Mapping[str, NDArray[np.float64]]) -> float:
    """Mean of an index over the groups where it is defined; NaN if there is none."""
    values = np.concatenate([np.zeros(0), *groups.values()])
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")


def rounds_table(rounds: Sequence[Measured], head: str) -> str:
    """Lay out one row per round: what remains, the PQ Index, and the metrics, with those of the pruned model."""
    prefixes = {"metrics": "", "pruned_metrics": "pruned "}
    found = [
        {prefix + name: v for part, prefix in prefixes.items() for name, v in getattr(round, part, {}).items()}
        for round in rounds
    ]
    names = list(dict.fromkeys(name for values in found for name in values))
    rows = []
    for round, values in zip(rounds, found, strict=True):
        metrics = [f"{values[name]:.4g}" if name in values else "-" for name in names]
        counts = [round.number, f"{round.remaining:,}", f"{100 * round.density:.1f}", f"{round.pqi:.3f}"]
        rows.append([*counts, *metrics, f"{round.pruned_count:,}"])
    return table(head, ["round", "remaining", "remaining %", "PQ Index", *names, "pruned"], rows)
