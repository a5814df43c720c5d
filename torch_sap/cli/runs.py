"""Read runs from their folders, and compare them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch_sap.records.history import History
from torch_sap.records.metrics import metric_values


@dataclass(frozen=True, eq=False)
class Run:
    """The files of a run."""

    name: str
    """Of its folder or file."""
    config: Mapping[str, Any]
    """Its settings; empty if there is no ``config.json``."""
    history: History

    def values(self, metric: str) -> list[float]:
        """A metric, one value per round; ValueError if a round lacks it."""
        try:
            return metric_values(self.history, metric)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None


def load_run(path: str | os.PathLike[str]) -> Run:
    """Read a run: a folder with ``history.json`` and perhaps ``config.json``, or the history itself."""
    path = Path(path)
    file = path / "history.json" if path.is_dir() else path
    settings = file.with_name("config.json")
    if not file.exists():
        raise FileNotFoundError(f"{path} is not a run: there is no file {file}, as History.to_json writes it")
    try:
        history = History.from_json(file)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not a history that torch_sap wrote: {type(error).__name__}: {error}") from error
    if not len(history):
        raise ValueError(f"{file} must have a round, but it is empty")
    try:
        config: Any = json.loads(settings.read_text(encoding="utf-8")) if settings.exists() else {}
    except ValueError as error:
        raise ValueError(f"{settings} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{settings} must hold an object with settings, got {type(config).__name__}")
    return Run(path.resolve().name if path.is_dir() else path.name, config, history)


def compare_runs(runs: Sequence[Run], metric: str, tolerance: float) -> list[dict[str, Any]]:
    """Compare runs by a metric, the larger the better; one row per run.

    A row has the settings that differ between runs, the number of rounds, the metric of the first, the last and the
    best round, and the smallest share of weights whose metric is at most ``tolerance`` below the first one.
    """
    names = dict.fromkeys(name for run in runs for name in run.config)
    differing = [name for name in names if len({json.dumps(run.config.get(name), sort_keys=True) for run in runs}) > 1]
    rows = []
    for run in runs:
        values, densities = run.values(metric), [round.density for round in run.history]
        enough = [density for density, value in zip(densities, values, strict=True) if value >= values[0] - tolerance]
        row = {"run": run.name, **{name: run.config.get(name) for name in differing}, "scope": run.history[0].scope}
        row |= {"rounds": len(run.history), "remaining": densities[-1]}
        row |= {f"{metric}, first": values[0], f"{metric}, last": values[-1], f"{metric}, best": max(values)}
        rows.append(row | {f"remaining within {tolerance:g}": min(enough, default=None)})
    return rows
