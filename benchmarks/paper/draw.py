"""What `paper NAME draw` makes of saved histories: figures in docs/images, and tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from style import DPI

from paper import experiments, figures, tables
from paper.adaptive import (
    control_table,
    dense_table,
    draw_adaptive,
    first_table,
    remaining_table,
    share_table,
    tuned_table,
)
from paper.anchors import comparison_table, draw_comparison, read_authors
from paper.published import METHODS, draw_published, published_table, read_published
from paper.results import Histories, mean_and_std
from paper.runs import NORMS, Run
from torch_sap.decide.groups import Scope

AUTHORS, PUBLISHED = "authors_mlp_fmnist.csv", "paper_cifar10.csv"
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
        {f"{title(base)} phases": tables.phase_table(own)},
        {
            f"paper_figure2_{file_of(base)}.png": lambda path: figures.figure2(groups, path),
            f"paper_phases_{file_of(base)}.png": lambda path: figures.draw_phases(groups, path),
        },
    )


def figure3(histories: Histories, base: Run, results: Path) -> Drawing:
    """Figure 3, and its tensors in the last round."""
    own = _grouped_by_method(tables.selected(histories, experiments.figure3(base)))
    groups = figures.grouped(own)
    return (
        {f"{title(base)} tensors": tables.tensor_table(own)},
        {f"paper_figure3_{file_of(base)}.png": lambda path: figures.figure3(groups, path)},
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
        f"{title(base)} accuracy": tables.accuracy_table(own),
        f"{title(base)} area": tables.area_table(own),
    }
    if title(base) == "mlp":
        stopped = {run: history for run, history in own.items() if run in experiments.figure2(base)}
        found["stopping"] = tables.stopping_table(stopped)
    return found, {f"paper_audit_{file_of(base)}.png": lambda path: draw_audit(own, path)}


def cifar10(histories: Histories, base: Run, results: Path) -> Drawing:
    """CIFAR-10 beside the published curves."""
    published = read_published(results / PUBLISHED)
    every = _grouped_by_method(tables.finished(histories, experiments.cifar10(base)))
    own = {run: history for run, history in every.items() if run.rounds}
    dense = {run: history for run, history in every.items() if not run.rounds}
    return (
        {
            f"{title(base)} accuracy": tables.accuracy_table({run: h for run, h in own.items() if run.source is None}),
            f"{title(base)} published": published_table(own, published),
            f"{title(base)} shares": share_table(own),
            f"{title(base)} phases": tables.phase_table(
                {r: h for r, h in own.items() if figures.describe(r) in METHODS}
            ),
            f"{title(base)} controls": control_table(_controls(own, "global")),
            f"{title(base)} dense": dense_table(dense),
        },
        {"paper_cifar10.png": lambda path: draw_published(own, published, path)},
    )


def adaptive(histories: Histories, base: Run, results: Path) -> Drawing:
    """How adaptive SAP is."""
    own = _grouped_by_method(tables.selected(histories, experiments.adaptive(base)))
    several = {run: found for run, found in own.items() if run.rounds > 1}
    once = [
        run
        for (_, images), one in experiments.REDUCED.items()
        if images == base.data
        for run in experiments.figure2(one)
    ]
    dense = tables.selected(histories, [*once, *experiments.figure4(experiments.ABLATION)])
    dense |= tables.finished(histories, experiments.cifar10())
    every = {**dense, **several}
    first = {run: found for run, found in every.items() if run.method == "sap" and (run.p, run.q) in NORMS}
    controls = {scope: _controls(own, scope) for scope in experiments.CONTROLLED}
    parts = {f"{scope} scope, p={p:g}, q={q:g}": controls[scope] for scope, (p, q) in experiments.CONTROLLED.items()}
    return (
        {
            f"{title(base)} shares": share_table(several),
            f"{title(base)} controls": control_table({**controls["global"], **controls["layer"]}),
            f"{title(base)} tuned": tuned_table({run: found for run, found in several.items() if run.source is None}),
            f"{title(base)} first": first_table(first, read_published(results / PUBLISHED)),
            f"{title(base)} dense": dense_table({run: found for run, found in own.items() if run.rounds == 0}),
        },
        {f"paper_adaptive_{file_of(base)}.png": lambda path: draw_adaptive(parts, path)},
    )


def settings(histories: Histories, base: Run, results: Path) -> Drawing:
    """What remains after how many prunings."""
    return {"remaining": remaining_table(tables.finished(histories, experiments.settings(base)))}, {}


def _controls(histories: Histories, scope: Scope) -> Histories:
    """SAP and what follows it in one scope."""
    of_sap = {run: found for run, found in histories.items() if run.follows_sap and run.scope == scope}
    norms = experiments.CONTROLLED[scope]
    wanted = {run: found for run, found in of_sap.items() if (run.p, run.q) == norms and run.rewind == "init"}
    return dict(sorted(wanted.items(), key=lambda item: list(figures.CONTROLS).index(item[0].method)))


def title(base: Run) -> str:
    """The name of a model's tables; of FashionMNIST, which most are of, the model alone."""
    return base.model if base.data == Run.data else f"{base.model} {base.data}"


