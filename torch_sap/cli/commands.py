"""Run the commands of the command line on parsed arguments."""

from __future__ import annotations

import difflib
import os
from argparse import Namespace
from pathlib import Path
from typing import get_args

import torch
from torch import nn

from torch_sap.cli.plots import plot_runs, plot_scan
from torch_sap.cli.runs import compare_runs, load_run
from torch_sap.cli.scan import scan_checkpoint, scan_model
from torch_sap.cli.tables import give, shape_text
from torch_sap.decide.groups import Scope
from torch_sap.files.weights import SUFFIXES, prune_checkpoint
from torch_sap.records.metrics import choose_metric


def scan(arguments: Namespace) -> None:
    """Scan a model or a checkpoint."""
    if Path(arguments.model).exists() or _looks_like_path(arguments.model):
        if arguments.pretrained:
            raise ValueError(f"--pretrained goes with the name of a timm model, but {arguments.model} is a file")
        scan = scan_checkpoint(arguments.model, arguments.rule, exclude=arguments.exclude, key=arguments.key)
    else:
        model = _timm_model(arguments.model, pretrained=arguments.pretrained, seed=arguments.seed)
        scan = scan_model(model, arguments.rule, source=arguments.model, exclude=arguments.exclude)
    if arguments.plot is not None:
        plot_scan(scan, arguments.plot)
    titles = {"name": "layer", "shape": "shape", "weights": "weights", "pqi": "PQI", "gini": "Gini"}
    titles |= {f"pruned_{scope}": f"{scope} %" for scope in get_args(Scope)} | {"dead_rows": "dead"}
    rows = [{**vars(layer), "shape": shape_text(layer.shape)} for layer in (*scan.layers, scan.overall)]
    give(arguments, scan, rows, titles, total=True)


def _looks_like_path(text: str) -> bool:
    return "/" in text or os.sep in text or text.endswith((*SUFFIXES, ".json"))


def _timm_model(name: str, *, pretrained: bool, seed: int) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            f"{name} is not a file, and models by name need timm: pip install 'torch_sap[timm]'"
        ) from error
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
    counts = [(tensor.name, shape_text(tensor.shape), tensor.total, tensor.remaining) for tensor in report.tensors]
    rows = [
        {"name": name, "shape": shape, "total": total, "remaining": left, "density": left / total if total else None}
        for name, shape, total, left in [*counts, ("overall", "", report.total, report.remaining)]
    ]
    titles = {"name": "layer", "shape": "shape", "total": "weights", "remaining": "remaining"}
    content = {"out": str(arguments.out), **report.to_dict()}
    give(arguments, content, rows, titles | {"density": "remaining %"}, total=True)


def report(arguments: Namespace) -> None:
    """Show the rounds of a run."""
    run = load_run(arguments.run)
    if arguments.metric is not None:
        run.values(arguments.metric)
    if arguments.plot is not None:
        run.history.plot(arguments.plot, metric=arguments.metric)
    rows = run.history.rows()
    for row, round in zip(rows, run.history, strict=True):
        row["density"] = round.density
    titles = {"round": "round", "remaining": "remaining", "density": "remaining %", "pqi": "PQI"}
    names = dict.fromkeys(name for round in run.history for name in round.metrics)
    titles |= {column: column.replace("_", " ") for name in names for column in (name, f"pruned_{name}")}
    give(arguments, {"run": run.name, "config": run.config, "rounds": rows}, rows, titles, total=False)


def compare(arguments: Namespace) -> None:
    """Compare runs."""
    runs = [load_run(path) for path in arguments.runs]
    metric = choose_metric(list(runs[0].history[0].metrics), arguments.metric) or "accuracy"
    rows = compare_runs(runs, metric, arguments.tolerance)
    if arguments.plot is not None:
        plot_runs(runs, metric, arguments.plot)
    titles = {name: f"{name}, in %" if name.startswith("remaining") else name for row in rows for name in row}
    give(arguments, {"metric": metric, "runs": rows}, rows, titles, total=False)
