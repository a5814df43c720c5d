"""Saved histories of the paper's experiments: packed small, read again, and the numbers taken from them."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch_sap
from paper.runs import Run, write_whole

SHARES = (50.0, 20.0, 10.0, 5.0, 2.0, 1.0)
DIGITS = 6
# Whole entries are pruned, so that a density of 0.01 can be 0.010001: it counts as reached.
ROUNDING = 1e-3

Histories = dict[Run, torch_sap.History]
Point = tuple[float, float, int]


def pack(runs: Iterable[Run], out: Path, results: Path) -> None:
    """Put the finished rounds of these runs into a file of `results` for each model and data set; others in it stay.

    Of the neuron scope only sums over each tensor are kept, and six digits of every number: the page needs no more. A
    run that has more rounds in `results` than in `out` stays as it is.
    """
    found = read(results)
    for run in runs:
        for name in ("rounds.json", "history.json"):  # of a run that is not finished, and of one that is
            if (out / run.name / name).exists():
                history = torch_sap.History.from_dict(slim(json.loads((out / run.name / name).read_text())))
                found[run] = max(history, found.get(run, history), key=len)
    results.mkdir(parents=True, exist_ok=True)
    for family, members in itertools.groupby(sorted(found, key=lambda run: (_family(run), run.name)), key=_family):
        content = {"runs": [{"config": asdict(run), "history": found[run].to_dict()} for run in members]}
        packed = gzip.compress(json.dumps(content, allow_nan=False).encode(), mtime=0)
        write_whole(results / f"{family}.json.gz", lambda path, packed=packed: path.write_bytes(packed))


def read(results: Path) -> Histories:
    """All packed runs with their histories."""
    found: Histories = {}
    for path in sorted(results.glob("*.json.gz")):
        for item in json.loads(gzip.decompress(path.read_bytes()))["runs"]:
            found[Run(**item["config"])] = torch_sap.History.from_dict(item["history"])
    return found


def slim(history: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values of a history without those of single neurons, and with fewer digits."""
    rounds = []
    for values in history["rounds"]:
        groups = values["groups"]
        if values["scope"] == "neuron":
            groups = {name: _summed(group) for name, group in groups.items()}
        parts = {key: _without_neurons(values[key]) for key in ("retrained", "pruned")}
        rounds.append(rounded({**values, **parts, "groups": groups}))
    return {**history, "rounds": rounds}


@dataclass(frozen=True)
class Curve:
    """Test accuracy against remaining weights, for one seed.

    Args:
        points: density, accuracy, and the training epochs spent until then, the dense model first.
    """

    points: tuple[Point, ...]

    def accuracy_at(self, density: float) -> float:
        """Accuracy at a density, on a straight line over log(density) between two rounds; NaN beyond the last."""
        for (above, first, _), (below, second, _) in itertools.pairwise(self.points):
            if below <= density * (1 + ROUNDING) and density <= above:
                if above == below:
                    return second
                share = math.log(above / max(density, below)) / math.log(above / below)
                return first + share * (second - first)
        return self.points[0][1] if density == self.points[0][0] else math.nan

    def mean_accuracy(self, lowest: float) -> float:
        """Area under the curve over log(density) from 1 to `lowest`, divided by its width; NaN beyond the last."""
        inside = [point for point in self.points if point[0] > lowest]
        end = (lowest, self.accuracy_at(lowest), 0)
        if math.isnan(end[1]):
            return math.nan
        area = sum(
            (first[1] + second[1]) / 2 * math.log(first[0] / second[0])
            for first, second in itertools.pairwise([*inside, end])
        )
        return area / math.log(inside[0][0] / lowest)

    def epochs_to(self, density: float) -> float:
        """Training epochs until a trained model of at most this density; infinite if there is none."""
        spent = [epochs for found, _, epochs in self.points if found <= density * (1 + ROUNDING)]
        return min(spent, default=math.inf)


def curve(run: Run, history: torch_sap.History) -> Curve:
    """The curve of a run's rounds."""
    return Curve(
        tuple((found.density, found.metrics["accuracy"], run.epochs * (found.number + 1)) for found in history)
    )


def joined(curves: Sequence[Curve]) -> Curve:
    """The curve of runs that prune once each, to different densities."""
    points = {point[0]: point for one in curves for point in one.points}
    return Curve(tuple(sorted(points.values(), reverse=True)))


def mean_and_std(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (NaN for one value)."""
    numbers = list(values)
    mean = sum(numbers) / len(numbers)
    if len(numbers) < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1))


def _family(run: Run) -> str:
    return f"{run.model}{run.width or ''}-{run.data}".replace(os.sep, "-")


def _summed(group: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    return {"d": [sum(group["d"])], "index": [None], "r": [sum(r or 0 for r in group["r"])], "c": [sum(group["c"])]}


def _without_neurons(sparsity: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if sparsity is None:
        return None
    return {measure: values and {**values, "neuron": {}} for measure, values in sparsity.items()}


def rounded(values: Any) -> Any:
    """Nested values with six digits of every number."""
    if isinstance(values, Mapping):
        return {key: rounded(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [rounded(value) for value in values]
    return float(f"{values:.{DIGITS}g}") if isinstance(values, float) else values
