"""Figures of an iterative pruning, from the rows of its history."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, Any]]


PHASE_COLOURS = {"regularisation": "tab:green", "compression": "tab:orange", "collapse": "tab:red"}


def plot_rounds(
    rows: Rows, path: str | os.PathLike[str], *, metric: str | None = None, phases: Sequence[str | None] = ()
) -> None:
    """Draw rounds as in the paper's Figure 2; arguments and errors are those of ``History.plot``."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("History.plot needs matplotlib: pip install 'torch_sap[plot]'") from error
    if not rows:
        raise ValueError("history must have a round to be drawn, but it is empty")
    if phases and len(phases) != len(rows):
        raise ValueError(f"phases must have a label for each of the {len(rows)} rounds, got {len(phases)}")
    if unknown := [phase for phase in phases if phase is not None and phase not in PHASE_COLOURS]:
        raise ValueError(f"phases must hold {', '.join(PHASE_COLOURS)} or None, got {unknown[0]!r}")
    metric = _choose(rows, metric)
    figure = Figure(figsize=(14, 6), layout="constrained")
    halves: Any = figure.subfigures(2, 1)
    above, below = halves
    above.suptitle("(a) retrained models", fontsize="medium")
    below.suptitle("(b) pruned models, before rewinding", fontsize="medium")
    label = metric or "metric"
    retrained = [
        (label, metric or ""),
        ("remaining weights (%)", "remaining_pct"),
        ("PQ Index", "pqi"),
        ("Gini index", "gini"),
    ]
    for axes, (title, column) in zip(above.subplots(1, 4), retrained, strict=True):
        _draw(axes, rows, title, [row.get(column) for row in rows])
    pruned = [(label, f"pruned_{metric}"), ("PQ Index", "pruned_pqi")]
    columns: list[tuple[str, list[Any]]] = []
    for (title, column), (_, base) in zip(pruned, (retrained[0], retrained[2]), strict=True):
        columns.append((title, [row.get(column) for row in rows]))
        columns.append((f"{title}, pruned - retrained", [_difference(row.get(column), row.get(base)) for row in rows]))
    for axes, (title, values) in zip(below.subplots(1, 4), columns, strict=True):
        _draw(axes, rows, title, values)
    for half in halves:
        for axes in half.axes:
            shade_phases(axes, phases)
    _legend(figure, phases)
    figure.savefig(path, dpi=120)


def shade_phases(axes: Any, phases: Sequence[str | None]) -> None:
    """Colour the background of axes over rounds by the label of each round; no label, no colour."""
    for number, phase in enumerate(phases):
        if phase is not None:
            axes.axvspan(number - 0.5, number + 0.5, color=PHASE_COLOURS[phase], alpha=0.12, linewidth=0)


def _legend(figure: Any, phases: Sequence[str | None]) -> None:
    from matplotlib.patches import Patch

    seen = [phase for phase in PHASE_COLOURS if phase in phases]
    if seen:
        patches = [Patch(color=PHASE_COLOURS[phase], alpha=0.3, label=phase) for phase in seen]
        figure.legend(handles=patches, loc="outside lower center", ncols=len(seen), fontsize="small")


def _choose(rows: Rows, metric: str | None) -> str | None:
    """The metric to draw: the one asked for, accuracy, or the first there is."""
    fixed = {"round", "scope", "remaining", "total", "remaining_pct", "pruned", "pqi", "gini", "seconds"}
    known = [key for key in rows[0] if key not in fixed and not key.startswith(("pruned_", "pqi_"))]
    if metric is None:
        return "accuracy" if "accuracy" in known else next(iter(known), None)
    if metric not in known:
        raise ValueError(f"metric must be one of {known}, got metric={metric!r}")
    return metric


def _difference(value: Any, base: Any) -> Any:
    return None if value is None or base is None else value - base


def _draw(axes: Any, rows: Rows, title: str, values: Sequence[Any]) -> None:
    points = [(row["round"], value) for row, value in zip(rows, values, strict=True) if value is not None]
    axes.set_title(title, fontsize="small")
    axes.set_xlabel("round", fontsize="small")
    axes.grid(alpha=0.3)
    if points:
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3)
    else:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="gray")
