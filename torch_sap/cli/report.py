"""Tables and pictures of scans and of runs: records in, rows and files out."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, get_args

from torch_sap.cli.scanning import Scan
from torch_sap.decide.groups import Scope
from torch_sap.records.history import History

Row = Mapping[str, Any]


def scan_rows(scan: Scan) -> list[dict[str, Any]]:
    """A scan as lines of a table: each layer, and "overall" at the end."""
    return [{**layer.to_dict(), "shape": shape_text(layer.shape)} for layer in (*scan.layers, scan.overall)]


def shape_text(shape: Sequence[int]) -> str:
    """A shape in the way "64x3x7x7"."""
    return "x".join(map(str, shape))


@dataclass(frozen=True, eq=False)
class Run:
    """What a run left behind.

    Attributes:
        name: Name of its folder or file.
        config: Its settings; empty if there is no ``config.json``.
        history: Its rounds.
    """

    name: str
    config: Mapping[str, Any]
    history: History

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics of its rounds, "accuracy" first."""
        names = dict.fromkeys(name for round in self.history for name in round.metrics)
        return sorted(names, key=lambda name: name != "accuracy")


def load_run(path: str | os.PathLike[str]) -> Run:
    """Read a run: a folder with ``history.json`` and perhaps ``config.json``, or the history itself.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if it holds no history, or one without rounds.
    """
    path = Path(path)
    file = path / "history.json" if path.is_dir() else path
    settings = file.with_name("config.json")
    if not file.exists():
        raise FileNotFoundError(f"{path} is no run: there is no file {file}, as History.to_json writes it")
    try:
        history = History.from_json(file)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no history that torch_sap wrote: {type(error).__name__}: {error}") from error
    if not len(history):
        raise ValueError(f"{file} must have a round, but it is empty")
    config: Any = {}
    if settings.exists():
        try:
            config = json.loads(settings.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{settings} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{settings} must hold an object with settings, got {type(config).__name__}")
    return Run(path.resolve().name if path.is_dir() else path.name, config, history)


def choose_metric(runs: Iterable[Run], metric: str | None) -> str:
    """The metric that is asked for, or else "accuracy" or the first that all runs have.

    Raises:
        ValueError: if a run does not have it, or they have none in common.
    """
    runs = list(runs)
    known = [name for name in runs[0].metrics if all(name in run.metrics for run in runs)]
    if metric is None and known:
        return known[0]
    if metric not in known:
        asked = "" if metric is None else f", got metric={metric!r}"
        raise ValueError(f"metric must be one that all runs have, of {known}{asked}")
    return metric


def compare_rows(runs: Sequence[Run], metric: str, tolerance: float = 0.01) -> list[dict[str, Any]]:
    """Runs as lines of a table.

    Args:
        runs: What to compare.
        metric: Name of a metric, the larger the better.
        tolerance: What the metric may lose.

    Returns:
        Of each run the settings that are not the same in all, its rounds, the metric of the first, the last and the
        best round, and the smallest share of weights whose metric is at most ``tolerance`` below that of the first.
    """
    differing = [
        name
        for name in dict.fromkeys(name for run in runs for name in run.config)
        if len({json.dumps(run.config.get(name), sort_keys=True) for run in runs}) > 1
    ]
    rows = []
    for run in runs:
        points = points_of(run, metric)
        values = [value for _, value in points]
        enough = [remaining for remaining, value in points if value >= values[0] - tolerance]
        rows.append(
            {
                "run": run.name,
                **{name: run.config.get(name) for name in differing},
                "scope": run.history[0].scope,
                "rounds": len(run.history),
                "remaining": points[-1][0],
                f"{metric}, first": values[0],
                f"{metric}, last": values[-1],
                f"{metric}, best": max(values),
                f"remaining within {tolerance:g}": min(enough, default=None),
            }
        )
    return rows


def points_of(run: Run, metric: str) -> list[tuple[float, float]]:
    """Share of the weights and metric of each round that has the metric."""
    return [(round.density, round.metrics[metric]) for round in run.history if metric in round.metrics]


def write_csv(rows: Sequence[Row], file: TextIO) -> None:
    """Write a line a row; what a row lacks stays empty."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def plain(value: Any) -> Any:
    """Values that JSON can hold: None for NaN and infinities."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plot_scan(scan: Scan, path: str | os.PathLike[str]) -> None:
    """Draw a bar a layer, coloured by the PQ Index: its weights, and the share that SAP prunes in each scope.

    Raises:
        ImportError: if matplotlib is not installed (extra "plot").
    """
    figure_class = _figure()
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    indices = [layer.pqi for layer in scan.layers]
    finite = [index for index in indices if not math.isnan(index)] or [0.0]
    colour = ScalarMappable(Normalize(0, max(*finite, 0.01)), colormaps["viridis"])
    figure = figure_class(figsize=(max(7.0, 2 + 0.16 * len(indices)), 9), layout="constrained")
    panels: Any = figure.subplots(4, 1, sharex=True)
    colours = ["lightgray" if math.isnan(index) else colour.to_rgba(index) for index in indices]  # type: ignore[arg-type]
    places = range(len(indices))
    panels[0].bar(places, [layer.weights for layer in scan.layers], color=colours)
    panels[0].set_yscale("log")
    panels[0].set_ylabel("weights")
    for axes, scope in zip(panels[1:], get_args(Scope), strict=True):
        name = f"pruned_{scope}"
        axes.bar(places, [100 * getattr(layer, name) for layer in scan.layers], color=colours)
        axes.axhline(100 * getattr(scan.overall, name), color="black", linewidth=0.8, linestyle=":")
        axes.set_ylabel(f"pruned, {scope} (%)")
    panels[-1].set_xticks(places, [layer.name for layer in scan.layers], rotation=90, fontsize=6)
    panels[-1].margins(x=0.01)
    figure.colorbar(colour, ax=list(panels), label="PQ Index", aspect=50)
    figure.suptitle(f"{scan.source}: {scan.overall.weights:,} weights, PQ Index {scan.overall.pqi:.3f}")
    figure.savefig(path, dpi=120)


def plot_compare(runs: Sequence[Run], metric: str, path: str | os.PathLike[str]) -> None:
    """Draw a metric against the share of remaining weights, a line a run.

    Raises:
        ImportError: if matplotlib is not installed (extra "plot").
    """
    figure = _figure()(figsize=(8, 5), layout="constrained")
    axes: Any = figure.subplots()
    for run in runs:
        points = points_of(run, metric)
        axes.plot([100 * x for x, _ in points], [y for _, y in points], marker="o", markersize=3, label=run.name)
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_xlabel("remaining weights (%)")
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'torch_sap[plot]'") from error
    return Figure
