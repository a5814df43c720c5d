"""What the commands of the command line do, once their arguments are parsed."""

from __future__ import annotations

import difflib
import json
import os
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torch_sap.cli.report import (
    Row,
    choose_metric,
    compare_rows,
    load_run,
    plain,
    plot_compare,
    plot_scan,
    scan_rows,
    shape_text,
    write_csv,
)
from torch_sap.cli.scanning import scan_checkpoint, scan_model
from torch_sap.files.checkpoint_pruning import prune_checkpoint
from torch_sap.files.weights import SUFFIXES


def scan(arguments: Namespace) -> None:
    """Scan a model or a checkpoint."""
    if Path(arguments.model).exists() or _looks_like_path(arguments.model):
        if arguments.pretrained:
            raise ValueError(f"--pretrained goes with the name of a timm model, but {arguments.model} is a file")
        scan = scan_checkpoint(arguments.model, arguments.rule, exclude=arguments.exclude, key=arguments.key)
    else:
        model = make_timm_model(arguments.model, pretrained=arguments.pretrained, seed=arguments.seed)
        scan = scan_model(model, arguments.rule, source=arguments.model, exclude=arguments.exclude)
    if arguments.plot is not None:
        plot_scan(scan, arguments.plot)
    titles = {
        "name": "layer",
        "shape": "shape",
        "weights": "weights",
        "pqi": "PQI",
        "gini": "Gini",
        "pruned_global": "global %",
        "pruned_layer": "layer %",
        "pruned_neuron": "neuron %",
        "dead_rows": "dead",
    }
    _give(arguments, scan.to_dict(), scan_rows(scan), titles, total=True)


def _looks_like_path(text: str) -> bool:
    return "/" in text or os.sep in text or text.endswith((*SUFFIXES, ".json"))


def make_timm_model(name: str, *, pretrained: bool, seed: int) -> nn.Module:
    """Make a timm model, with new weights of a seed or the pretrained ones.

    Raises:
        ImportError: if timm is not installed (extra "timm").
        ValueError: if timm has no such model, or no pretrained weights for it.
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"{name} is no file, and models by name need timm: pip install 'torch_sap[timm]'") from error
    if not timm.is_model(name):
        similar = difflib.get_close_matches(name, timm.list_models()) or timm.list_models(f"*{name}*")[:5]
        hint = f"; similar: {', '.join(similar)}" if similar else ""
        raise ValueError(f"model must be a file, a folder or the name of a timm model, got {name!r}{hint}")
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(name, pretrained=pretrained)
    return model


def prune(arguments: Namespace) -> None:
    """Prune a checkpoint."""
    report = prune_checkpoint(
        arguments.checkpoint,
        arguments.out,
        arguments.scope,
        arguments.rule,
        exclude=arguments.exclude,
        key=arguments.key,
        overwrite=arguments.overwrite,
    )
    rows: list[dict[str, Any]] = [
        {"name": t.name, "shape": shape_text(t.shape), "total": t.total, "remaining": t.remaining}
        for t in report.tensors
    ]
    rows.append({"name": "overall", "shape": "", "total": report.total, "remaining": report.remaining})
    for row in rows:
        row["density"] = row["remaining"] / row["total"] if row["total"] else None
    titles = {
        "name": "layer",
        "shape": "shape",
        "total": "weights",
        "remaining": "remaining",
        "density": "remaining %",
    }
    _give(arguments, {"out": str(arguments.out), **report.to_dict()}, rows, titles, total=True)


def report(arguments: Namespace) -> None:
    """Show the rounds of a run."""
    run = load_run(arguments.run)
    metric = choose_metric([run], arguments.metric) if run.metrics or arguments.metric else None
    if arguments.plot is not None:
        run.history.plot(arguments.plot, metric=metric)
    rows = run.history.rows()
    for row, done in zip(rows, run.history, strict=True):
        row["density"] = done.density
    names = [*run.metrics, *(f"pruned_{name}" for name in run.metrics)]
    titles = {"round": "round", "remaining": "remaining", "density": "remaining %", "pqi": "PQI"}
    titles |= {name: name.replace("_", " ") for name in names}
    content = {"run": run.name, "config": run.config, "rounds": rows}
    _give(arguments, content, rows, titles, total=False)


def compare(arguments: Namespace) -> None:
    """Compare runs."""
    runs = [load_run(path) for path in arguments.runs]
    metric = choose_metric(runs, arguments.metric)
    if arguments.plot is not None:
        plot_compare(runs, metric, arguments.plot)
    rows = compare_rows(runs, metric, arguments.tolerance)
    titles = {name: f"{name}, in %" if name.startswith("remaining") else name for row in rows for name in row}
    _give(arguments, {"metric": metric, "runs": rows}, rows, titles, total=False)


def _give(
    arguments: Namespace, content: Mapping[str, Any], rows: Sequence[Row], titles: Mapping[str, str], *, total: bool
) -> None:
    """Write the CSV file if there is to be one, and print JSON or a table."""
    if arguments.csv is not None:
        with open(arguments.csv, "w", newline="", encoding="utf-8") as file:
            write_csv(rows, file)
    if arguments.json:
        json.dump(plain(content), sys.stdout, indent=2, allow_nan=False)
        print()
    else:
        print_table(rows, titles, total=total)


def print_table(rows: Sequence[Row], titles: Mapping[str, str], *, total: bool) -> None:
    """Print rows as a table, in a terminal as wide as that, elsewhere as wide as it takes.

    Args:
        rows: Values by column.
        titles: The columns to show, and what is above them. Shares are shown in percent where it ends in "%".
        total: Whether the last row is set apart.

    Raises:
        ImportError: if rich is not installed (extra "cli").
    """
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError as error:
        raise ImportError("tables need rich: pip install 'torch_sap[cli]'; or take --json") from error
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column, title in titles.items():
        is_text = all(isinstance(row.get(column), (str, type(None))) for row in rows)
        table.add_column(title, justify="left" if is_text else "right", overflow="fold")
    for number, row in enumerate(rows):
        if total and number == len(rows) - 1:
            table.add_section()
        table.add_row(*(_cell(row.get(column), title) for column, title in titles.items()))
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 10_000
    console.print(table)


def _cell(value: Any, title: str) -> str:
    if value is None or value != value:
        return "-"
    if isinstance(value, float):
        return f"{100 * value:.1f}" if title.endswith("%") else f"{value:.4g}" if abs(value) >= 1 else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
