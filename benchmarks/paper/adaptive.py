"""How adaptive SAP is: the shares that its rounds take, and what knows them without measuring."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, PercentFormatter
from numpy.typing import NDArray
from pages import table
from style import COLORS, DPI, LINES, MARKERS, STYLE, WIDTH

from paper.figures import CONTROLS, describe, grouped, over_seeds
from paper.results import Histories, curve, mean_and_std
from paper.runs import NORMS, Run
from paper.tables import percent
from torch_sap.decide.bounds import Hyperparameters
from torch_sap.records.round import Round

SHOWN_EPOCHS = (1, 2, 4, 8, 12)
SIZES = (0.5, 0.2)
SHOWN_PRUNINGS = (0, 1, 3, 7, 30)
TICKS = (1.0, 0.5, 0.2, 0.1, 0.05)


def named(run: Run) -> str:
    """A method as the tables of this module name it: with the ratio of the lottery ticket."""
    ratio = f" {100 * run.ratio:g} %" if run.method == "lottery-ticket" else ""
    return describe(run).replace("Lottery Ticket", f"Lottery Ticket{ratio}")


def share(found: Round) -> float:
    """Share of the remaining weights that a round prunes."""
    return found.pruned_count / found.remaining


def share_table(histories: Histories) -> str:
    """The share that each round of SAP takes, of all weights and of single tensors."""
    sap = {run: history for run, history in histories.items() if run.method == "sap" and run.rounds > 1}
    sap = {run: history for run, history in sap.items() if run.rewind == "init"}
    prunings = max((run.rounds for run in sap), default=0)
    head = ["method", "seeds", *(f"{number}" for number in range(1, prunings + 1))]
    head += ["largest deviation over seeds", "tensors: first round", "last round"]
    lines = []
    for name, members in grouped(sap).items():
        shares = over_seeds(members, share)[:, :-1]
        line = [name, f"{len(shares)}", *(f"{100 * mean:.0f} %" for mean in shares.mean(0))]
        line += ["-"] * (prunings - shares.shape[1])
        deviation = shares.std(0, ddof=1).max() if len(shares) > 1 else math.nan
        spans = [_span(by_tensor(members, number)) for number in (0, shares.shape[1] - 1)]
        lines.append([*line, "-" if math.isnan(deviation) else f"{100 * deviation:.1f} points", *spans])
    return table(head, lines)


def by_tensor(histories: Histories, number: int) -> NDArray[np.float64]:
    """Share that a round takes of each tensor, mean over seeds."""
    rows = []
    for history in histories.values():
        found = history[number]
        pairs = zip(found.tensors, found.tensors_after, strict=True)
        rows.append([1 - after.remaining / before.remaining for before, after in pairs])
    return np.array(rows).mean(0)


def remaining_table(histories: Histories) -> str:
    """Remaining weights and accuracy in percent after some prunings, in each network."""
    head = ["SAP", "network, data, epochs", *(f"{number}" for number in SHOWN_PRUNINGS)]
    lines = []
    for members in grouped(histories, lambda run: f"{describe(run)} {run.model} {run.rounds}").values():
        run = next(iter(members))
        density = 100 * over_seeds(members, lambda found: found.density).mean(0)
        accuracy = 100 * over_seeds(members, lambda found: found.metrics["accuracy"]).mean(0)
        at = [f"{density[n]:.3g}, {accuracy[n]:.1f}" if n < len(density) else "-" for n in SHOWN_PRUNINGS]
        named = describe(run).removeprefix("SAP "), f"{run.model}, {run.data}, {run.epochs}"
        lines.append([*named, f"{accuracy[0]:.1f}", *at[1:]])
    return table(head, lines)


def control_table(histories: Histories) -> str:
    """SAP and its controls at equal sizes, and at the end, seed by seed."""
    head = ["method", "seeds", *(f"epochs to {100 * size:g} %" for size in SIZES)]
    head += [*(f"accuracy at {100 * size:g} %" for size in SIZES), "at the end", "which is at", "at the end, minus SAP"]
    lines = []
    for name, members in grouped(histories).items():
        curves = [curve(run, history) for run, history in members.items()]
        epochs = [mean_and_std(one.epochs_to(size) for one in curves)[0] for size in SIZES]
        line = [name, f"{len(curves)}", *("-" if math.isinf(mean) else f"{mean:.0f}" for mean in epochs)]
        line += [percent([one.accuracy_at(size) for one in curves]) for size in SIZES]
        line += [percent([one.points[-1][1] for one in curves])]
        line += [f"{100 * mean_and_std(one.points[-1][0] for one in curves)[0]:.1f} %"]
        lines.append([*line, _difference(members, histories)])
    return table(head, lines)


def _difference(members: Histories, histories: Histories) -> str:
    """Accuracy at the end minus that of SAP in the same seed, where both are at their end."""
    sap = {(run.scope, run.p, run.q, run.seed): history for run, history in histories.items() if run.method == "sap"}
    ends = {}
    for run, history in members.items():
        beside = sap.get((run.scope, run.p, run.q, run.seed), ())
        if run.method != "sap" and len(history) == len(beside) == run.rounds + 1:
            ends[run] = history[-1].metrics["accuracy"], beside[-1].metrics["accuracy"]
    if not ends:
        return "0" if all(run.method == "sap" for run in members) else "-"
    mean, deviation = mean_and_std(100 * (one - other) for one, other in ends.values())
    return f"{mean:+.2f}" if math.isnan(deviation) else f"{mean:+.2f} ± {deviation:.2f}"


def tuned_table(histories: Histories, shares: tuple[float, ...] = (50.0, 20.0, 10.0)) -> str:
    """Accuracy at sizes, and the epochs until then, of lottery tickets of several ratios and of other rewinding."""
    head = ["method", "seeds", *(f"{size:g} %" for size in shares)]
    head += [*(f"epochs to {size:g} %" for size in shares[1:]), "at the end", "which is at"]
    lines = []
    for name, members in grouped(histories, named).items():
        curves = [curve(run, history) for run, history in members.items()]
        line = [name, f"{len(curves)}"]
        line += [percent([one.accuracy_at(size / 100) for one in curves]) for size in shares]
        epochs = [mean_and_std(one.epochs_to(size / 100) for one in curves)[0] for size in shares[1:]]
        line += ["-" if math.isinf(mean) else f"{mean:.0f}" for mean in epochs]
        line += [percent([one.points[-1][1] for one in curves])]
        lines.append([*line, f"{100 * mean_and_std(one.points[-1][0] for one in curves)[0]:.2f} %"])
    return table(head, lines)


def dense_table(histories: Histories) -> str:
    """What SAP would prune of a dense network after some epochs: of all weights, and of single tensors."""
    head = ["model", "weight decay", "p, q", "PQ Index after 1", f"after {SHOWN_EPOCHS[-1]}"]
    head += [f"share after {epoch}" for epoch in SHOWN_EPOCHS]
    lines = []
    for members in grouped(histories, lambda run: f"{run.name.split('-')[0]} {run.data} {run.weight_decay}").values():
        run = next(iter(members))
        metrics = [history[0].metrics for history in members.values()]
        for p, q in NORMS:
            line = [_network(run), f"{run.weight_decay:g}", f"{p:g}, {q:g}"]
            index = [_indices(metrics, epoch, p, q) for epoch in SHOWN_EPOCHS]
            line += [f"{found['global']:.3f}" for found in (index[0], index[-1])]
            for found in index:
                shares = {name: float(_share(value, p, q)) for name, value in found.items()}
                tensors = np.array([value for name, value in shares.items() if name != "global"])
                line.append(f"{100 * shares['global']:.0f} % ({_span(tensors)})")
            lines.append(line)
    return table(head, lines)


def first_table(histories: Histories, published: Mapping[str, NDArray[np.float64]]) -> str:
    """What the first round takes of each network, by how long it was trained, and what it took in the paper."""
    head = ["network", "epochs", "accuracy"]
    head += [f"{of} (p={p:g}, q={q:g})" for p, q in NORMS for of in ("all weights", "its tensors")]
    lines = []
    for name, epochs in dict.fromkeys((_network(run), run.epochs) for run in histories):
        first = [(run, found[0]) for run, found in histories.items() if (_network(run), run.epochs) == (name, epochs)]
        line = [name, f"{epochs}"]
        line.append(percent({run.seed: found.metrics["accuracy"] for run, found in first}.values()))
        for p, q in NORMS:
            pqi = [found.retrained.pqi for run, found in first if (run.p, run.q) == (p, q)]
            whole = _share(np.mean([index["global"]["global"][0] for index in pqi]), p, q)
            tensors = _share(np.mean([[index[0] for index in found["layer"].values()] for found in pqi], 0), p, q)
            line += [f"{100 * whole:.0f} %", _span(tensors)]
        lines.append(line)
    curves = [published[f"SAP global (p={p:g}, q={q:g})"] for p, q in NORMS]
    taken = [text for _, remaining, _ in curves for text in (f"{100 - remaining[1]:.0f} %", "-")]
    lines.append(["cnn64, cifar10, as published", "200", f"{curves[0][2, 0]:.1f}", *taken])
    return table(head, lines)


def _network(run: Run) -> str:
    images = "" if run.images is None else f", {run.images:,} images"
    return f"{run.model}{run.width or ''}, {run.data}{images}"


def _share(index: Any, p: float, q: float) -> Any:
    """Share that SAP prunes of groups with these PQ Indices."""
    return 1 - Hyperparameters(p, q).retain(np.asarray(index), np.array(1))


def _indices(metrics: list[Mapping[str, float]], epoch: int, p: float, q: float) -> dict[str, float]:
    """PQ Index by group after an epoch, mean over seeds."""
    start = f"epoch {epoch} ({p:g}, {q:g}) "
    names = [name.removeprefix(start) for name in metrics[0] if name.startswith(start)]
    return {name: float(np.mean([found[start + name] for found in metrics])) for name in names}


def draw_adaptive(parts: Mapping[str, Histories], path: Path) -> None:
    """A column per part: the share of each round, accuracy against remaining weights; SAP and its controls."""
    with matplotlib.style.context(STYLE, after_reset=True):
        figure = Figure(figsize=(WIDTH, 6.4), layout="constrained")
        axes: Any = figure.subplots(2, len(parts), squeeze=False)
        for column, (title, histories) in enumerate(parts.items()):
            for number, (name, members) in enumerate(grouped(histories).items()):
                label = next(label for label in reversed(CONTROLS.values()) if name.startswith(label))
                style = {"color": COLORS[number], "linestyle": LINES[number], "marker": MARKERS[number]}
                shares, density, accuracy = (
                    over_seeds(members, value)
                    for value in (share, lambda found: found.density, lambda found: found.metrics["accuracy"])
                )
                rounds = np.arange(1, shares.shape[1])
                axes[0, column].plot(rounds, shares.mean(0)[:-1], markersize=3, label=label, **style)
                x, y = density.mean(0), accuracy.mean(0)
                axes[1, column].plot(x, y, markersize=3, **style)
                if len(accuracy) > 1:
                    deviation = accuracy.std(0, ddof=1)
                    area = {"alpha": 0.2, "linewidth": 0, "color": COLORS[number]}
                    axes[1, column].fill_between(x, y - deviation, y + deviation, **area)
            axes[0, column].set(title=title, xlabel="pruning", ylim=(0, None))
            axes[1, column].set(xlabel="remaining weights", xscale="log")
            axes[1, column].invert_xaxis()
            axes[1, column].xaxis.set_major_locator(FixedLocator(TICKS))
            axes[1, column].xaxis.set_major_formatter(PercentFormatter(1, 0, " %"))
            axes[1, column].xaxis.set_minor_formatter(NullFormatter())
            axes[0, column].yaxis.set_major_locator(MaxNLocator(steps=(1, 2, 5, 10)))
            for row, decimals in enumerate((0, 1)):
                axes[row, column].yaxis.set_major_formatter(PercentFormatter(1, decimals, " %"))
                axes[row, column].grid(alpha=0.3)
        axes[0, 0].set_ylabel("share that it takes")
        axes[1, 0].set_ylabel("test accuracy")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        figure.savefig(path, dpi=DPI)


def _span(values: NDArray[np.float64]) -> str:
    low, high = 100 * values.min(), 100 * values.max()
    return f"{low:.0f} to {high:.0f} %"