def file_of(base: Run) -> str:
    """The same in the names of its figures."""
    return title(base).replace(" ", "_")


def draw_audit(histories: Histories, path: Path) -> None:
    """Accuracy against remaining weights: methods in the global scope, a detail of it, and scopes."""
    several = {run: found for run, found in histories.items() if run.method != "plain" and run.rounds > 1}
    once = {run: found for run, found in histories.items() if run not in several}
    groups = figures.grouped(several)
    scoped = [name for name in groups if name.startswith("SAP") and "p=0.5" in name] + ["Lottery Ticket"]
    compared = [name for name in groups if name not in scoped[:-1]]
    panels = (
        ("methods, global scope", compared, None),
        ("the same from 100 to 10 %", [name for name in compared if name != "random"], 10.0),
        ("scopes, p=0.5, q=1", scoped, 10.0),
    )
    with figures.house_style(9.0) as figure:
        for axes, (title, names, sparsest) in zip(figure.subplots(3, 1), panels, strict=True):
            # Bands of curves that cross all the time hide each other: one is drawn, the others are as wide.
            banded = scoped[-1:] if names == scoped else names
            figures.against_remaining(axes, {name: groups[name] for name in names}, banded)
            _mark_once(axes, once, "EMP" if names == scoped else "prune once, train on")
            if sparsest is not None:
                figures.zoom(axes, sparsest)
            axes.set_title(title, loc="left")
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        figure.savefig(path, dpi=DPI)


def _mark_once(axes: Any, histories: Histories, label: str) -> None:
    """A point for each size that was pruned to at once, with its deviation."""
    members = [runs for name, runs in figures.grouped(histories, _name_of_once).items() if name.startswith(label)]
    shares = [figures.over_seeds(runs, lambda found: 100 * found.density)[:, -1].mean() for runs in members]
    ends = [figures.over_seeds(runs, lambda found: 100 * found.metrics["accuracy"])[:, -1] for runs in members]
    means, deviations = zip(*map(mean_and_std, ends), strict=True)
    axes.errorbar(shares, means, deviations, fmt="kX", markersize=5, capsize=2, linewidth=1, label=label)


def _name_of_once(run: Run) -> str:
    return f"prune once, train on {run.ratio}" if run.method == "plain" else figures.describe(run)


def _grouped_by_method(histories: Histories) -> Histories:
    """The runs with the seeds of a method behind each other, as tables and legends list them."""
    order = list(dict.fromkeys(figures.describe(run) for run in histories))
    return dict(sorted(histories.items(), key=lambda item: order.index(figures.describe(item[0]))))


def _ablation(parts: Sequence[Histories]) -> Callable[[Path], None]:
    return lambda path: figures.ablation([figures.grouped(part) for part in parts], path)
