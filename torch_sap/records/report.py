"""What one pruning found and did: the counts of each tensor, and the report of a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch_sap.decide.step import GroupValues
from torch_sap.masks.parameters import Prunable
from torch_sap.records.codec import to_plain


class _Counted(Protocol):
    @property
    def remaining(self) -> int: ...
    @property
    def total(self) -> int: ...


class Shares:
    """Density, sparsity and compression ratio of whatever has ``remaining`` and ``total`` entries."""

    @property
    def density(self: _Counted) -> float:
        """remaining / total; NaN if there is no entry."""
        return self.remaining / self.total if self.total else float("nan")

    @property
    def sparsity(self: _Counted) -> float:
        """1 - density."""
        return 1 - self.remaining / self.total if self.total else float("nan")

    @property
    def compression_ratio(self: _Counted) -> float:
        """total / remaining; infinite if nothing remains."""
        return self.total / self.remaining if self.remaining else float("inf")


class OfTensors(Shares):
    """The same of whatever has counts of ``tensors``, all together."""

    tensors: Sequence[TensorRecord]

    @property
    def remaining(self) -> int:
        """Unpruned entries of all tensors."""
        return sum(tensor.remaining for tensor in self.tensors)

    @property
    def total(self) -> int:
        """Entries of all tensors, pruned or not."""
        return sum(tensor.total for tensor in self.tensors)


@dataclass(frozen=True)
class TensorRecord(Shares):
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


def tensor_records(prunables: Sequence[Prunable], remaining: Sequence[int]) -> tuple[TensorRecord, ...]:
    """Pair tensors with their unpruned entries."""
    weights = [(prunable.name, prunable.weight) for prunable in prunables]
    return tuple(
        TensorRecord(name, tuple(weight.shape), count, weight.numel())
        for (name, weight), count in zip(weights, remaining, strict=True)
    )


@dataclass(frozen=True, eq=False)
class PruningReport(OfTensors):
    """What one call pruned.

    Attributes:
        scope: "global", "layer" or "neuron".
        hyperparameters: p, q, eta_r, gamma, beta.
        groups: By name, arrays with one value per group: ``d`` unpruned entries before, ``index`` I (NaN where it is
            undefined), ``r`` entries to retain at least, ``c`` entries pruned. One name, "global", in the global
            scope; the name of each tensor in the others, with one value in the layer scope and one per row in the
            neuron scope.
        tensors: Counts of each tensor after the pruning.
    """

    scope: str
    hyperparameters: Mapping[str, float]
    groups: Mapping[str, GroupValues]
    tensors: Sequence[TensorRecord]

    @property
    def pruned(self) -> int:
        """Entries that this call pruned."""
        return sum(int(group.c.sum()) for group in self.groups.values())

    def to_dict(self) -> dict[str, Any]:
        """Convert to values that JSON can hold; None for an index that is undefined."""
        return dict(to_plain(self))

    def __str__(self) -> str:
        """One line in total and one per tensor."""
        width = max((len(tensor.name) for tensor in self.tensors), default=0)
        head = f"{self.scope} scope: pruned {self.pruned:,}, "
        head += f"{self.remaining:,} of {self.total:,} weights remain ({self.density:.1%})"
        lines = [
            f"  {t.name:<{width}} {t.remaining / max(t.total, 1):7.1%} {t.remaining:>12,} of {t.total:>12,}  {t.shape}"
            for t in self.tensors
        ]
        return "\n".join([head, *lines])
