"""Pruners that the experiments compare SAP with: random scores, and two that know what SAP pruned and never measure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import torch_sap
from torch_sap.decide.bounds import Hyperparameters
from torch_sap.decide.groups import Entry
from torch_sap.iterate.pruner import Pruner
from torch_sap.records.metrics import Metrics


class RandomPruning(torch_sap.LotteryTicket):
    """A lottery ticket that prunes at random: what a method must beat."""

    def __init__(self, model: nn.Module, *, seed: int, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.seed = seed

    def rank(self, entries: list[Entry]) -> list[Entry]:
        """Random scores."""
        # Seeded by the round, so that neither the training's random numbers nor a resumed run differ.
        generator = torch.Generator().manual_seed(1000 * (self.seed + 1) + len(self.history))
        return [replace(entry, scores=_random_like(entry.scores, generator)) for entry in entries]


@dataclass(frozen=True)
class Counts(Hyperparameters):
    """Given counts instead of SAP's, by the sizes of the groups, which must differ.

    Attributes:
        counts: c of a group of d entries.
    """

    counts: dict[int, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, float]:
        """The numbers by name; the counts change every round."""
        return {"p": self.p, "q": self.q}

    def count(self, index: NDArray[np.float64], d: NDArray[Any]) -> NDArray[np.int64]:
        """The given counts; 0 for other sizes, such as those of samples."""
        sizes = np.asarray(d)
        return np.array([self.counts.get(int(size), 0) for size in sizes.flat], np.int64).reshape(sizes.shape)


class Replay(Pruner):
    """Prune as many entries of each group as another run did in the same round, whatever the weights are.

    Args:
        model: Any module. It is pruned in place.
        followed: The history of the other run, in the global or the layer scope, of the same model.
        p: The smaller norm of the PQ Index that is recorded.
        q: The larger norm.
        settings: As of :class:`torch_sap.SAP`.
    """

    def __init__(self, model: nn.Module, followed: torch_sap.History, *, p: float, q: float, **settings: Any) -> None:
        super().__init__(model, Counts(p, q), **settings)
        self.followed = followed

    def _measure(self, metrics: Metrics = None, *, prune: bool) -> Any:
        groups = self.followed[len(self.history)].groups
        counts = {int(group.d[0]): int(group.c[0]) for group in groups.values()}
        if len(counts) < len(groups):
            raise ValueError(f"groups must differ in size for a replay, got {[int(g.d[0]) for g in groups.values()]}")
        self.rule = replace(self.rule, counts=counts)  # type: ignore[call-arg]
        return super()._measure(metrics, prune=prune)


def mean_share(history: torch_sap.History) -> float:
    """The fixed ratio that reaches the last density of a history in as many prunings."""
    return float(1 - history[-1].density ** (1 / (len(history) - 1)))


def _random_like(scores: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(scores.shape, generator=generator).to(scores)
