"""Figures of an iterative pruning, in Okabe-Ito colors with a marker and a line style per measure."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch_sap.arguments import needs
from torch_sap.records.metrics import choose_metric, metric_values
from torch_sap.records.round import Round

PHASE_COLORS = {"regularization": "#009E73", "compression": "#E69F00", "collapse": "#D55E00"}
OF_METRIC, OF_INDEX = ("#0072B2", "o", "-"), ("#D55E00", "^", "-.")
OF_REMAINING, OF_GINI = ("#000000", "s", "--"), ("#009E73", "D", ":")
"""Color, marker and line style."""


def plot_rounds(
    rounds: Sequence[Round], path: str | os.PathLike[str], *, metric: str | None = None, phases: Sequence[Any] = ()
) -> None:
    """Draw rounds as in the paper's Figure 2; arguments and errors are those of ``History.plot``."""
    with needs("History.plot", "matplotlib", "plot"):
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    if not len(rounds):
        raise ValueError("history must have a round to be drawn, but it is empty")
    if len(phases) not in (0, len(rounds)):
        raise ValueError(f"phases must have a label for each of the {len(rounds)} rounds, got {len(phases)}")
    if unknown := [phase for phase in phases if phase is not None and phase not in PHASE_COLORS]:
        raise ValueError(f"phases must hold {', '.join(PHASE_COLORS)} or None, got {unknown[0]!r}")
    if metric is not None:
        metric_values(rounds[:1], metric)  # raises here if there is none
    name = choose_metric(list(rounds[0].metrics), metric) or "metric"
    retrained = [  # title, column, column to subtract, style
        (name, name, "", OF_METRIC),
        ("remaining weights (%)", "remaining_pct", "", OF_REMAINING),
        ("PQ Index", "pqi", "", OF_INDEX),
        ("Gini index", "gini", "", OF_GINI),
    ]
    pruned = [
        (name, f"pruned_{name}", "", OF_METRIC),
        (f"{name}, pruned - retrained", f"pruned_{name}", name, OF_METRIC),
        ("PQ Index", "pruned_pqi", "", OF_INDEX),
        ("PQ Index, pruned - retrained", "pruned_pqi", "pqi", OF_INDEX),
    ]
    figure = Figure(figsize=(14, 6), layout="constrained")
    halves: Any = figure.subfigures(2, 1)
    titles = ("(a) retrained models", "(b) pruned models, before rewinding")
    for half, title, panels in zip(halves, titles, (retrained, pruned), strict=True):
        half.suptitle(title, fontsize="medium")
        for axes, panel in zip(half.subplots(1, 4), panels, strict=True):
            _draw(axes, [found.row() for found in rounds], *panel)
            shade_phases(axes, phases)
    if found := [phase for phase in PHASE_COLORS if phase in phases]:
        patches = [Patch(color=PHASE_COLORS[phase], alpha=0.3, label=phase) for phase in found]
        figure.legend(handles=patches, loc="outside lower center", ncols=len(found), fontsize="small")
    figure.savefig(path, dpi=120)


def shade_phases(axes: Any, phases: Sequence[str | None]) -> None:
    """Shade the background by the phase of each round; rounds without a phase stay white."""
    for number, phase in enumerate(phases):
        if phase is not None:
            axes.axvspan(number - 0.5, number + 0.5, color=PHASE_COLORS[phase], alpha=0.15, linewidth=0)


def _draw(axes: Any, rows: Sequence[Any], title: str, column: str, base: str, style: tuple[str, str, str]) -> None:
    needed = [column, base] if base else [column]
    measured = [row for row in rows if all(row.get(name) is not None for name in needed)]
    values = [row[column] - row[base] if base else row[column] for row in measured]
    axes.set_title(title, fontsize="small")
    axes.set_xlabel("round", fontsize="small")
    axes.grid(alpha=0.3)
    if measured:
        color, marker, line = style
        numbers = [row["round"] for row in measured]
        axes.plot(numbers, values, color=color, marker=marker, linestyle=line, markersize=4)
    else:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="gray")
