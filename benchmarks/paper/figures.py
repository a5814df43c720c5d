"""The paper's figures from saved histories: means over seeds, with a band of one standard deviation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from paper.results import Histories
from paper.runs import Run
from torch_sap.records.phases import label_phases
from torch_sap.records.plots import PHASE_COLORS, shade_phases
from torch_sap.records.round import Round

Groups = Mapping[str, Histories]
Value = Callable[[Round], float]
Column = tuple[str, Value]

LABELS = {"lottery-ticket": "Lottery Ticket", "one-shot": "One Shot", "random": "random", "plain": "plain"}
CONTROLS = {"sap": "SAP", "mean-share": "fixed at the mean share of SAP", "replay": "shares of another seed of SAP"}
REWINDS = {"init": "", "late": ", late rewinding", "none": ", no rewinding"}

RETRAINED: tuple[Column, ...] = (
    ("accuracy (%)", lambda found: 100 * found.metrics["accuracy"]),
    ("remaining weights (%)", lambda found: 100 * found.density),
    ("PQ Index (0.5, 1)", lambda found: found.metrics["pqi_half_1"]),
    ("Gini index", lambda found: _whole(found.retrained.gini)),
)
PRUNED: tuple[Column, ...] = (
    ("accuracy (%)", lambda found: 100 * _pruned(found, "accuracy")),
    (
        "accuracy, pruned - retrained (points)",
        lambda found: 100 * (_pruned(found, "accuracy") - found.metrics["accuracy"]),
    ),
    ("PQ Index (0.5, 1)", lambda found: _pruned(found, "pqi_half_1")),
    (
        "PQ Index, pruned - retrained",
        lambda found: _pruned(found, "pqi_half_1") - found.metrics["pqi_half_1"],
    ),
)


def describe(run: Run) -> str:
    """A method and its settings as a legend shows them; the scope only of SAP and its controls."""
    if run.method == "sap" and run.rounds == 1 and run.rewind == "none":
        return "EMP"
    if not run.follows_sap:
        return LABELS[run.method] + REWINDS[run.rewind]
    changes = [f"p={run.p:g}, q={run.q:g}"]
    changes += [f"eta_r={run.eta_r:g}"] if run.eta_r else []
    changes += [f"gamma={run.gamma:g}"] if run.gamma != 1 else []
    return f"{CONTROLS[run.method]} {run.scope} ({', '.join(changes)}){REWINDS[run.rewind]}"


def grouped(histories: Histories, describe: Callable[[Run], str] = describe) -> dict[str, Histories]:
    """Histories that differ only by their seeds under one description."""
    groups: dict[str, Histories] = {}
    for run, history in histories.items():
        groups.setdefault(describe(run), {})[run] = history
    for name, members in groups.items():
        if len({replace(run, seed=0, source=None) for run in members}) > 1:
            raise ValueError(f"runs must differ by their seeds only to be averaged, got {name}: {list(members)}")
    return groups


def over_seeds(histories: Histories, value: Value) -> Any:
    """Values, shape (seeds, rounds); rounds that not all seeds have are left out."""
    rows = [[value(found) for found in history] for history in histories.values()]
    shortest = min(map(len, rows))
    return np.array([row[:shortest] for row in rows])


def figure2(groups: Groups, path: Path) -> None:
    """(a) retrained and (b) pruned models against rounds, one curve a method."""
    figure = Figure(figsize=(15, 7), layout="constrained")
    halves: Any = figure.subfigures(2, 1)
    titles = ("(a) retrained models", "(b) pruned models, before rewinding")
    for half, title, columns in zip(halves, titles, (RETRAINED, PRUNED), strict=True):
        half.suptitle(title, fontsize="medium")
        for axes, (name, value) in zip(half.subplots(1, 4), columns, strict=True):
            against_rounds(axes, groups, name, value)
    legend(figure, halves[0].axes[0])
    figure.savefig(path, dpi=90)


def draw_phases(groups: Groups, path: Path) -> None:
    """Accuracy and PQ Index of each method against rounds, with the phases of the hypothesis as bands."""
    figure = Figure(figsize=(15, 6), layout="constrained")
    axes: Any = figure.subplots(2, len(groups), sharex=True)
    for column, (name, histories) in enumerate(groups.items()):
        index: Column = ("PQ Index that the method records", lambda found: found.pqi)
        for row, (title, value) in enumerate((RETRAINED[0], index)):
            against_rounds(axes[row, column], {name: histories}, title, value)
            shade_phases(axes[row, column], phases(histories))
        axes[0, column].set_title(f"{name}\n{RETRAINED[0][0]}", fontsize="small")
    figure.legend(
        handles=[Patch(color=color, alpha=0.3, label=name) for name, color in PHASE_COLORS.items()],
        loc="outside lower center",
        ncols=len(PHASE_COLORS),
        fontsize="small",
    )
    figure.savefig(path, dpi=90)


def figure3(groups: Groups, path: Path) -> None:
    """Accuracy against remaining weights; remaining weights and PQ Index of the first, a middle and the last tensor."""
    figure = Figure(figsize=(15, 7), layout="constrained")
    axes: Any = figure.subplots(2, 4)
    for row in (0, 1):
        against_remaining(axes[row, 0], groups)
    zoom(axes[1, 0])
    for number, place in enumerate(("first", "middle", "last"), 1):
        against_rounds(axes[0, number], groups, f"remaining weights of the {place} tensor (%)", remaining_of(place))
        against_rounds(axes[1, number], groups, f"PQ Index of the {place} tensor", index_of(place))
    legend(figure, axes[0, 0])
    figure.savefig(path, dpi=90)


def ablation(parts: Sequence[Groups], path: Path) -> None:
    """A row for each part: accuracy, remaining weights and PQ Index against rounds, accuracy against remaining."""
    figure = Figure(figsize=(15, 3.8 * len(parts)), layout="constrained")
    rows: Any = figure.subplots(len(parts), 4, squeeze=False)
    for row, groups in zip(rows, parts, strict=True):
        for axes, (name, value) in zip(row, RETRAINED[:3], strict=False):
            against_rounds(axes, groups, name, value)
        against_remaining(row[3], groups)
        row[3].legend(fontsize="x-small")
    figure.savefig(path, dpi=90)


def against_rounds(axes: Any, groups: Groups, title: str, value: Value) -> None:
    """Draw one value against rounds, a curve a group."""
    draw_curves(axes, {name: over_seeds(histories, value) for name, histories in groups.items()}, title)


def draw_curves(axes: Any, curves: Mapping[str, Any], title: str) -> None:
    """Draw values of shape (seeds, rounds) against rounds: their mean, and a band of one standard deviation."""
    for number, (name, values) in enumerate(curves.items()):
        mean, deviation = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])
        rounds = np.arange(len(mean))
        axes.plot(rounds, mean, marker=".", markersize=3, linewidth=1, label=name, color=f"C{number}")
        axes.fill_between(rounds, mean - deviation, mean + deviation, alpha=0.2, linewidth=0, color=f"C{number}")
    axes.set_title(title, fontsize="small")
    axes.set_xlabel("round", fontsize="small")
    axes.grid(alpha=0.3)


def against_remaining(axes: Any, groups: Groups) -> None:
    """Draw accuracy against remaining weights on a log axis, dense on the left."""
    for number, (name, histories) in enumerate(groups.items()):
        densities = over_seeds(histories, RETRAINED[1][1]).mean(0)
        values = over_seeds(histories, RETRAINED[0][1])
        deviation = values.std(0, ddof=1) if len(values) > 1 else 0
        axes.plot(densities, values.mean(0), marker=".", markersize=3, linewidth=1, label=name, color=f"C{number}")
        lower, upper = values.mean(0) - deviation, values.mean(0) + deviation
        axes.fill_between(densities, lower, upper, alpha=0.2, linewidth=0, color=f"C{number}")
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_title("accuracy (%) against remaining weights (%)", fontsize="small")
    axes.grid(alpha=0.3)


def zoom(axes: Any, sparsest: float = 10.0) -> None:
    """Show only what lies between 100 and `sparsest` percent of remaining weights."""
    accuracies = [
        accuracy
        for line in axes.get_lines()
        for share, accuracy in zip(line.get_xdata(), line.get_ydata(), strict=True)
        if share >= sparsest
    ]
    margin = (max(accuracies) - min(accuracies)) / 10
    axes.set_xlim(100, sparsest)
    axes.set_ylim(min(accuracies) - margin, max(accuracies) + margin)


def legend(figure: Figure, axes: Any) -> None:
    """One legend for the whole figure, below it."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")


def phases(histories: Histories) -> list[Any]:
    """Phases of the hypothesis by the means over seeds."""
    accuracy = over_seeds(histories, lambda found: found.metrics["accuracy"]).mean(0)
    return list(label_phases(over_seeds(histories, lambda found: found.pqi).mean(0), accuracy))


def _pruned(found: Round, metric: str) -> float:
    return found.pruned_metrics.get(metric, np.nan)


def _whole(measure: Mapping[str, Mapping[str, Any]] | None) -> float:
    return np.nan if measure is None else float(measure["global"]["global"][0])


def _position(count: int, place: str) -> int:
    return {"first": 0, "middle": count // 2, "last": count - 1}[place]


def remaining_of(place: str) -> Value:
    """Remaining weights of the "first", "middle" or "last" tensor, in percent."""

    def value(found: Round) -> float:
        tensor = found.tensors[_position(len(found.tensors), place)]
        return 100 * tensor.remaining / tensor.total

    return value


def index_of(place: str) -> Value:
    """PQ Index of the "first", "middle" or "last" tensor, with the p and q that the run prunes by."""

    def value(found: Round) -> float:
        tensors = found.retrained.pqi["layer"]
        return float(tensors[found.tensors[_position(len(found.tensors), place)].name][0])

    return value
