"""One iteration of an iterative pruning as a plain record: a Round, and the Sparsity of a model at one moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import torch

from torch_sap.decide.groups import Entry, Scope
from torch_sap.decide.measures import gini as measure_gini
from torch_sap.decide.sums import power_sums
from torch_sap.decide.step import GroupValues
from torch_sap.records.report import TensorRecord, array, groups_from_dict, groups_to_dict, numbers


@dataclass(frozen=True, eq=False)
class Sparsity:
    """Sparsity of a model at one moment, in all scopes: by scope, then by group name, arrays with one value a group.

    Attributes:
        pqi: PQ Index, ``pqi["global"]["global"][0]``, ``pqi["layer"][name][0]``, ``pqi["neuron"][name][row]``; NaN if
            undefined.
        gini: Gini index in the same form; None unless it was asked for.
    """

    pqi: Mapping[str, Mapping[str, Any]]
    gini: Mapping[str, Mapping[str, Any]] | None = None

    @classmethod
    def of(cls, entries: Sequence[Entry], p: float, q: float, *, gini: bool) -> Sparsity:
        """Measure the unpruned entries of tensors, with the norms p and q.

        Raises:
            ValueError: if an entry is NaN or infinite; the tensor is named.
        """
        scopes: tuple[Scope, ...] = get_args(Scope)
        with torch.no_grad():
            return cls(
                {scope: power_sums(entries, p, q).index(scope) for scope in scopes},
                {scope: measure_gini(entries, scope) for scope in scopes} if gini else None,
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {
            "pqi": _nested(self.pqi, numbers),
            "gini": None if self.gini is None else _nested(self.gini, numbers),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sparsity:
        """The record that :meth:`to_dict` wrote."""
        gini = values["gini"]
        return cls(_nested(values["pqi"], array), None if gini is None else _nested(gini, array))


def _nested(values: Mapping[str, Mapping[str, Any]], convert: Any) -> dict[str, dict[str, Any]]:
    return {scope: {name: convert(value) for name, value in groups.items()} for scope, groups in values.items()}


@dataclass(frozen=True, eq=False, repr=False)
class Round:
    """One iteration: what training arrived at, and what was pruned then.

    Attributes:
        number: 0 for the dense model.
        scope: "global", "layer" or "neuron".
        hyperparameters: p, q, eta_r, gamma, beta (and ratio for a fixed one).
        groups: By name, arrays with a value a group: d, index (I), r, c, of the retrained model; c is 0 in the last
            round.
        tensors: Counts of each tensor in the trained model.
        tensors_after: Counts of each tensor after this round's pruning.
        retrained: Sparsity of the retrained model.
        pruned: Sparsity of the pruned model before rewinding; None in the last round, which prunes nothing.
        metrics: Metrics of the retrained model.
        pruned_metrics: Metrics of the pruned model before rewinding; empty where nobody evaluated it.
        seconds: Time since the end of the round before, training included.
    """

    number: int
    scope: str
    hyperparameters: Mapping[str, float]
    groups: Mapping[str, GroupValues]
    tensors: Sequence[TensorRecord]
    tensors_after: Sequence[TensorRecord]
    retrained: Sparsity
    pruned: Sparsity | None
    metrics: Mapping[str, float] = field(default_factory=dict)
    pruned_metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def __repr__(self) -> str:
        """One line; what the groups and tensors hold would be thousands."""
        metrics = "".join(f", {name} {value:.4g}" for name, value in self.metrics.items())
        counts = f"{self.remaining:,} of {self.total:,} weights ({self.density:.1%})"
        return f"<Round {self.number}: {counts}, PQ Index {self.pqi:.3f}{metrics}; {self.pruned_count:,} pruned>"

    @property
    def total(self) -> int:
        """Entries of all tensors, pruned or not."""
        return sum(tensor.total for tensor in self.tensors)

    @property
    def remaining(self) -> int:
        """Entries of the trained model."""
        return sum(tensor.remaining for tensor in self.tensors)

    @property
    def pruned_count(self) -> int:
        """Entries that this round pruned."""
        return sum(int(group.c.sum()) for group in self.groups.values())

    @property
    def density(self) -> float:
        """Share of the entries that the trained model has."""
        return self.remaining / self.total if self.total else float("nan")

    @property
    def pqi(self) -> float:
        """PQ Index of the retrained model, all its weights together."""
        return float(self.retrained.pqi["global"]["global"][0])

    def row(self) -> dict[str, Any]:
        """The round as a line of a table: values by column; metrics of the pruned model have the prefix ``pruned_``."""
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
                    row[f"{prefix}pqi_{scope}_mean"] = _mean(sparsity.pqi[scope])
                if sparsity.gini is not None:
                    row[prefix + "gini"] = float(sparsity.gini["global"]["global"][0])
        row.update(self.metrics)
        row.update({"pruned_" + key: value for key, value in self.pruned_metrics.items()})
        row["seconds"] = self.seconds
        return row

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {
            "number": self.number,
            "scope": self.scope,
            "hyperparameters": dict(self.hyperparameters),
            "groups": groups_to_dict(self.groups),
            "tensors": [tensor.to_dict() for tensor in self.tensors],
            "tensors_after": [tensor.to_dict() for tensor in self.tensors_after],
            "retrained": self.retrained.to_dict(),
            "pruned": None if self.pruned is None else self.pruned.to_dict(),
            "metrics": _finite(self.metrics),
            "pruned_metrics": _finite(self.pruned_metrics),
            "seconds": self.seconds,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Round:
        """The round that :meth:`to_dict` wrote.

        Raises:
            ValueError: if a value is missing or is of another kind.
        """
        try:
            return cls._from_dict(values)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            found = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"round must be what Round.to_dict wrote, but is not or is damaged: {found}") from error

    @classmethod
    def _from_dict(cls, values: Mapping[str, Any]) -> Round:
        return cls(
            number=values["number"],
            scope=values["scope"],
            hyperparameters=dict(values["hyperparameters"]),
            groups=groups_from_dict(values["groups"]),
            tensors=tuple(map(TensorRecord.from_dict, values["tensors"])),
            tensors_after=tuple(map(TensorRecord.from_dict, values["tensors_after"])),
            retrained=Sparsity.from_dict(values["retrained"]),
            pruned=None if values["pruned"] is None else Sparsity.from_dict(values["pruned"]),
            metrics=_with_nan(values["metrics"]),
            pruned_metrics=_with_nan(values["pruned_metrics"]),
            seconds=values["seconds"],
        )


def _mean(groups: Mapping[str, Any]) -> float:
    """Mean over the groups where the index is defined."""
    values = np.concatenate([np.zeros(0), *groups.values()])
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")


def _finite(metrics: Mapping[str, float]) -> dict[str, float | str | None]:
    """Metrics as JSON can hold them: None for NaN, "inf" and "-inf" for infinities."""
    return {
        key: value if np.isfinite(value) else None if np.isnan(value) else str(value) for key, value in metrics.items()
    }


def _with_nan(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {key: float("nan") if value is None else float(value) for key, value in metrics.items()}
