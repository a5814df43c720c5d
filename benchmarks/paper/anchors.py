"""Our curves and those of the authors' own code, on each other: figure and tables."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pages import table
from style import COLORS, DPI, LINES, MARKERS

from paper.figures import describe, grouped, house_style, legend, over_seeds
from paper.results import Histories
from paper.runs import Run

MODES = {"lottery-ticket": "lt-0.2", "one-shot": "os-0.2"}
COLUMNS = (
    ("remaining weights (%)", "remaining_pct", lambda found: 100 * found.density),
    ("accuracy of the last epoch (%)", "acc_last", lambda found: 100 * found.metrics["accuracy"]),
    ("PQ Index (0.5, 1)", "pqi_f64", lambda found: found.metrics["pqi_half_1"]),
)
REMAINING, ACCURACY, INDEX = range(3)
# Differences of two means of two runs each, as often as the table has rounds: this many deviations are still noise.
NOISE = 3.0

Curves = dict[tuple[str, str], list[Any]]


def read_authors(path: Path) -> Curves:
    """By scope and mode, for each of COLUMNS an array of shape (seeds, rounds)."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: (row["scope"], row["mode"], row["seed"], int(row["round"])))
    found: Curves = {}
    for key in dict.fromkeys((row["scope"], row["mode"]) for row in rows):
        own = [row for row in rows if (row["scope"], row["mode"]) == key]
        seeds = len({row["seed"] for row in own})
        found[key] = [np.array([float(row[name]) for row in own]).reshape(seeds, -1) for _, name, _ in COLUMNS]
    return found


def key_of(run: Run) -> tuple[str, str]:
    """The scope and mode that the authors' file has for a run."""
    return run.scope, MODES.get(run.method, f"si-{run.p:g}-{run.q:g}-{run.eta_r:g}-{run.gamma:g}")


def name_of(run: Run) -> str:
    """A run as the tables name it, with what it does as the authors do."""
    return describe(run) + (f", {run.authors} as theirs" if run.authors else "")


def ours(histories: Histories) -> list[Any]:
    """For each of COLUMNS an array of shape (seeds, rounds)."""
    return [over_seeds(histories, value) for _, _, value in COLUMNS]


def compare(mine: Sequence[Any], theirs: Sequence[Any]) -> dict[str, float]:
    """Differences of the means over seeds, ours minus theirs, over all rounds but the dense one."""
    gaps = [(a.mean(0) - b.mean(0))[1:] for a, b in zip(mine, theirs, strict=True)]
    noise = deviation_of_mean_difference(mine[ACCURACY], theirs[ACCURACY])
    largest = int(np.abs(gaps[REMAINING]).argmax())
    return {
        "remaining": float(gaps[REMAINING][largest]),
        "remaining_round": largest + 1,
        "accuracy": float(gaps[ACCURACY].mean()),
        "accuracy_largest": float(gaps[ACCURACY][np.abs(gaps[ACCURACY]).argmax()]),
        "noise": noise,
        "outside": int((np.abs(gaps[ACCURACY]) > NOISE * noise).sum()),
        "index": float(gaps[INDEX].mean()),
    }


def deviation_of_mean_difference(mine: Any, theirs: Any) -> float:
    """Standard deviation that the seeds alone give a difference of two means, with one variance for all rounds."""
    variances = [values[:, 1:].var(0, ddof=1).mean() / len(values) for values in (mine, theirs)]
    return math.sqrt(sum(variances))


def comparison_table(histories: Histories, authors: Curves) -> str:
    """A line a configuration: how far our curves are from the authors'."""
    head = ["configuration", "remaining: largest difference (round)", "accuracy: mean difference", "largest"]
    head += ["deviation by seeds", f"rounds beyond {NOISE:g} deviations", "PQ Index: mean difference"]
    lines = []
    for name, members in grouped(histories, name_of).items():
        found = compare(ours(members), authors[key_of(next(iter(members)))])
        lines.append(
            [
                name,
                f"{found['remaining']:+.2f} ({found['remaining_round']})",
                f"{found['accuracy']:+.2f}",
                f"{found['accuracy_largest']:+.2f}",
                f"{found['noise']:.2f}",
                f"{found['outside']} of 10",
                f"{found['index']:+.4f}",
            ]
        )
    return table(head, lines)


def draw_comparison(histories: Histories, authors: Curves, path: Path) -> None:
    """A row per configuration: remaining weights, accuracy and PQ Index, each seed a line."""
    groups = grouped(histories)
    with house_style(10.5) as figure:
        axes: Any = figure.subplots(len(groups), len(COLUMNS), sharex=True)
        for row, (name, members) in enumerate(groups.items()):
            curves = (("torch_sap", ours(members)), ("the authors' code", authors[key_of(next(iter(members)))]))
            for column in range(len(COLUMNS)):
                for number, (label, values) in enumerate(curves):
                    for seed, line in enumerate(values[column]):
                        style = {"color": COLORS[2 * number], "linestyle": LINES[seed % 2], "marker": MARKERS[number]}
                        axes[row, column].plot(line, markersize=3, label=None if seed else label, **style)
                axes[row, column].grid(alpha=0.3)
            axes[row, 0].set_ylabel(name.replace(" (", "\n("))
        for column, title in enumerate(("remaining (%)", "test accuracy (%)", "PQ Index (0.5, 1)")):
            axes[0, column].set_title(title, fontsize="medium")
            axes[-1, column].set_xlabel("round")
        legend(figure, axes[0, 0])
        figure.savefig(path, dpi=DPI)
