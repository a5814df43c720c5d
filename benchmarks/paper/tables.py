"""Tables from saved histories, for docs/does-it-work.md and docs/results/paper/tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from pages import table

import torch_sap
from paper.figures import describe, grouped, index_of, over_seeds, phases, remaining_of
from paper.results import SHARES, Curve, Histories, curve, joined, mean_and_std
from paper.runs import Run
from torch_sap.stopping import Collapse, StoppingRule, TargetDensity, WithinTolerance

# Where the area under the curve ends, in percent: where every method that prunes on has been, and a sparse end.
AREA_ENDS = (20.0, 2.0)
EPOCHS_TO = (10.0, 2.0)
NOT_REACHED = "-"
PHASES = ("regularization", "compression", "collapse")
PLACES = ("first", "middle", "last")
TOLERANCE = "WithinTolerance(0.01)"
RULES = {
    "TargetDensity(0.1)": TargetDensity(0.1),
    TOLERANCE: WithinTolerance(0.01, metric="accuracy"),
    "Collapse()": Collapse(metric="accuracy"),
}


def curves(histories: Histories, describe: Callable[[Run], str] = describe) -> dict[str, list[Curve]]:
    """The curves of each method, one a seed; runs that prune once to different densities are joined."""
    found: dict[str, list[Curve]] = {}
    once: dict[int, list[Curve]] = {}
    for run, history in histories.items():
        if run.method == "plain":
            once.setdefault(run.seed, []).append(curve(run, history))
        else:
            found.setdefault(describe(run), []).append(curve(run, history))
    if once:
        found["prune once, train on"] = [joined(of_seed) for of_seed in once.values()]
    return found


def accuracy_table(histories: Histories, describe: Callable[[Run], str] = describe) -> str:
    """Test accuracy of each method at the densities of the audit and at its last one, mean and deviation over seeds."""
    head = ["method", "seeds", "dense", *(f"{share:g} %" for share in SHARES), "at the end", "which is at"]
    lines = []
    for name, of_method in curves(histories, describe).items():
        at = [[one.accuracy_at(share / 100) for one in of_method] for share in (100.0, *SHARES)]
        ends = [[one.points[-1][place] for one in of_method] for place in (1, 0)]
        remaining, _ = mean_and_std(ends[1])
        lines.append([name, f"{len(of_method)}", *map(percent, [*at, ends[0]]), f"{100 * remaining:.2f} %"])
    return table(head, lines)


def area_table(histories: Histories) -> str:
    """Mean accuracy over log(remaining weights), the lowest density reached, and the epochs to reach two densities."""
    head = ["method", *(f"mean accuracy, 100 to {end:g} %" for end in AREA_ENDS), "smallest remaining"]
    head += [f"epochs to {share:g} %" for share in EPOCHS_TO]
    lines = []
    for name, of_method in curves(histories).items():
        areas = [percent([one.mean_accuracy(end / 100) for one in of_method]) for end in AREA_ENDS]
        smallest, _ = mean_and_std(one.points[-1][0] for one in of_method)
        epochs = [_epochs(mean_and_std(one.epochs_to(share / 100) for one in of_method)[0]) for share in EPOCHS_TO]
        lines.append([name, *areas, f"{100 * smallest:.2f} %", *epochs])
    return table(head, lines)


def ablation_table(histories: Histories) -> str:
    """What rounds end at, and the phases of the hypothesis on the way."""
    head = ["setting", "remaining after 1 pruning", "at the end", "accuracy: dense", "best", "last"]
    head += ["PQ Index: first", "smallest (round)", "last", "phases"]
    lines = []
    for name, members in grouped(histories).items():
        density = 100 * over_seeds(members, lambda found: found.density).mean(0)
        accuracy = 100 * over_seeds(members, lambda found: found.metrics["accuracy"]).mean(0)
        index = over_seeds(members, lambda found: found.pqi).mean(0)
        lowest = int(index.argmin())
        line = [name, f"{density[1]:.1f} %", f"{density[-1]:.2f} %", f"{accuracy[0]:.2f}", f"{accuracy.max():.2f}"]
        line += [f"{accuracy[-1]:.2f}", f"{index[0]:.3f}", f"{index[lowest]:.3f} ({lowest})", f"{index[-1]:.3f}"]
        lines.append([*line, phase_line(phases(members))])
    return table(head, lines)


def phase_table(histories: Histories) -> str:
    """How many rounds of each method are in which phase of the hypothesis, and the rounds in order."""
    head = ["method", "regularization", "compression", "collapse", "none of them", "in order"]
    lines = []
    for name, members in grouped(histories).items():
        labels = phases(members)[1:]
        counts = [f"{sum(label == wanted for label in labels)}" for wanted in (*PHASES, None)]
        lines.append([name, *counts, phase_line([None, *labels])])
    return table(head, lines)


def tensor_table(histories: Histories) -> str:
    """Remaining weights and PQ Index of the first, a middle and the last tensor, in the last round of each method."""
    head = ["method", "remaining, all", *(f"{place} tensor" for place in PLACES)]
    head += [f"PQ Index of the {place} tensor: dense, last" for place in PLACES]
    lines = []
    for name, members in grouped(histories).items():
        density = 100 * over_seeds(members, lambda found: found.density).mean(0)[-1]
        remaining = [over_seeds(members, remaining_of(place)).mean(0)[-1] for place in PLACES]
        index = [over_seeds(members, index_of(place)).mean(0)[[0, -1]] for place in PLACES]
        line = [name, *(f"{share:.1f} %" for share in (density, *remaining))]
        lines.append([*line, *(f"{first:.3f}, {last:.3f}" for first, last in index)])
    return table(head, lines)


def stopping_table(histories: Histories) -> str:
    """Where the stopping rules would have ended each run, and the model that they would have given back."""
    head = ["method", "seed", *(f"`{name}`: trainings" for name in RULES)]
    head += ["model given back by `WithinTolerance(0.01)`: round", "remaining", "accuracy", "dense"]
    lines = []
    for run, history in histories.items():
        ends = {name: stop(history, rule) for name, rule in RULES.items()}
        found = history[ends[TOLERANCE][1]]
        line = [describe(run), f"{run.seed}", *(f"{trainings}" for trainings, _ in ends.values()), f"{found.number}"]
        accuracies = [f"{100 * one.metrics['accuracy']:.2f}" for one in (found, history[0])]
        lines.append([*line, f"{100 * found.density:.2f} %", *accuracies])
    return table(head, lines)


def stop(history: torch_sap.History, rule: StoppingRule) -> tuple[int, int]:
    """Trainings until a rule ends a run (all, if it never does), and the last round that it accepts."""
    accepted = 0
    for number in range(len(history)):
        seen = history[: number + 1]
        accepted = number if rule.accepts(seen) else accepted
        if rule.ends(seen):
            return number + 1, accepted
    return len(history), accepted


def phase_line(labels: Sequence[str | None]) -> str:
    """Phases as a word: R, C, X for the three, a dot for none, without round 0."""
    letters = {"regularization": "R", "compression": "C", "collapse": "X", None: "."}
    return f"`{''.join(letters[label] for label in labels[1:])}`"


def percent(values: Iterable[float]) -> str:
    """Mean and deviation of shares, in percent; a dash if a seed has none."""
    mean, deviation = mean_and_std(values)
    if math.isnan(mean):
        return NOT_REACHED
    return f"{100 * mean:.2f}" if math.isnan(deviation) else f"{100 * mean:.2f} ± {100 * deviation:.2f}"


def selected(histories: Histories, runs: Sequence[Run]) -> Histories:
    """The histories of these runs, in their order.

    Raises:
        FileNotFoundError: one is missing.
    """
    missing = [run.name for run in runs if run not in histories]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(runs)} runs have no saved history: {missing[0]}, ...")
    return {run: histories[run] for run in runs}


def finished(histories: Histories, runs: Sequence[Run]) -> Histories:
    """Those of the runs that have a history, in their order; of the seeds of a method, those with the most rounds.

    Runs that take hours are shown before the last of them is done.
    """
    found = {run: histories[run] for run in runs if run in histories}
    longest: dict[Run, int] = {}
    for run, history in found.items():
        seedless = replace(run, seed=0, source=None)
        longest[seedless] = max(len(history), longest.get(seedless, 0))
    return {
        run: history for run, history in found.items() if len(history) == longest[replace(run, seed=0, source=None)]
    }


def _epochs(mean: float) -> str:
    return NOT_REACHED if math.isinf(mean) else f"{mean:.0f}"
