"""Figures of an iterative pruning, in Okabe-Ito colors with a marker and a line style per measure."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch_sap.arguments import needs
from torch_sap.records.metrics import choose_metric, metric_values
from torch_sap.records.round import Round

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PHASE_COLORS = {"regularization": "#009E73", "compression": "#E69F00", "collapse": "#D55E00"}
OF_METRIC, OF_INDEX = ("#0072B2", "o", "-"), ("#D55E00", "^", "-.")
OF_REMAINING, OF_GINI = ("#000000", "s", "--"), ("#009E73", "D", ":")
"""Color, marker and line style."""
LEAST_SPAN = 0.1
"""Span of an axis, as a share of the largest value: half a point of noise in an accuracy of 98 % is not a drop."""
Panel = tuple[str, str, str, tuple[str, str, str]]
"""Title, column, column to subtract, and style."""


def plot_rounds(rounds: Sequence[Round], *, metric: str | None = None, phases: Sequence[Any] = ()) -> Figure:
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
    retrained: list[Panel] = [
        (name, name, "", OF_METRIC),
        ("remaining weights (%)", "remaining_pct", "", OF_REMAINING),
        ("PQ Index", "pqi", "", OF_INDEX),
        ("Gini index", "gini", "", OF_GINI),
    ]
    pruned: list[Panel] = [
        (name, f"pruned_{name}", "", OF_METRIC),
        (f"{name}, pruned - retrained", f"pruned_{name}", name, OF_METRIC),
        ("PQ Index", "pruned_pqi", "", OF_INDEX),
        ("PQ Index, pruned - retrained", "pruned_pqi", "pqi", OF_INDEX),
    ]
    rows = [found.row() for found in rounds]
    titles = {"(a) retrained models": retrained, "(b) pruned models, before rewinding": pruned}
    shown = {title: [panel for panel in panels if _measured(rows, panel)] for title, panels in titles.items()}
    shown = {title: panels for title, panels in shown.items() if panels}
    figure = Figure(figsize=(14, 3 * len(shown)), layout="constrained")
    halves: Any = figure.subfigures(len(shown), 1, squeeze=False)
    for half, (title, panels) in zip(halves[:, 0], shown.items(), strict=True):
        half.suptitle(title, fontsize="medium")
        for axes, panel in zip(half.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            _draw(axes, rows, panel)
            shade_phases(axes, phases)
    if found := [phase for phase in PHASE_COLORS if phase in phases]:
        patches = [Patch(color=PHASE_COLORS[phase], alpha=0.3, label=phase) for phase in found]
        figure.legend(handles=patches, loc="outside lower center", ncols=len(found), fontsize="small")
    figure._repr_png_ = partial(_png, figure)  # type: ignore[attr-defined]  # else shown only after pyplot's import
    return figure


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=72)
    return file.getvalue()


def shade_phases(axes: Any, phases: Sequence[str | None]) -> None:
    """Shade the background by the phase of each round; rounds without a phase stay white."""
    for number, phase in enumerate(phases):
        if phase is not None:
            axes.axvspan(number - 0.5, number + 0.5, color=PHASE_COLORS[phase], alpha=0.15, linewidth=0)


def _measured(rows: Sequence[Any], panel: Panel) -> list[tuple[int, float]]:
    """The rounds that have the values of a panel, with these."""
    _, column, base, _ = panel
    needed = [column, base] if base else [column]
    measured = [row for row in rows if all(row.get(name) is not None for name in needed)]
    return [(row["round"], row[column] - row[base] if base else row[column]) for row in measured]


def _draw(axes: Any, rows: Sequence[Any], panel: Panel) -> None:
    title, column, _, (color, marker, line) = panel
    axes.set_title(title, fontsize="small")
    axes.set_xlabel("round", fontsize="small")
    axes.grid(alpha=0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlim(rows[0]["round"] - 0.5, rows[-1]["round"] + 0.5)
    axes.plot(*zip(*_measured(rows, panel), strict=True), color=color, marker=marker, linestyle=line, markersize=4)
    low, high = axes.get_ylim()
    sizes = [abs(row[column]) for row in rows if row.get(column) is not None and math.isfinite(row[column])]
    missing = LEAST_SPAN * max(sizes, default=0.0) - (high - low)
    if missing > 0:
        axes.set_ylim(low - missing / 2, high + missing / 2)
