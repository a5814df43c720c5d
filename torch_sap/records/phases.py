"""The paper's hypothesis as a rule that labels rounds with a phase, by PQ Index and metric.

Source: "Hypothesis" and Figure 1 of Diao et al., ICLR 2023 (arXiv 2302.05601).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch_sap.arguments import check_choice, check_number
from torch_sap.records.metrics import MODES, Mode

Phase = Literal["regularization", "compression", "collapse"]


def label_phases(
    pqi: Sequence[float],
    values: Sequence[float],
    *,
    mode: Mode = "max",
    noise: float = 0.005,
    significant: float = 0.05,
) -> list[Phase | None]:
    """Label rounds by whether the PQ Index rises, and by the loss against the best metric so far.

    The loss of a round is the best value up to and including this round, minus the round's value:

    ========================  ===============  =======================
    phase                     PQ Index         loss
    ========================  ===============  =======================
    regularization            does not rise    at most ``noise``
    compression               rises            at most ``significant``
    collapse                  does not rise    more than ``significant``
    ========================  ===============  =======================

    The arguments are the PQ Index and the metric of the retrained models, one value per round, and the limits in the
    units of the metric. Rounds that the hypothesis does not cover get None, round 0 among them.

    Raises:
        ValueError, TypeError: if an argument is out of its range or not a number.

    Example:
        >>> from torch_sap.records.phases import label_phases
        >>> label_phases([0.30, 0.20, 0.25, 0.10], [0.90, 0.91, 0.89, 0.40])
        [None, 'regularization', 'compression', 'collapse']
    """
    check_choice("mode", mode, MODES)
    check_number("noise", noise)
    check_number("significant", significant)
    if not 0 <= noise <= significant:
        raise ValueError(f"noise and significant must be 0 <= noise <= significant, got {noise} and {significant}")
    labels: list[Phase | None] = []
    best = -math.inf
    for number, (index, value) in enumerate(zip(pqi, values, strict=True)):
        gain = value if mode == "max" else -value
        best = max(best, gain)  # NaN is never the larger one
        labels.append(_label(index - pqi[number - 1], best - gain, noise, significant) if number else None)
    return labels


def _label(rise: float, loss: float, noise: float, significant: float) -> Phase | None:
    if math.isnan(rise) or math.isnan(loss):
        return None
    if rise > 0:
        return "compression" if loss <= significant else None
    if loss <= noise:
        return "regularization"
    return "collapse" if loss > significant else None
