"""Rules for when an iterative pruning ends, and which round's model the user gets back.

The loop asks each rule after each training, before the next pruning. The rule sees the rounds so far, oldest first:
complete :class:`~torch_sap.records.round.Round` records, and last the :class:`~torch_sap.records.round.Measured` model
to judge (number, metrics, density, PQ Index, and ``pruned_count``, the entries that its pruning would take).

Example:
    >>> from torch_sap.stopping import NothingLeft, TargetDensity, WithinTolerance
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> rules = [WithinTolerance(0.01), TargetDensity(0.8), NothingLeft()]
    >>> history = iterative_sap(model, train_fn=lambda model: {"accuracy": 0.9}, iterations=20, stop=rules)
    >>> history[-1].density <= 0.8 < history[-2].density
    True
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch_sap.arguments import check_choice, check_int, check_number
from torch_sap.records.metrics import MODES, Mode, metric_values
from torch_sap.records.phases import label_phases
from torch_sap.records.round import Measured


class StoppingRule:
    """Base of the rules: accepts every round and never ends. Override one method or both for your own rule."""

    def accepts(self, rounds: Sequence[Measured]) -> bool:
        """Return whether the model of the last round may be given back."""
        return True

    def ends(self, rounds: Sequence[Measured]) -> bool:
        """Return whether the run ends with the last round."""
        return False

    def __repr__(self) -> str:
        """As the rule was made, as far as its attributes tell."""
        public = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in public.items())})"


class TargetDensity(StoppingRule):
    """End at the first trained model with at most this share of its weights.

    Args:
        density: Unpruned entries / all entries, in [0, 1].

    Raises:
        ValueError: if it is out of range.
    """

    def __init__(self, density: float) -> None:
        check_number("density", density, low=0, high=1)
        self.density = density

    def ends(self, rounds: Sequence[Measured]) -> bool:
        """Return whether the last round has at most this density."""
        return bool(rounds) and rounds[-1].density <= self.density


class WithinTolerance(StoppingRule):
    """Accept models whose metric is at most ``tolerance`` worse than the dense model's; end after ``patience`` others.

    Args:
        tolerance: Largest loss against round 0, in the units of the metric; 0 or more.
        metric: Its name. By default "accuracy", or else the only one.
        mode: "max" if a larger metric is better, "min" if a smaller one is (a loss, an error, a perplexity).
        patience: Worse rounds in a row that end the run; 1 or more.

    Raises:
        ValueError: if an argument is out of range. After the first training, if it is not clear which metric to judge
            by (:func:`torch_sap.records.metrics.choose_metric`). Later, if a round lacks the metric.
    """

    def __init__(self, tolerance: float, *, metric: str | None = None, mode: Mode = "max", patience: int = 1) -> None:
        check_number("tolerance", tolerance, low=0)
        check_choice("mode", mode, MODES)
        check_int("patience", patience, low=1)
        self.tolerance, self.metric, self.mode, self.patience = tolerance, metric, mode, patience

    def accepts(self, rounds: Sequence[Measured]) -> bool:
        """Return whether the last round's metric is within the tolerance."""
        return self._within(rounds)[-1]

    def ends(self, rounds: Sequence[Measured]) -> bool:
        """Return whether none of the last ``patience`` rounds was."""
        return bool(rounds) and not any(self._within(rounds)[-self.patience :])

    def _within(self, rounds: Sequence[Measured]) -> list[bool]:
        values = metric_values(rounds, self.metric, judge=self.mode)
        sign = 1 if self.mode == "max" else -1
        limit = self.tolerance + 1e-9 * abs(values[0])  # the rounding of 0.90 - 0.89 must not decide
        return [sign * (values[0] - value) <= limit for value in values]


class Collapse(StoppingRule):
    """End when :func:`torch_sap.records.phases.label_phases` says collapse, and do not accept that round.

    The arguments are those of that function, and ``metric`` as in :class:`WithinTolerance`.
    """

    def __init__(
        self, *, metric: str | None = None, mode: Mode = "max", noise: float = 0.005, significant: float = 0.05
    ) -> None:
        label_phases([], [], mode=mode, noise=noise, significant=significant)  # its checks
        self.metric, self.mode, self.noise, self.significant = metric, mode, noise, significant

    def accepts(self, rounds: Sequence[Measured]) -> bool:
        """Return whether the last round is not a collapse."""
        return not self.ends(rounds)

    def ends(self, rounds: Sequence[Measured]) -> bool:
        """Return whether the last round is a collapse."""
        pqi, values = [found.pqi for found in rounds], metric_values(rounds, self.metric, judge=self.mode)
        labels = label_phases(pqi, values, mode=self.mode, noise=self.noise, significant=self.significant)
        return labels[-1:] == ["collapse"]


class NothingLeft(StoppingRule):
    """End when the pruning would take no further entry, so that every later round would be the same."""

    def ends(self, rounds: Sequence[Measured]) -> bool:
        """Return whether the last round prunes nothing."""
        return bool(rounds) and rounds[-1].pruned_count == 0


def as_rules(stop: StoppingRule | Iterable[StoppingRule]) -> tuple[StoppingRule, ...]:
    """Collect one rule or several in a tuple; raise a TypeError for anything else."""
    rules = tuple(stop) if isinstance(stop, Iterable) and not isinstance(stop, str) else (stop,)
    for rule in rules:
        if not isinstance(rule, StoppingRule):
            raise TypeError(f"stop must be a StoppingRule or several, got {rule!r}")
    return rules
