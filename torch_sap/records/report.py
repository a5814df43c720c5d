"""The report of one pruning call, and the counts of each tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch_sap.decide.step import GroupValues
from torch_sap.masks.parameters import LeftOut, Prunable
from torch_sap.records.codec import to_plain
from torch_sap.records.html import table


class Shares:
    """Density, sparsity and compression ratio of a record with ``remaining`` and ``total`` entries."""

    remaining: int
    total: int

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


class OfTensors(Shares):
    """Totals of a record that has counts of ``tensors``."""

    tensors: Sequence[TensorRecord]

    @property
    def remaining(self) -> int:  # type: ignore[override]
        """Unpruned entries of all tensors."""
        return sum(tensor.remaining for tensor in self.tensors)

    @property
    def total(self) -> int:  # type: ignore[override]
        """Entries of all tensors, pruned or not."""
        return sum(tensor.total for tensor in self.tensors)


@dataclass(frozen=True)
class TensorRecord(Shares):
    """Unpruned and all entries of one tensor; ``name`` is its dotted path before pruning."""

    name: str
    shape: tuple[int, ...]
    remaining: int
    total: int


def tensor_records(prunables: Sequence[Prunable], remaining: Sequence[int]) -> tuple[TensorRecord, ...]:
    """Pair tensors with their unpruned entries."""
    counted = [(prunable.name, prunable.weight, count) for prunable, count in zip(prunables, remaining, strict=True)]
    return tuple(TensorRecord(name, tuple(w.shape), count, w.numel()) for name, w, count in counted)


@dataclass(frozen=True, eq=False)
class PruningReport(OfTensors):
    """What one call pruned.

    Attributes:
        scope: "global", "layer" or "neuron".
        hyperparameters: p, q, eta_r, gamma, beta.
        groups: By name, arrays with one value per group: ``d`` unpruned entries before, ``index`` I (NaN if
            undefined), ``r`` entries to retain at least, ``c`` entries pruned. The only name in the global scope is
            "global"; the others have a name per tensor, with one value (layer; one per matrix of a stack of experts) or
            one per output channel (neuron).
        tensors: Counts of each tensor after the pruning.
        left_out: Parameters with more than one dimension that are not pruned, each with a ``name``, a ``shape``, and
            the ``reason``. A tensor that is zero throughout has not been trained yet; it loses nothing in any scope.
    """

    scope: str
    hyperparameters: Mapping[str, float]
    groups: Mapping[str, GroupValues]
    tensors: Sequence[TensorRecord]
    left_out: Sequence[LeftOut] = ()

    @property
    def pruned(self) -> int:
        """Entries that this call pruned."""
        return sum(int(group.c.sum()) for group in self.groups.values())

    def to_dict(self) -> dict[str, Any]:
        """Convert to values that JSON can hold; None for an undefined index."""
        return dict(to_plain(self))

    def __str__(self) -> str:
        """One line in total, one per tensor, and one about what is left out."""
        width = max((len(tensor.name) for tensor in self.tensors), default=0)
        lines = [
            f"  {t.name:<{width}} {t.remaining / max(t.total, 1):7.1%} {t.remaining:>12,} of {t.total:>12,}  {t.shape}"
            for t in self.tensors
        ]
        return "\n".join([self._head(), *lines, *(f"  {line}" for line in left_out_text(self.left_out))])

    def _repr_html_(self) -> str:
        titles = ["weight", "shape", "weights", "remaining", "remaining %"]
        rows = [(t.name, t.shape, f"{t.total:,}", f"{t.remaining:,}", f"{100 * t.density:.1f}") for t in self.tensors]
        return table(self._head(), titles, rows, "".join(left_out_text(self.left_out)))

    def _head(self) -> str:
        counts = f"{self.remaining:,} of {self.total:,} weights remain ({self.density:.1%})"
        return f"{self.scope} scope: pruned {self.pruned:,}, {counts}"


def left_out_text(left_out: Sequence[LeftOut]) -> list[str]:
    """Say in a line what is left out and why, or in none; of many tensors with one reason, only the first is named."""
    reasons: dict[str, list[str]] = {}
    for one in left_out:
        reasons.setdefault(one.reason, []).append(one.name)
    some = [(names[0] + (f" and {len(names) - 1} more" if names[1:] else ""), why) for why, names in reasons.items()]
    return ["left out: " + ", ".join(f"{names} ({why})" for names, why in some)] if some else []
