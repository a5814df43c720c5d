"""The pictures and the table of docs/maths.md, from torch_sap itself: nothing in them is drawn by hand.

The weights are those of the pretrained network of pretrained.py, the rounds those of docs/results/paper. There is no
training, no random number and no download; a second run writes the same bytes.

    pip install -e ".[bench,pretrained]"
    python benchmarks/pictures.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import pictures_values as of
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from pages import DOCS, fill, table
from paper.figures import LOOKS, draw_curves, legend
from paper.main import IMAGES, RESULTS
from paper.results import Histories, read
from pretrained import load_model
from style import COLORS, DPI, LINES, STYLE, WIDTH, look, percent_log
from torch import nn

PAGE = DOCS / "maths.md"

Values = Mapping[str, Any]
Draw = Callable[[Values], Figure]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--images-dir", type=Path, default=IMAGES, help="folder of the pictures")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page whose table is filled")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = values_of(load_model(), read(RESULTS))
    for name, values in found.items():
        save(name, values, arguments.images_dir)
    arguments.page.write_text(fill(arguments.page.read_text("utf-8"), tables_of(found)), "utf-8")


def values_of(model: nn.Module, histories: Histories) -> dict[str, Values]:
    """What each picture shows."""
    return {
        "measure": of.measured(model),
        "count": of.counted(model),
        "choice": of.chosen(model),
        "run": of.ran(histories),
        "headline": of.headlined(histories),
    }


def save(name: str, values: Values, folder: Path) -> Path:
    """Draw a picture into a folder, with the digest of what it shows in it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ("headline.png" if name == "headline" else f"maths_{name}.png")
    with matplotlib.style.context(STYLE, after_reset=True):
        DRAW[name](values).savefig(path, dpi=DPI, metadata={"Description": of.digest(values)})
    return path


def measure(values: Values) -> Figure:
    """Sorted magnitudes of vectors, and their PQ Index with ever more zeros added."""
    figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1, 1.5))
    panels = halves[0].subplots(1, len(values), sharex=True, sharey=True)
    for number, (axes, (name, vector)) in enumerate(zip(panels, values.items(), strict=True)):
        edges = np.linspace(0, 1, len(vector["heights"]) + 1)
        axes.stairs(vector["heights"], edges, fill=True, color=COLORS[number])
        axes.set_title(f"{name}\nPQ Index {vector['index']['p=0.5, q=1'][0]:.3f}", fontsize="small")
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.set_xticks([0, 1])
    panels[0].set_ylabel("magnitude /\nlargest magnitude", fontsize="small")
    halves[0].supxlabel("entries, the largest first", fontsize="small")
    for axes, (p, q) in zip(halves[1].subplots(1, 2, sharey=True), of.NORMS, strict=True):
        shares = np.linspace(0, 0.97, 98)
        for number, (name, vector) in enumerate(values.items()):
            indices = vector["index"][f"p={p:g}, q={q:g}"]
            curve = 1 - (1 - indices[0]) * (1 - shares) ** (1 / p - 1 / q)
            axes.plot(shares, curve, color=COLORS[number], linestyle=LINES[number])
            axes.plot([1 - 1 / (1 + times) for times in of.ZEROS], indices, "o", color=COLORS[number], markersize=4)
            axes.plot([], [], color=COLORS[number], linestyle=LINES[number], marker="o", markersize=4, label=name)
        axes.set_title(f"PQ Index with zeros added, p={p:g}, q={q:g}", fontsize="small")
        axes.set_xlabel("share of added zeros", fontsize="small")
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="lower right")
    return figure


def count(values: Values) -> Figure:
    """Share that a round prunes over the PQ Index, with the layers of a network on the curves."""
    figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
    panels = figure.subplots(1, len(values), sharex=True, sharey=True)
    for axes, (panel, curves) in zip(panels, values.items(), strict=True):
        for number, (name, found) in enumerate(curves.items()):
            grid = np.linspace(0, 1, len(found["curve"]))
            axes.plot(grid, found["curve"], color=COLORS[number], linestyle=LINES[number], label=name)
            axes.plot(*zip(*found["layers"], strict=True), ".", color=COLORS[number], markersize=4, alpha=0.6)
            layer = found["layers"][found["layer"]]
            axes.plot(*layer, "D", color=COLORS[number], markersize=5, markeredgecolor="black")
        axes.set_title(panel, fontsize="small")
        axes.set_xlabel("PQ Index", fontsize="small")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.2))
    panels[0].set_ylabel("share that one round prunes", fontsize="small")
    return figure


