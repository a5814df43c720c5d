"""The paper's figures from saved histories: means over seeds, with a band of one standard deviation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from style import DPI, NARROW, STYLE, look, percent_log

from paper.results import Histories
from paper.runs import Run
from torch_sap.records.phases import label_phases
from torch_sap.records.plots import PHASE_COLORS
from torch_sap.records.round import Round

Groups = Mapping[str, Histories]
Value = Callable[[Round], float]
Column = tuple[str, Value]

LABELS = {"lottery-ticket": "Lottery Ticket", "one-shot": "One Shot", "random": "random", "plain": "plain"}
CONTROLS = {"sap": "SAP", "mean-share": "fixed at the mean share of SAP", "replay": "shares of another seed of SAP"}
REWINDS = {"init": "", "late": ", late rewinding", "none": ", no rewinding"}
# The same method looks the same in all figures; what is in none together may share a look.
LOOKS = {
    "SAP global (p=0.5, q=1)": 0,
    "SAP global (p=1, q=2)": 1,
    "SAP layer (p=0.5, q=1)": 1,
    "Lottery Ticket": 2,
    "One Shot": 3,
    "SAP neuron (p=0.5, q=1)": 4,
    "random": 4,
}
HATCHES = {"regularization": "", "compression": "//", "collapse": "xx"}
COLLAPSED = 12.0  # points below the best, where a panel of accuracies may end
SPARSEST = 0.1  # percent; the few rounds below are collapsed networks

RETRAINED: tuple[Column, ...] = (
    ("test accuracy (%)", lambda found: 100 * found.metrics["accuracy"]),
    ("remaining weights", lambda found: 100 * found.density),
    ("PQ Index (0.5, 1)", lambda found: found.metrics["pqi_half_1"]),
    ("Gini index", lambda found: _whole(found.retrained.gini)),
)
PRUNED: tuple[Column, ...] = (
    ("test accuracy (%)", lambda found: 100 * _pruned(found, "accuracy")),
    (
        "accuracy, pruned\n- retrained (points)",
        lambda found: 100 * (_pruned(found, "accuracy") - found.metrics["accuracy"]),
    ),
    ("PQ Index (0.5, 1)", lambda found: _pruned(found, "pqi_half_1")),
    (
        "PQ Index, pruned\n- retrained",
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
    """Retrained models on the left, pruned ones on the right, against rounds, one curve per method."""
    with house_style(9.5) as figure:
        axes: Any = figure.subplots(4, 2, sharex=True)
        for column, columns in enumerate((RETRAINED, PRUNED)):
            for row, (name, value) in enumerate(columns):
                against_rounds(axes[row, column], groups, name, value, log=name == RETRAINED[1][0])
        axes[0, 0].set_title("retrained models")
        axes[0, 1].set_title("pruned, before rewinding")
        label_rounds(axes[-1])
        legend(figure, axes[0, 0])
        figure.savefig(path, dpi=DPI)


def draw_phases(groups: Groups, path: Path) -> None:
    """Accuracy and PQ Index of each method against rounds, with the phases of the hypothesis as bands."""
    index: Column = ("PQ Index of its p, q", lambda found: found.pqi)
    with house_style(8.5) as figure:
        axes: Any = figure.subplots(len(groups), 2, sharex=True)
        for row, (name, histories) in enumerate(groups.items()):
            for column, (title, value) in enumerate((RETRAINED[0], index)):
                against_rounds(axes[row, column], {name: histories}, title, value)
                shade(axes[row, column], phases(histories))
            axes[row, 0].set_title(name, loc="left")
        label_rounds(axes[-1])
        patches = [
            Patch(facecolor=color, alpha=0.3, hatch=HATCHES[name], edgecolor="black", linewidth=0, label=name)
            for name, color in PHASE_COLORS.items()
        ]
        figure.legend(handles=patches, loc="outside lower center", ncols=len(patches))
        figure.savefig(path, dpi=DPI)


def shade(axes: Any, labels: Sequence[Any]) -> None:
    """Shade rounds by their phases, in a color and a hatch of each."""
    for number, phase in enumerate(labels):
        if phase is not None:
            band = {"facecolor": PHASE_COLORS[phase], "hatch": HATCHES[phase], "edgecolor": "black"}
            axes.axvspan(number - 0.5, number + 0.5, alpha=0.2, linewidth=0, **band)


def figure3(groups: Groups, path: Path) -> None:
    """Accuracy against remaining weights; remaining weights and PQ Index of the first, a middle and the last tensor."""
    with house_style(9.5) as figure:
        axes: Any = figure.subplots(4, 2)
        for whole_or_detail in axes[0]:
            against_remaining(whole_or_detail, groups)
        zoom(axes[0, 1])
        for row, place in enumerate(("first", "middle", "last"), 1):
            against_rounds(axes[row, 0], groups, f"{place} tensor,\nremaining", remaining_of(place), log=True)
            against_rounds(axes[row, 1], groups, f"{place} tensor,\nPQ Index", index_of(place))
        label_rounds(axes[-1])
        legend(figure, axes[0, 0])
        figure.savefig(path, dpi=DPI)


def ablation(parts: Sequence[Groups], path: Path) -> None:
    """A column per part: accuracy, remaining weights and PQ Index against rounds, accuracy against remaining."""
    with house_style(9.5) as figure:
        axes: Any = figure.subplots(5, len(parts), height_ratios=(1, 1, 1, 1, 0.4))
        for column, groups in enumerate(parts):
            for row, (name, value) in enumerate(RETRAINED[:3]):
                against_rounds(axes[row, column], groups, name if column == 0 else "", value, log=row == 1)
            against_remaining(axes[3, column], groups)
            lowest, highest = axes[3, column].get_ylim()
            axes[3, column].set_ylim(max(lowest, highest - COLLAPSED), highest)
            label_rounds(axes[2])
            handles, labels = axes[0, column].get_legend_handles_labels()
            axes[4, column].legend(handles, labels, loc="center", fontsize="small", frameon=False)
            axes[4, column].axis("off")
            axes[3, column].set_ylabel("" if column else "test accuracy (%)")
        figure.savefig(path, dpi=DPI)


@contextmanager
def house_style(height: float) -> Iterator[Figure]:
    """Yield a figure in the style of the pages' pictures, to be drawn and saved within."""
    with matplotlib.style.context(STYLE, after_reset=True):
        yield Figure(figsize=(NARROW, height), layout="constrained")


