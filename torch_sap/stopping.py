"""When an iterative pruning is over, and which of its rounds the user gets back.

A rule looks at the history after each training, before anything more is pruned: its last round holds the metrics, the
sparsity and the count ``c`` that the pruning would take.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch_sap.arguments import check_number
from torch_sap.records.history import History
from torch_sap.records.phases import Mode, check_mode, judged_metric, label_phases, metric_values


class StoppingRule:
    """Base of the rules: it accepts every round and never ends. Overwrite one method or both for a rule of yours."""

    def accepts(self, history: History) -> bool:
        """Whether the model of the last round is one that the user may get back."""
        return True

    def ends(self, history: History) -> bool:
        """Whether the last round is to be the last."""
        return False


class TargetDensity(StoppingRule):
    """Ends at the first trained model with at most this share of its weights.

    Args:
        density: Unpruned entries / all entries, in [0, 1].

    Raises:
        ValueError: if it is out of its range.

    Example:
        >>> TargetDensity(0.1).ends(History())
        False
    """

    def __init__(self, density: float) -> None:
        check_number("density", density)
        if not 0 <= density <= 1:
            raise ValueError(f"density must be in [0, 1], got density={density}")
        self.density = density

    def ends(self, history: History) -> bool:
        """Whether the last round has at most this density."""
        return bool(history) and history[-1].density <= self.density


class WithinTolerance(StoppingRule):
    """Accepts models whose metric is at most ``tolerance`` worse than the dense one's; ends when no more come.

    The user gets the sparsest of them back.

    Args:
        tolerance: Largest loss against round 0, in the units of the metric; 0 or more.
        metric: Its name. By default "accuracy", or else the only one there is.
        mode: "max" if a larger metric is better, "min" if a smaller one is (a loss, an error, a perplexity).
        patience: Rounds in a row that may be worse before it ends; 1 or more.

    Raises:
        ValueError: if an argument is out of its range. After the first training, if its metrics are several without
            "accuracy" (several at all with mode "min"), or the only one is a loss, an error or a perplexity by its
            name and mode is "max". Later, if a round lacks the metric.

    Example:
        >>> WithinTolerance(0.01, metric="accuracy", patience=2).tolerance
        0.01
    """

    def __init__(self, tolerance: float, *, metric: str | None = None, mode: Mode = "max", patience: int = 1) -> None:
        check_number("tolerance", tolerance)
        check_mode(mode)
        if not tolerance >= 0:
            raise ValueError(f"tolerance must not be negative, got tolerance={tolerance}")
        if not isinstance(patience, int) or isinstance(patience, bool) or patience < 1:
            raise ValueError(f"patience must be an int of 1 or more, got patience={patience!r}")
        self.tolerance, self.metric, self.mode, self.patience = tolerance, metric, mode, patience

    def accepts(self, history: History) -> bool:
        """Whether the last round's metric is within the tolerance."""
        return self._within(history)[-1]

    def ends(self, history: History) -> bool:
        """Whether the last ``patience`` rounds were not."""
        return bool(history) and not any(self._within(history)[-self.patience :])

    def _within(self, history: History) -> list[bool]:
        values = metric_values(history, judged_metric(history, self.metric, self.mode))
        sign = 1 if self.mode == "max" else -1
        limit = self.tolerance + 1e-9 * abs(values[0])  # the rounding of 0.90 - 0.89 must not decide
        return [sign * (values[0] - value) <= limit for value in values]


class Collapse(StoppingRule):
    """Ends when the hypothesis of the paper says collapse, and does not accept such rounds.

    Arguments and rule are those of :func:`torch_sap.records.phases.label_phases`; ``metric`` is chosen, or asked for,
    as :class:`WithinTolerance` does.

    Example:
        >>> Collapse(significant=0.1).significant
        0.1
    """

    def __init__(
        self, *, metric: str | None = None, mode: Mode = "max", noise: float = 0.005, significant: float = 0.05
    ) -> None:
        label_phases([], [], mode=mode, noise=noise, significant=significant)  # its checks
        self.metric, self.mode, self.noise, self.significant = metric, mode, noise, significant

    def accepts(self, history: History) -> bool:
        """Whether the last round is not one of collapse."""
        return not self.ends(history)

    def ends(self, history: History) -> bool:
        """Whether the last round is one of collapse."""
        metric = judged_metric(history, self.metric, self.mode)
        labels = history.phases(metric=metric, mode=self.mode, noise=self.noise, significant=self.significant)
        return labels[-1] == "collapse"


class NothingLeft(StoppingRule):
    """Ends when the pruning would take no entry more: every round from then on would be the same.

    Example:
        >>> NothingLeft().ends(History())
        False
    """

    def ends(self, history: History) -> bool:
        """Whether the last round prunes nothing."""
        return bool(history) and history[-1].pruned_count == 0


def as_rules(stop: StoppingRule | Iterable[StoppingRule]) -> tuple[StoppingRule, ...]:
    """One rule or several as a tuple.

    Raises:
        TypeError: if something else is among them.
    """
    if isinstance(stop, StoppingRule):
        return (stop,)
    if isinstance(stop, str) or not isinstance(stop, Iterable):
        raise TypeError(f"stop must be a StoppingRule or several, got {stop!r}")
    rules = tuple(stop)
    for rule in rules:
        if not isinstance(rule, StoppingRule):
            raise TypeError(f"stop must be a StoppingRule or several, got {rule!r}")
    return rules
