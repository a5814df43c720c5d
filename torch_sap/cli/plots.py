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
MARKERS = "osD^vP"


def plot_scan(scan: Scan, path: str | os.PathLike[str]) -> None:
    """Draw one bar per layer, colored by the PQ Index: its weights, and the share that SAP prunes in each scope."""
    figure = _figure(max(7.0, 2 + 0.16 * len(scan.layers)), 9)
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    indices = [layer.pqi for layer in scan.layers]
    highest = max((index for index in indices if not math.isnan(index)), default=0.0)
    color = ScalarMappable(Normalize(0, max(highest, 0.01)), colormaps["viridis"])
    panels: Any = figure.subplots(4, 1, sharex=True)
    colors = ["lightgray" if math.isnan(index) else color.to_rgba(index) for index in indices]  # type: ignore[arg-type]
    places = range(len(indices))
    panels[0].bar(places, [layer.weights for layer in scan.layers], color=colors)
    panels[0].set_yscale("log")
    panels[0].set_ylabel("weights")
    for axes, scope in zip(panels[1:], get_args(Scope), strict=True):
        name = f"pruned_{scope}"
        axes.bar(places, [100 * getattr(layer, name) for layer in scan.layers], color=colors)
        axes.axhline(100 * getattr(scan.overall, name), color="black", linewidth=0.8, linestyle=":")
        axes.set_ylabel(f"pruned, {scope} (%)")
    panels[-1].set_xticks(places, [layer.name for layer in scan.layers], rotation=90, fontsize=6)
    panels[-1].margins(x=0.01)
    figure.colorbar(color, ax=list(panels), label="PQ Index", aspect=50)
    figure.suptitle(f"{scan.source}: {scan.overall.weights:,} weights, PQ Index {scan.overall.pqi:.3f}")
    figure.savefig(path, dpi=120)


def plot_runs(runs: Sequence[Run], metric: str, path: str | os.PathLike[str]) -> None:
    """Draw a metric against the share of remaining weights, one line per run."""
    figure = _figure(8, 5)
    axes: Any = figure.subplots()
    for number, run in enumerate(runs):
        style = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 4}
        axes.plot([100 * round.density for round in run.history], run.values(metric), label=run.name, **style)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:g} %")
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
