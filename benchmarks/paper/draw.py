"""What `paper NAME draw` makes of saved histories: figures in docs/images, tables in docs/does-it-work.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from paper import experiments, figures, tables
from paper.anchors import comparison_table, draw_comparison, read_authors
from paper.results import Histories, mean_and_std
from paper.runs import Run

AUTHORS = "authors_mlp_fmnist.csv"
Drawing = tuple[Mapping[str, str], Mapping[str, Callable[[Path], None]]]


def anchors(histories: Histories, base: Run, results: Path) -> Drawing:
    """Our curves over those of the authors' code."""
    authors = read_authors(results / AUTHORS)
    own = _grouped_by_method(tables.selected(histories, experiments.anchors(base)))
    return (
        {"anchors": comparison_table(own, authors)},
        {"paper_anchors.png": lambda path: draw_comparison(own, authors, path)},
    )


def differences(histories: Histories, base: Run, results: Path) -> Drawing:
    """The same with what the authors' code does in another way."""
    authors = read_authors(results / AUTHORS)
    own = tables.selected(histories, experiments.differences(base))
    return {"differences": comparison_table(own, authors)}, {}


def figure2(histories: Histories, base: Run, results: Path) -> Drawing:
    """Figure 2, and how its rounds lie in the phases of the hypothesis."""
    own = _grouped_by_method(tables.selected(histories, experiments.figure2(base)))
    groups = figures.grouped(own)
    return (
        {f"{base.model} phases": tables.phase_table(own)},
        {
            f"paper_figure2_{base.model}.png": lambda path: figures.figure2(groups, path),
            f"paper_phases_{base.model}.png": lambda path: figures.draw_phases(groups, path),
        },
    )


def figure3(histories: Histories, base: Run, results: Path) -> Drawing:
    """Figure 3, and its tensors in the last round."""
    own = _grouped_by_method(tables.selected(histories, experiments.figure3(base)))
    groups = figures.grouped(own)
    return (
        {f"{base.model} tensors": tables.tensor_table(own)},
        {f"paper_figure3_{base.model}.png": lambda path: figures.figure3(groups, path)},
    )


def figure4(histories: Histories, base: Run, results: Path) -> Drawing:
    """Figure 4."""
    own = _grouped_by_method(tables.selected(histories, experiments.figure4(base)))
    parts = [
        {run: found for run, found in own.items() if run.q == 1},
        {run: found for run, found in own.items() if run.q != 1},
    ]
    return {"figure4": tables.ablation_table(own)}, {"paper_figure4.png": _ablation(parts)}


def figure5(histories: Histories, base: Run, results: Path) -> Drawing:
    """Figure 5."""
    own = _grouped_by_method(tables.selected(histories, experiments.figure5(base)))
    parts = [
        {run: found for run, found in own.items() if run.gamma == 1},
        {run: found for run, found in own.items() if run.eta_r == 0},
    ]
    return {"figure5": tables.ablation_table(own)}, {"paper_figure5.png": _ablation(parts)}


def audit(histories: Histories, base: Run, results: Path) -> Drawing:
    """All methods at equal compute."""
    own = _grouped_by_method(tables.selected(histories, experiments.audit(base)))
    found = {
        f"{base.model} accuracy": tables.accuracy_table(own),
        f"{base.model} area": tables.area_table(own),
    }
    if base.model == "mlp":
        stopped = {run: history for run, history in own.items() if run in experiments.figure2(base)}
        found["stopping"] = tables.stopping_table(stopped)
    return found, {f"paper_audit_{base.model}.png": lambda path: draw_audit(own, path)}


def draw_audit(histories: Histories, path: Path) -> None:
    """Accuracy against remaining weights of all methods, and a detail; a point for each density pruned to at once."""
    groups = figures.grouped({run: found for run, found in histories.items() if run.method != "plain"})
    figure = Figure(figsize=(14, 5.5), layout="constrained")
    whole, detail = figure.subplots(1, 2)
    figures.against_remaining(whole, groups)
    figures.against_remaining(detail, {name: members for name, members in groups.items() if name != "random"})
    figures.zoom(detail)
    points: dict[float, list[float]] = {}
    for run, found in histories.items():
        if run.method == "plain":
            points.setdefault(run.ratio, []).append(100 * found[-1].metrics["accuracy"])
    values = [mean_and_std(accuracies) for accuracies in points.values()]
    means, deviations = zip(*values, strict=True)
    for axes in (whole, detail):
        shares = [100 * (1 - ratio) for ratio in points]
        axes.errorbar(shares, means, deviations, fmt="k.", capsize=2, linewidth=1, label="prune once, train on")
    whole.legend(fontsize="small")
    figure.savefig(path, dpi=90)


def _grouped_by_method(histories: Histories) -> Histories:
    """The runs with the seeds of a method behind each other, as tables and legends list them."""
    order = list(dict.fromkeys(figures.describe(run) for run in histories))
    return dict(sorted(histories.items(), key=lambda item: order.index(figures.describe(item[0]))))


def _ablation(parts: Sequence[Histories]) -> Callable[[Path], None]:
    return lambda path: figures.ablation([figures.grouped(part) for part in parts], path)
