"""Metrics of a model: what a user's function may return, and which one to show or to judge by."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Literal

from torch import Tensor, nn

from torch_sap.records.round import Measured

Metrics = float | Mapping[str, float] | Tensor | None
Mode = Literal["max", "min"]
MODES = ("max", "min")
SMALLER_IS_BETTER = ("loss", "error", "perplexity")
"""Words in the names of metrics that fall as a model gets better."""


def as_metrics(value: Metrics, source: str, name: str = "metric") -> dict[str, float]:
    """Convert what a user's function returned to numbers by name, or raise a TypeError that names the ``source``.

    A number without a name gets the one given.
    """
    if value is None:
        return {}
    items = value.items() if isinstance(value, Mapping) else [(name, value)]
    metrics = {}
    for key, number in items:
        tensor = number.detach() if isinstance(number, Tensor) else None
        scalar = isinstance(number, Real) if tensor is None else tensor.numel() == 1 and not tensor.is_complex()
        if not scalar or not isinstance(key, str):
            raise TypeError(f"{source} must give None, a number or a mapping from names to numbers, got {value!r}")
        metrics[key] = float(number if tensor is None else tensor)
    return metrics


def measured_by(eval_fn: Callable[..., Metrics]) -> Callable[..., dict[str, float]]:
    """Wrap an eval_fn: a number that it returns gets its name, unless it is a lambda or has none ("metric").

    It warns if it returns None, since then nothing is recorded.
    """
    name = getattr(eval_fn, "__name__", "metric")

    def evaluate(model: nn.Module) -> dict[str, float]:
        value = eval_fn(model)
        if value is None:
            warnings.warn(
                "eval_fn returned None, so nothing is recorded; return a number or a dict of numbers", stacklevel=2
            )
        return as_metrics(value, "eval_fn", name if name.isidentifier() else "metric")

    return evaluate


def choose_metric(names: Sequence[str], metric: str | None = None, *, judge: Mode | None = None) -> str | None:
    """Choose a metric for figures, tables, labels and stopping rules; None if none was given and there is none.

    It is the named one; else "accuracy"; else the first. A stopping rule must not guess: for ``judge="max"`` the
    metric is "accuracy" or else the only one, unless its name contains loss, error or perplexity; for ``judge="min"``
    it is the only one.

    Raises:
        ValueError: if a stopping rule would have to guess.
    """
    if metric is not None or not names:
        return metric
    if judge != "min" and "accuracy" in names:
        return "accuracy"
    falls = any(word in names[0].lower() for word in SMALLER_IS_BETTER)
    if judge is None or (len(names) == 1 and (judge == "min" or not falls)):
        return names[0]
    raise ValueError(
        f"metric must be named where it is not clear by what to judge, but round 0 has {list(names)}; pass metric= one "
        'of them, and mode="min" where a smaller one is better'
    )


def metric_values(rounds: Sequence[Measured], metric: str | None = None, *, judge: Mode | None = None) -> list[float]:
    """Collect the metric of :func:`choose_metric`, one value per round; a ValueError names a round that lacks it."""
    names = list(rounds[0].metrics) if rounds else []
    name = choose_metric(names, metric, judge=judge) or "accuracy"
    lacking = [found.number for found in rounds if name not in found.metrics]
    if lacking:
        raise ValueError(
            f"metric {name!r} must be recorded in every round, but round {lacking[0]} lacks it (round 0 has "
            f"{names or 'none'}); return it from train_fn or eval_fn"
        )
    return [found.metrics[name] for found in rounds]
