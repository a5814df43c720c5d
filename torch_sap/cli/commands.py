"""The commands of the command line, on parsed arguments. Their docstrings are what ``--help`` prints."""

from __future__ import annotations

import difflib
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import get_args

import torch
from torch import nn

from torch_sap.cli.plots import plot_runs, plot_scan
from torch_sap.cli.runs import compare_runs, load_run
from torch_sap.cli.scan import scan_entries
from torch_sap.cli.tables import give, shape_text
from torch_sap.decide.groups import Scope
from torch_sap.files.folder import SUFFIXES, companions
from torch_sap.files.weights import open_checkpoint, prune_checkpoint
from torch_sap.masks.parameters import resolve
from torch_sap.records.metrics import choose_metric
from torch_sap.records.report import TensorRecord


def scan(arguments: Namespace) -> None:
    """Measure weights and show what SAP would prune of them. Nothing is changed.

    MODEL is the name of a timm model, a .safetensors or .pt file, an index of several (*.index.json), or a folder with
    one of these. safetensors files may be larger than memory.

    Columns:
      PQI      PQ Index: 0 if all magnitudes are equal, larger the more unevenly they are spread
      Gini     Gini index of the magnitudes, from a histogram; exact for 16 bits, else to about 0.0001
      global, layer, neuron
               share that SAP prunes of the layer if all weights, each layer, or each row is one group
      dead     rows (output channels) that are all zero

    Examples:
      torch-sap scan vit_tiny_patch16_224 --pretrained
      torch-sap scan model.safetensors.index.json --eta-r 0.1 --csv scan.csv
      torch-sap scan checkpoint.pt --key state_dict_ema --exclude 'head' --exclude '*.conv_dw.*'
      torch-sap scan model.safetensors --json | jq '.overall.pqi'
    """
    given = arguments.model
    if Path(given).exists() or "/" in given or os.sep in given or given.endswith((*SUFFIXES, ".json")):
        if arguments.pretrained:
            raise ValueError(f"--pretrained goes with the name of a timm model, but {given} is a file")
        found, _ = open_checkpoint(given, arguments.key).weights(arguments.exclude, arguments.include)
        entries = [one.entry() for one in found]
    else:
        model = _timm_model(given, pretrained=arguments.pretrained, seed=arguments.seed)
        entries = [prunable.entry() for prunable in resolve(model, arguments.exclude, arguments.include).prunables]
    scan = scan_entries(entries, arguments.rule, given)
    if arguments.plot is not None:
        plot_scan(scan, arguments.plot)
    titles = {"name": "layer", "shape": "shape", "weights": "weights", "pqi": "PQI", "gini": "Gini"}
    titles |= {f"pruned_{scope}": f"{scope} %" for scope in get_args(Scope)} | {"dead_rows": "dead"}
    rows = [{**vars(layer), "shape": shape_text(layer.shape)} for layer in (*scan.layers, scan.overall)]
    give(arguments, scan, rows, titles, total=True)


def _timm_model(name: str, *, pretrained: bool, seed: int) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        reason = f"{name} is not a file, and models by name need timm"
        raise ImportError(f"{reason}: pip install 'torch_sap[timm]'") from error
    if not timm.is_model(name):
        similar = difflib.get_close_matches(name, timm.list_models()) or timm.list_models(f"*{name}*")[:5]
        hint = f"; similar: {', '.join(similar)}" if similar else ""
        raise ValueError(f"model must be a file, a folder or the name of a timm model, got {name!r}{hint}")
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(name, pretrained=pretrained)
    return model


def prune(arguments: Namespace) -> None:
    """Prune the weights of a checkpoint by SAP, once, and write a checkpoint of the same format, with zeros.

    CHECKPOINT is a .safetensors or .pt file, an index of several, or a folder with one of these; for the last two the
    output is a folder with the same files. Everything else in the files stays as it is. What else belongs to the model
    in a folder (config.json, tokenizer) is copied; other weights in it (onnx/, pytorch_model.bin beside
    model.safetensors) are left out and named. Files are written under other names until all are complete. safetensors
    files may be larger than memory, .pt files may not.

    Examples:
      torch-sap prune model.safetensors -o pruned.safetensors
      torch-sap prune llm/ -o llm-pruned/ --scope layer --exclude 'lm_head' --exclude '*embed*'
      torch-sap prune checkpoint.pt -o checkpoint.pt --overwrite --eta-r 0.1
    """
    options = {name: getattr(arguments, name) for name in ("exclude", "include", "key", "overwrite")}
    beside = companions(Path(arguments.checkpoint), arguments.out)
    report = prune_checkpoint(arguments.checkpoint, arguments.out, arguments.scope, arguments.rule, **options)
    rows = []
    for one in (*report.tensors, TensorRecord("overall", (), report.remaining, report.total)):
        counts = {"total": one.total, "remaining": one.remaining, "density": one.density}
        rows.append({"name": one.name, "shape": shape_text(one.shape), **counts})
    titles = {"name": "layer", "shape": "shape", "total": "weights", "remaining": "remaining"}
    content = {"out": str(arguments.out), "copied": beside.copied, "not_copied": beside.left_out, **report.to_dict()}
    give(arguments, content, rows, titles | {"density": "remaining %"}, total=True)
    if beside.left_out:
        print(f"torch-sap: not copied, since they hold weights: {', '.join(beside.left_out)}", file=sys.stderr)


def report(arguments: Namespace) -> None:
    """Show the rounds of a run. RUN is a folder with history.json, as the benchmarks write it, or such a file.

    Examples:
      torch-sap report runs/test_resnet-digits-layer-0
      torch-sap report runs/a --plot a.png --csv a.csv
    """
    run = load_run(arguments.run)
    if arguments.metric is not None:
        run.values(arguments.metric)
    if arguments.plot is not None:
        run.history.plot(arguments.plot, metric=arguments.metric)
    rows = [{**round.row(), "density": round.density} for round in run.history]
    titles = {"round": "round", "remaining": "remaining", "density": "remaining %", "pqi": "PQI"}
    names = dict.fromkeys(name for round in run.history for name in round.metrics)
    titles |= {column: column.replace("_", " ") for name in names for column in (name, f"pruned_{name}")}
    give(arguments, {"run": run.name, "config": run.config, "rounds": rows}, rows, titles, total=False)


def compare(arguments: Namespace) -> None:
    """Compare runs by a metric and the share of remaining weights; settings in config.json that differ are shown.

    Examples:
      torch-sap compare runs/*-layer-0 --plot layer.png
      torch-sap compare runs/a runs/b --metric accuracy --tolerance 0.02
    """
    runs = [load_run(path) for path in arguments.runs]
    metric = choose_metric(list(runs[0].history[0].metrics), arguments.metric) or "accuracy"
    rows = compare_runs(runs, metric, arguments.tolerance)
    if arguments.plot is not None:
        plot_runs(runs, metric, arguments.plot)
    titles = {name: f"{name}, in %" if name.startswith("remaining") else name for row in rows for name in row}
    give(arguments, {"metric": metric, "runs": rows}, rows, titles, total=False)