def label_rounds(axes: Iterable[Any]) -> None:
    """Say that the horizontal axis has rounds."""
    for ax in axes:
        ax.set_xlabel("round")


def against_rounds(axes: Any, groups: Groups, title: str, value: Value, *, log: bool = False) -> None:
    """Draw one value against rounds, a curve per group; a logarithmic axis is of percentages."""
    curves = {name: over_seeds(histories, value) for name, histories in groups.items()}
    draw_curves(axes, curves, title)
    if log:
        axes.set_yscale("log")
        percent_log(axes.yaxis, [values.mean(0).min() for values in curves.values()] + [100.0])


def draw_curves(axes: Any, curves: Mapping[str, Any], title: str) -> None:
    """Draw values of shape (seeds, rounds) against rounds: their mean, and a band of one standard deviation."""
    for (name, values), number in zip(curves.items(), looks(curves), strict=True):
        draw_line(axes, np.arange(values.shape[1]), values, name, number)
    axes.set_ylabel(title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def looks(names: Iterable[str]) -> list[int]:
    """The looks of series that are shown together: those of `LOOKS`, or one after the other."""
    known = [LOOKS.get(name, -1) for name in names]
    return known if len({*known} - {-1}) == len(known) else list(range(len(known)))


def draw_line(axes: Any, x: Any, values: Any, name: str, number: int, *, band: bool = True) -> None:
    """Draw values of shape (seeds, rounds) over x: their mean, and a band of one standard deviation."""
    mean, style = values.mean(0), look(number)
    axes.plot(x, mean, label=name, **style)
    if len(values) > 1 and band:
        deviation = values.std(0, ddof=1)
        axes.fill_between(x, mean - deviation, mean + deviation, alpha=0.2, linewidth=0, color=style["color"])


def against_remaining(axes: Any, groups: Groups, banded: Sequence[str] | None = None) -> None:
    """Draw accuracy against remaining weights on a log axis, dense on the left; bands of these methods, or of all."""
    for (name, histories), number in zip(groups.items(), looks(groups), strict=True):
        densities, values = (over_seeds(histories, RETRAINED[column][1]) for column in (1, 0))
        draw_line(axes, densities.mean(0), values, name, number, band=banded is None or name in banded)
    lowest = min(min(line.get_xdata()) for line in axes.get_lines())
    axes.set_xscale("log")
    axes.invert_xaxis()
    percent_log(axes.xaxis, [max(lowest, SPARSEST), 100.0])
    axes.set_xlim(left=115, right=max(lowest, SPARSEST) / 1.15)
    axes.set_xlabel("remaining weights")
    axes.set_ylabel("test accuracy (%)")
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
    axes.set_xlim(105, sparsest / 1.05)
    percent_log(axes.xaxis, [sparsest, 100.0])
    axes.set_ylim(min(accuracies) - margin, max(accuracies) + margin)


def legend(figure: Figure, axes: Any) -> None:
    """One legend for the whole figure, below it."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)


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
