"""Rules that say when an iterative pruning is over, and which of its rounds the user gets back.

After each training a rule is asked, before anything more is pruned. It sees the rounds so far, oldest first: complete
:class:`~torch_sap.records.round.Round` records, and as the last one the
:class:`~torch_sap.records.round.Measured` model in question (number, metrics, density, PQ Index, and
``pruned_count``, how many entries its pruning would take). A history of complete rounds will do as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch_sap.arguments import check_choice, check_int, check_number
from torch_sap.records.metrics import MODES, Mode, metric_values
from torch_sap.records.phases import label_phases
from torch_sap.records.round import Measured


class StoppingRule:
    """Base of the rules: it accepts every round and never ends. Override one method or both for your own rule."""

    def accepts(self, rounds: Sequence[Measured]) -> bool:
        """Whether the user may get the model of the last round back."""
        return True

    def ends(self, rounds: Sequence[Measured]) -> bool:
        """Whether the run ends with the last round."""
        return False


class TargetDensity(StoppingRule):
    """End at the first trained model with at most this share of its weights.

    Args:
        density: Unpruned entries / all entries, in [0, 1].

    Raises:
        ValueError: if it is out of its range.

    Example:
        >>> from torch_sap.stopping import TargetDensity
        >>> TargetDensity(0.1).ends([])
        False
    """

    def __init__(self, density: float) -> None:
        check_number("density", density, low=0, high=1)
        self.density = density

    def ends(self, rounds: Sequence[Measured]) -> bool:
        """Whether the last round has at most this density."""
        return bool(rounds) and rounds[-1].density <= self.density


class WithinTolerance(StoppingRule):
    """Accept models whose metric is at most ``tolerance`` worse than the dense one's; end when no more come.

    The user gets the sparsest of them back.

    Args:
        tolerance: Largest loss against round 0, in the units of the metric; 0 or more.
        metric: Its name. By default "accuracy", or else the only one.
        mode: "max" if a larger metric is better, "min" if a smaller one is (a loss, an error, a perplexity).
        patience: Rounds in a row that may be worse before it ends; 1 or more.

    Raises:
        ValueError: if an argument is out of its range. After the first training, if it is not clear which metric is
            meant (:func:`torch_sap.records.metrics.choose_metric`). Later, if a round lacks the metric.

    Example:
        >>> from torch_sap.stopping import WithinTolerance
        >>> WithinTolerance(0.01, metric="accuracy", patience=2).tolerance
        0.01
    """

    def __init__(self, tolerance: float, *, metric: str | None = None, mode: Mode = "max", patience: int = 1) -> None:
        check_number("tolerance", tolerance, low=0)
        check_choice("mode", mode, MODES)
        check_int("patience", patience, low=1)
        self.tolerance, self.metric, self.mode, self.patience = tolerance, metric, mode, patience

    def accepts(self, rounds: Sequence[Measured]) -> bool:
        """Whether the last round's metric is within the tolerance."""
        return self._within(rounds)[-1]

    def ends(self, rounds: Sequence[Measured]) -> bool:
        """Whether the last ``patience`` rounds were not."""
        return bool(rounds) and not any(self._within(rounds)[-self.patience :])

    def _within(self, rounds: Sequence[Measured]) -> list[bool]:
        values = metric_values(rounds, self.metric, judge=self.mode)
        sign = 1 if self.mode == "max" else -1
        limit = self.tolerance + 1e-9 * abs(values[0])  # the rounding of 0.90 - 0.89 must not decide
        return [sign * (values[0] - value) <= limit for value in values]


class Collapse(StoppingRule):
    """End when the paper's hypothesis says collapse, and do not accept such rounds.

    Arguments and rule are those of :func:`torch_sap.records.phases.label_phases`; ``metric`` is as of
    :class:`WithinTolerance`.

    Example:
        >>> from torch_sap.stopping import Collapse
        >>> Collapse(significant=0.1).significant
        0.1
    """

    def __init__(
        self, *, metric: str | None = None, mode: Mode = "max", noise: float = 0.005, significant: float = 0.05
    ) -> None:
        label_phases([], [], mode=mode, noise=noise, significant=significant)  # its checks
        self.metric, self.mode, self.noise, self.significant = metric, mode, noise, significant

    def accepts(self, rounds: Sequence[Measured]) -> bool:
        """Whether the last round is not one of collapse."""
        return not self.ends(rounds)

    def ends(self, rounds: Sequence[Measured]) -> bool:
        """Whether the last round is one of collapse."""
        pqi, values = [found.pqi for found in rounds], metric_values(rounds, self.metric, judge=self.mode)
        labels = label_phases(pqi, values, mode=self.mode, noise=self.noise, significant=self.significant)
        return labels[-1:] == ["collapse"]


class NothingLeft(StoppingRule):
    """End when the pruning would take no further entry: every later round would be the same.

    Example:
        >>> from torch_sap.stopping import NothingLeft
        >>> NothingLeft().ends([])
        False
    """

    def ends(self, rounds: Sequence[Measured]) -> bool:
        """Whether the last round prunes nothing."""
        return bool(rounds) and rounds[-1].pruned_count == 0


def as_rules(stop: StoppingRule | Iterable[StoppingRule]) -> tuple[StoppingRule, ...]:
    """Collect one rule or several in a tuple.

    Raises:
        TypeError: if something else is among them.
    """
    rules = tuple(stop) if isinstance(stop, Iterable) and not isinstance(stop, str) else (stop,)
    for rule in rules:
        if not isinstance(rule, StoppingRule):
            raise TypeError(f"stop must be a StoppingRule or several, got {rule!r}")
    return rules
