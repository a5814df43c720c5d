"""What a pruning found and did, as plain records: frozen, comparable, and JSON at any time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from torch_sap.decide.step import GroupValues


@dataclass(frozen=True)
class TensorRecord:
    """Counts of one tensor.

    Attributes:
        name: Dotted path of the parameter before it was pruned.
        shape: Its shape.
        remaining: Unpruned entries.
        total: All entries.
    """

    name: str
    shape: tuple[int, ...]
    remaining: int
    total: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "remaining": self.remaining,
            "total": self.total,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TensorRecord:
        """The record that :meth:`to_dict` wrote."""
        return cls(values["name"], tuple(values["shape"]), values["remaining"], values["total"])


@dataclass(frozen=True, eq=False)
class PruningReport:
    """What one call pruned.

    Attributes:
        scope: "global", "layer" or "neuron".
        hyperparameters: p, q, eta_r, gamma, beta.
        groups: By name, arrays with a value a group: ``d`` unpruned entries before, ``index`` I (NaN where it is not
            defined), ``r`` entries to retain at least, ``c`` entries pruned. One name, "global", in the global scope;
            the name of each tensor in the others, with one value in the layer scope and one a row in the neuron
            scope.
        tensors: Counts of each tensor after the pruning.
    """

    scope: str
    hyperparameters: Mapping[str, float]
    groups: Mapping[str, GroupValues]
    tensors: Sequence[TensorRecord]

    @property
    def total(self) -> int:
        """Entries of all tensors, pruned or not."""
        return sum(tensor.total for tensor in self.tensors)

    @property
    def remaining(self) -> int:
        """Unpruned entries of all tensors after the call."""
        return sum(tensor.remaining for tensor in self.tensors)

    @property
    def pruned(self) -> int:
        """Entries that this call pruned."""
        return sum(int(group.c.sum()) for group in self.groups.values())

    @property
    def density(self) -> float:
        """remaining / total; NaN if there is no entry."""
        return self.remaining / self.total if self.total else float("nan")

    @property
    def sparsity(self) -> float:
        """1 - density."""
        return 1 - self.density

    @property
    def compression_ratio(self) -> float:
        """total / remaining; infinite if nothing remains."""
        return self.total / self.remaining if self.remaining else float("inf")

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; None for an index that is not defined."""
        return {
            "scope": self.scope,
            "hyperparameters": dict(self.hyperparameters),
            "groups": groups_to_dict(self.groups),
            "tensors": [tensor.to_dict() for tensor in self.tensors],
        }

    def __str__(self) -> str:
        """A line in total and a line a tensor."""
        width = max((len(tensor.name) for tensor in self.tensors), default=0)
        head = f"{self.scope} scope: pruned {self.pruned:,}, "
        head += f"{self.remaining:,} of {self.total:,} weights remain ({self.density:.1%})"
        lines = [
            f"  {t.name:<{width}} {t.remaining / max(t.total, 1):7.1%} {t.remaining:>12,} of {t.total:>12,}  {t.shape}"
            for t in self.tensors
        ]
        return "\n".join([head, *lines])


def numbers(array: Any) -> list[Any]:
    """An array as a list of plain numbers, None for NaN: JSON has no NaN."""
    return [None if value != value else value for value in np.asarray(array).tolist()]


def array(values: Sequence[float | None]) -> Any:
    """The float64 array that :func:`numbers` wrote."""
    return np.array([np.nan if value is None else value for value in values], np.float64)


def groups_to_dict(groups: Mapping[str, GroupValues]) -> dict[str, Any]:
    """Plain values of groups by name."""
    return {name: {key: numbers(value) for key, value in asdict(group).items()} for name, group in groups.items()}


def groups_from_dict(values: Mapping[str, Any]) -> dict[str, GroupValues]:
    """The groups that :func:`groups_to_dict` wrote."""
    return {
        name: GroupValues(
            np.array(group["d"], np.int64),
            array(group["index"]),
            array(group["r"]),
            np.array(group["c"], np.int64),
        )
        for name, group in values.items()
    }