def choice(values: Values) -> Figure:
    """Magnitudes of one layer, those that go in each scope in another color."""
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    edges = np.array(values["edges"])
    scopes = ("global", "layer", "neuron")
    for axes, scope in zip(figure.subplots(1, 3, sharey=True), scopes, strict=True):
        found = values[scope]
        stay, go = np.array(found["stay"]), np.array(found["go"])
        axes.stairs(go, edges, fill=True, facecolor="C2", edgecolor="white", hatch="///", linewidth=0, label="go")
        axes.stairs(stay + go, edges, baseline=go, fill=True, color="C5", label="stay")
        if scope != "neuron":
            axes.axvline(found["largest that goes"], color="black", linewidth=1, linestyle="--", label="threshold")
        axes.set_title(f"{scope} scope: {100 * found['share']:.1f} % go", fontsize="small")
        axes.set_xlabel("magnitude", fontsize="small")
        axes.legend(fontsize="small")
    figure.axes[0].set_ylabel("weights", fontsize="small")
    return figure


def run(values: Values) -> Figure:
    """What the rounds of real runs measure, prune and reach, and where a tolerance of one point would end them."""
    figure = Figure(figsize=(WIDTH, 5.8), layout="constrained")
    titles = [title for title in values if title != "stops"]
    panels = dict(zip(titles, np.ravel(figure.subplots(2, 2, sharex=True)), strict=True))
    for title, axes in panels.items():
        draw_curves(axes, {name: np.array(rows) for name, rows in values[title].items()}, title)
        axes.set_xlabel("round")
    panels[titles[0]].set_yscale("log")
    percent_log(panels[titles[0]].yaxis, [0.1, 100.0])
    panels[titles[0]].set_ylabel("remaining weights")
    accuracy = titles[-1]
    for name, stops in values["stops"].items():
        for (trainings, _), of_seed in zip(stops, values[accuracy][name], strict=True):
            if trainings < len(of_seed):
                at = trainings - 1, of_seed[trainings - 1]
                panels[accuracy].plot(*at, "X", color=look(LOOKS[name])["color"], markeredgecolor="black", markersize=8)
    panels[accuracy].plot([], [], "wX", markeredgecolor="black", label="stopped by tolerance")
    legend(figure, panels[accuracy])
    return figure


def headline(values: Values) -> Figure:
    """Accuracy over remaining weights, SAP beside a fixed ratio, one ranking for all rounds, and chance."""
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axes: Any = figure.subplots()
    for number, (name, found) in enumerate(values.items()):
        x, y, spread = (np.array(found[key]) for key in ("remaining", "accuracy", "deviation"))
        axes.plot(x, y, color=COLORS[number], linestyle=LINES[number], marker="os^D"[number], markersize=4, label=name)
        axes.fill_between(x, y - spread, y + spread, color=COLORS[number], alpha=0.2, linewidth=0)
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_xticks([1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002])
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylim(0.4, 0.92)
    axes.set_xlabel("remaining weights")
    axes.set_ylabel("test accuracy")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", fontsize="small")
    return figure


DRAW: dict[str, Draw] = {"measure": measure, "count": count, "choice": choice, "run": run, "headline": headline}


def tables_of(found: Mapping[str, Values]) -> dict[str, str]:
    """The numbers of the pictures that the page shows in a table."""
    return {"scopes": _scope_table(found["choice"])}


def _scope_table(values: Values) -> str:
    head = ["scope", "d", "I", "share of the layer gone", "largest gone", "smallest left"]
    lines = []
    for scope in ("global", "layer", "neuron"):
        found = values[scope]
        spans = [_span(found[key], places) for key, places in (("d", 0), ("index", 3))]
        ends = [f"{found[key]:.3f}" for key in ("largest that goes", "smallest that stays")]
        name = f"{scope}, {len(found['d'])} groups" if len(found["d"]) > 1 else scope
        lines.append([name, *spans, f"{100 * found['share']:.1f} %", *ends])
    return table(head, lines)


def _span(values: Sequence[float], places: int) -> str:
    low, high = (f"{end:,.{places}f}" for end in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


if __name__ == "__main__":
    main()
