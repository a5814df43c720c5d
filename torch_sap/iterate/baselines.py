"""The paper's baselines on the engine of SAP, so that only the count differs: a fixed share of every group a round."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from torch_sap.decide.bounds import FixedRatio
from torch_sap.decide.groups import Entry, Scope
from torch_sap.iterate.metrics import Metrics
from torch_sap.iterate.pruner import Plan, Stepper
from torch_sap.iterate.rewinding import Rewind
from torch_sap.records.round import Round


class LotteryTicket(Stepper):
    """Iterative magnitude pruning with rewinding: each round prunes the share ``ratio`` of what is left.

    Arguments but ``ratio`` are those of :class:`SAP`; p and q only say which PQ Index is recorded.

    Args:
        ratio: Share P of the unpruned entries of each group that a round prunes, rounded to whole entries; in [0, 1].

    Source: Frankle and Carbin, "The lottery ticket hypothesis", ICLR 2019; P = 0.2 in the SAP paper.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        ratio: float = 0.2,
        scope: Scope = "global",
        p: float = 0.5,
        q: float = 1.0,
        rewind: Rewind = "init",
        exclude: str | Iterable[str] = (),
        optimizer: Optimizer | None = None,
        gini: bool = False,
    ) -> None:
        rule = FixedRatio(p, q, ratio=ratio)
        super().__init__(model, rule, scope=scope, rewind=rewind, exclude=exclude, optimizer=optimizer, gini=gini)


class OneShot(LotteryTicket):
    """One Shot as the paper's authors run it: a :class:`LotteryTicket` always ranked by the first trained weights."""

    _first: dict[str, Tensor] | None = None

    def _entries(self) -> list[Entry]:
        entries = super()._entries()
        if not self.history or self._first is None:
            return entries
        return [replace(entry, scores=self._first[entry.name]) for entry in entries]

    def apply(self, plan: Plan, eval_fn: Callable[[nn.Module], Metrics] | None = None) -> Round:
        """As of :class:`SAP`; the first trained weights are remembered."""
        if not self.history or self._first is None:
            self._first = {entry.name: entry.scores.clone() for entry in super()._entries()}
        return super().apply(plan, eval_fn)

    def state_dict(self) -> dict[str, Any]:
        """As of :class:`SAP`, with the first trained weights."""
        return {**super().state_dict(), "first": None if self._first is None else dict(self._first)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As of :class:`SAP`."""
        first = state.get("first")
        if first is not None:
            first = {prunable.name: first[prunable.name].to(prunable.weight.device) for prunable in self._prunables}
        super().load_state_dict(state)
        self._first = first
