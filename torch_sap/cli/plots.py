"""Draw scans and runs."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, get_args

from torch_sap.arguments import needs
from torch_sap.cli.runs import Run
from torch_sap.cli.scan import Scan
from torch_sap.decide.groups import Scope

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""The Okabe-Ito colors, which color-blind readers can tell apart."""
MARKERS = "os^DvP"
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))
LABELS = 60
"""Names of layers that fit below a figure; of more layers only some are named."""


def plot_scan(scan: Scan, path: str | os.PathLike[str]) -> None:
    """Draw the weights of each layer, colored by the PQ Index, and what remains of it after one step in each scope."""
    figure = _figure(min(max(7.0, 2 + 0.16 * len(scan.layers)), 14.0), 7)
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import LogLocator, NullFormatter

    indices = [layer.pqi for layer in scan.layers]
    known = [index for index in indices if not math.isnan(index)] or [0.0]
    color = ScalarMappable(Normalize(min(known), max(max(known), min(known) + 0.01)), colormaps["cividis"])
    colors = ["lightgray" if math.isnan(index) else color.to_rgba(index) for index in indices]  # type: ignore[arg-type]
    weights, remaining = figure.subplots(2, 1, sharex=True)
    places = range(len(indices))
    weights.bar(places, [layer.weights for layer in scan.layers], color=colors)
    weights.set_yscale("log")
    weights.set_ylim(bottom=max(min(layer.weights for layer in scan.layers), 2) / 2)
    weights.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    weights.yaxis.set_major_formatter(lambda count, _: f"{count:,.0f}")
    weights.yaxis.set_minor_formatter(NullFormatter())
    weights.set_ylabel("weights")
    figure.colorbar(color, ax=weights, label="PQ Index")
    for number, scope in enumerate(get_args(Scope)):
        name, style = f"remaining_{scope}", {"color": COLORS[number], "marker": MARKERS[number], "linestyle": "none"}
        label = f"{scope} scope, all: {getattr(scan.overall, name):.1%}"
        remaining.plot(places, [100 * getattr(layer, name) for layer in scan.layers], label=label, **style)
    remaining.set_ylabel("remaining (%)")
    remaining.grid(alpha=0.3)
    every = math.ceil(len(scan.layers) / LABELS)
    names = [layer.name for layer in scan.layers[::every]]
    remaining.set_xticks(places[::every], names, rotation=90, fontsize="x-small")
    remaining.margins(x=0.01)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    of = f"{scan.source}, random weights" if scan.random_weights else scan.source
    figure.suptitle(f"{of}: {scan.overall.weights:,} weights, PQ Index {scan.overall.pqi:.3f}")
    figure.savefig(path, dpi=120)


def plot_runs(runs: Sequence[Run], metric: str, path: str | os.PathLike[str]) -> None:
    """Draw a metric against the share of remaining weights, one line per run."""
    figure = _figure(8, 5)
    from matplotlib.ticker import LogLocator, NullFormatter

    axes: Any = figure.subplots()
    for number, run in enumerate(runs):
        color, marker, line = (each[number % len(each)] for each in (COLORS, MARKERS, LINES))
        style: dict[str, Any] = {"color": color, "marker": marker, "linestyle": line, "markersize": 4}
        axes.plot([100 * round.density for round in run.history], run.values(metric), label=run.name, **style)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:g} %")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.invert_xaxis()
    axes.set_xlabel("remaining weights")
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _figure(width: float, height: float) -> Any:
    with needs("a figure", "matplotlib", "plot"):
        from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")
