"""The paper's hypothesis as a rule: which phase of pruning a round is in, by its PQ Index and its metric.

Source: "Hypothesis" and Figure 1 of Diao et al., ICLR 2023 (arXiv 2302.05601).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch_sap.arguments import check_number
from torch_sap.records.round import Round

Phase = Literal["regularisation", "compression", "collapse"]
Mode = Literal["max", "min"]
SMALLER_IS_BETTER = ("loss", "error", "perplexity")
"""Words in the names of such metrics."""


def label_phases(
    pqi: Sequence[float],
    values: Sequence[float],
    *,
    mode: Mode = "max",
    noise: float = 0.005,
    significant: float = 0.05,
) -> list[Phase | None]:
    """Label rounds by whether sparsity rises or falls, and by how much of the best metric so far is lost.

    With the loss of a round = best value of this and all earlier rounds - its value:

    ========================  ===============  =======================
    phase                     PQ Index         loss
    ========================  ===============  =======================
    regularisation            does not rise    at most ``noise``
    compression               rises            at most ``significant``
    collapse                  does not rise    more than ``significant``
    ========================  ===============  =======================

    The PQ Index is compared with that of the round before. Of everything else (round 0, an index that rises while
    much is lost, one that falls while a little is lost) the hypothesis says nothing, and neither does the label.

    Args:
        pqi: PQ Index of the retrained model, a round each.
        values: Metric of the retrained model, a round each.
        mode: "max" if a larger metric is better, "min" if a smaller one is.
        noise: Largest loss that is no loss, in the units of the metric; 0 or more.
        significant: Largest loss that is moderate; ``noise`` or more.

    Returns:
        A label or None for each round.

    Raises:
        ValueError: if an argument is out of its range.
        TypeError: if ``noise`` or ``significant`` is no number.

    Example:
        >>> from torch_sap.records.phases import label_phases
        >>> label_phases([0.30, 0.20, 0.25, 0.10], [0.90, 0.91, 0.89, 0.40])
        [None, 'regularisation', 'compression', 'collapse']
    """
    check_mode(mode)
    check_number("noise", noise)
    check_number("significant", significant)
    if not 0 <= noise <= significant:
        raise ValueError(f"noise and significant must be 0 <= noise <= significant, got {noise} and {significant}")
    labels: list[Phase | None] = []
    best = -math.inf
    for number, (index, value) in enumerate(zip(pqi, values, strict=True)):
        gain = value if mode == "max" else -value
        best = max(best, gain)  # NaN is never the larger one
        loss = best - gain
        labels.append(_label(index - pqi[number - 1], loss, noise, significant) if number else None)
    return labels


def _label(rise: float, loss: float, noise: float, significant: float) -> Phase | None:
    if math.isnan(rise) or math.isnan(loss):
        return None
    if rise > 0:
        return "compression" if loss <= significant else None
    if loss <= noise:
        return "regularisation"
    return "collapse" if loss > significant else None


def metric_values(rounds: Sequence[Round], metric: str | None) -> list[float]:
    """A metric of the retrained models, a value a round: the one named, or else "accuracy", or else the first there is.

    Raises:
        ValueError: if a round does not have it.
    """
    names = list(rounds[0].metrics) if rounds else []
    name = metric or ("accuracy" if "accuracy" in names else next(iter(names), "accuracy"))
    lacking = [round.number for round in rounds if name not in round.metrics]
    if lacking:
        raise ValueError(
            f"metric {name!r} must be recorded in every round, but round {lacking[0]} lacks it (round 0 has "
            f"{names or 'none'}); return it from train_fn or eval_fn"
        )
    return [round.metrics[name] for round in rounds]


def judged_metric(rounds: Sequence[Round], metric: str | None, mode: Mode) -> str | None:
    """The metric that a stopping rule judges by: the one named, or the only one that can be meant.

    Without a name that is "accuracy" or else the only one there is. With mode "max" it may not be one of which smaller
    is better by its name, and with mode "min" there may be no other beside it.

    Returns:
        Its name; None if none was named and there is no metric.

    Raises:
        ValueError: if none was named, and it is not clear which is meant.
    """
    names = list(rounds[0].metrics) if rounds else []
    if metric is not None or not names:
        return metric
    if mode == "max" and "accuracy" in names:
        return "accuracy"
    falls = any(word in names[0].lower() for word in SMALLER_IS_BETTER)
    if len(names) == 1 and (mode == "min" or not falls):
        return names[0]
    raise ValueError(
        f"metric must be named where it is not clear by what to judge, but round 0 has {names}; pass metric= one of "
        'them, and mode="min" where a smaller one is better'
    )


def check_mode(mode: object) -> None:
    """Raise a ValueError unless a mode is "max" or "min"."""
    if mode not in ("max", "min"):
        raise ValueError(f'mode must be "max" or "min", got mode={mode!r}')
