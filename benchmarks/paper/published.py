"""Our curves on CIFAR-10 beside those of the paper's Figure 2 (a), which were read off its pixels."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from numpy.typing import NDArray
from pages import table
from style import COLORS, DPI, LINES, MARKERS, STYLE, WIDTH

from paper.figures import describe, grouped, over_seeds
from paper.results import Histories

# Ours: the name in the paper's file.
METHODS = {
    "SAP global (p=0.5, q=1)": "SAP(0.5,1)",
    "SAP global (p=1, q=2)": "SAP(1,2)",
    "Lottery Ticket": "LotteryTicket(0.2)",
    "One Shot": "OneShot(0.2)",
    "random": None,
}
ROUNDS = (1, 2, 3, 4, 5, 8)

# For each method three arrays: rounds, remaining weights and accuracy in percent; NaN where it could not be read.
Curves = Mapping[str, NDArray[np.float64]]


def read_published(path: Path) -> dict[str, NDArray[np.float64]]:
    """The curves of the CNN in the global scope, by our names for the methods."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == "cnn"]
    found = {}
    for ours, theirs in METHODS.items():
        points = [
            [float(row[name] or "nan") for name in ("round", "remaining_pct", "accuracy")]
            for row in rows
            if row["method"] == theirs
        ]
        if points:
            found[ours] = np.array(points).T
    return found


def ours(histories: Histories) -> dict[str, NDArray[np.float64]]:
    """The same of our runs, means over seeds."""
    groups = grouped({run: history for run, history in histories.items() if describe(run) in METHODS})
    found = {}
    for name in (name for name in METHODS if name in groups):
        density, accuracy = (
            100 * over_seeds(groups[name], value).mean(0)
            for value in (lambda found: found.density, lambda found: found.metrics["accuracy"])
        )
        found[name] = np.array([np.arange(len(density)), density, accuracy])
    return found


def published_table(histories: Histories, published: Curves) -> str:
    """How much SAP takes, here and there: remaining weights after some rounds."""
    head = ["method", "where", "dense accuracy", *(f"remaining after {number}" for number in ROUNDS)]
    lines = []
    for name, mine in ours(histories).items():
        if name.startswith("SAP"):
            for where, found in (("here", mine), ("published", published[name])):
                shares = [_percent(_at(found, number)) for number in ROUNDS]
                lines.append([name, where, f"{found[2, 0]:.1f}", *shares])
    return table(head, lines)


def draw_published(histories: Histories, published: Curves, path: Path) -> None:
    """Remaining weights against rounds, accuracy against rounds and against remaining weights; ours on the left."""
    with matplotlib.style.context(STYLE, after_reset=True):
        figure = Figure(figsize=(WIDTH, 9), layout="constrained")
        axes: Any = figure.subplots(3, 2, sharey="row")
        for column, (whose, curves) in enumerate((("here", ours(histories)), ("published", published))):
            for number, name in enumerate(METHODS):
                if name not in curves:
                    continue
                rounds, remaining, accuracy = curves[name]
                style = {"color": COLORS[number], "linestyle": LINES[number], "marker": MARKERS[number]}
                for row, (x, y) in enumerate(((rounds, remaining), (rounds, accuracy), (remaining, accuracy))):
                    known = ~np.isnan(x) & ~np.isnan(y)
                    axes[row, column].plot(x[known], y[known], markersize=3, label=name, **style)
            axes[0, column].set_title(whose)
        _label(axes)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        figure.savefig(path, dpi=DPI)


def _label(axes: Any) -> None:
    for ax in axes[:2].flat:
        ax.set_xlabel("round")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    for ax in axes[0]:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    for ax in axes[2]:
        ax.set_xscale("log")
        ax.invert_xaxis()
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        ax.set_xlabel("remaining weights")
    for ax in axes.flat:
        ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel("remaining weights")
    for ax in axes[1:, 0]:
        ax.set_ylabel("test accuracy (%)")


def _at(curve: NDArray[np.float64], number: int) -> float:
    found = curve[1][curve[0] == number]
    return float(found[0]) if len(found) else math.nan


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f} %"
