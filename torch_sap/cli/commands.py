"""The commands of the command line, on parsed arguments. Their docstrings are what ``--help`` prints."""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from torch_sap.cli.environment import environment
from torch_sap.cli.outputs import check_outputs
from torch_sap.cli.plots import plot_runs, plot_scan
from torch_sap.cli.progress import progress
from torch_sap.cli.runs import compare_runs, load_run
from torch_sap.cli.scan import scan_entries
from torch_sap.cli.tables import Table, give, shape_text
from torch_sap.decide.groups import Scope
from torch_sap.files.folder import SUFFIXES, checkpoint_files, companions
from torch_sap.files.weights import open_checkpoint, prune_checkpoint
from torch_sap.masks.parameters import resolve
from torch_sap.records.metrics import choose_metric
from torch_sap.records.report import TensorRecord, left_out_text


def scan(arguments: Namespace) -> None:
    """Measure weights and show what one SAP step would leave of them. Nothing is changed.

    MODEL is the name of a timm model (hf-hub:OWNER/NAME for one of the hub), a .safetensors or .pt file, an index of
    several (*.index.json), or a folder with one of these. safetensors files may be larger than memory.

    Columns:
      PQI      PQ Index: 0 if all magnitudes are equal, larger the more unevenly they are spread
      Gini     Gini index of the magnitudes, from a histogram; exact for 16 bits, else to about 0.0001
      global %, layer %, neuron %
               what remains of the layer if all weights, each layer, or each row is one group
      dead     rows (output channels) that are all zero

    Examples:
      torch-sap scan vit_tiny_patch16_224 --pretrained
      torch-sap scan model.safetensors.index.json --eta-r 0.1 --csv scan.csv
      torch-sap scan checkpoint.pt --key state_dict_ema --exclude 'head' --exclude '*.conv_dw.*'
      torch-sap scan model.safetensors --json | jq '.overall.pqi'
    """
    check_outputs(arguments)
    given = arguments.model
    is_file = not given.startswith(HUB) and (Path(given).exists() or bool(re.search(PATH, given)))
    random_weights = not is_file and not arguments.pretrained
    if is_file:
        if arguments.pretrained:
            raise ValueError(f"--pretrained goes with the name of a timm model, but {given} is a file")
        check_exists(given)
        found, left_out = open_checkpoint(given, arguments.key).weights(arguments.exclude, arguments.include)
        entries = [one.entry() for one in found]
    else:
        with progress(f"loading {given}"):
            model = _timm_model(given, pretrained=arguments.pretrained, seed=arguments.seed)
        prunables, left_out = resolve(model, arguments.exclude, arguments.include)
        entries = [prunable.entry() for prunable in prunables]
    with progress(f"scanning {given}", sum(entry.scores.numel() for entry in entries)) as advance:
        about: dict[str, Any] = {"random_weights": random_weights, "left_out": left_out, "advance": advance}
        scan = scan_entries(entries, arguments.rule, given, **about)
    if is_file and is_alphabetical(given):
        scan = replace(scan, layers=tuple(sorted(scan.layers, key=natural)))
    titles = {"name": "layer", "shape": "shape", "weights": "weights", "pqi": "PQI", "gini": "Gini"}
    titles |= {f"remaining_{scope}": f"{scope} %" for scope in get_args(Scope)} | {"dead_rows": "dead"}
    rows = [{**vars(layer), "shape": shape_text(layer.shape)} for layer in (*scan.layers, scan.overall)]
    of = f"{given} with random weights (seed {arguments.seed})" if random_weights else given
    heading = f"{of}: remaining % after one SAP step, in each scope"
    spare = ("gini", "shape", "dead_rows", "remaining_neuron")
    table = Table(rows, titles, heading, left_out_text(scan.left_out), total=True, spare=spare)
    give(arguments, scan, table, lambda path: plot_scan(scan, path))


HUB = ("hf-hub:", "hf_hub:")
"""How names of models on the Hugging Face hub begin for timm."""
PATH = rf"[/{re.escape(os.sep)}]|({'|'.join(map(re.escape, (*SUFFIXES, '.json')))})$"
"""What a name has that is not the name of a timm model."""


def is_alphabetical(path: str) -> bool:
    """Whether a checkpoint has files of safetensors, which puts tensors in alphabetical order: 10 before 2."""
    return any(file.suffix == ".safetensors" for file in checkpoint_files(Path(path)))


def natural(one: Any) -> list[tuple[int, str]]:
    """Key that sorts names by the numbers in them: blocks.2 before blocks.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", one.name)]


def check_exists(path: str) -> None:
    """Raise unless there is such a file or folder."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist")


def _timm_model(name: str, *, pretrained: bool, seed: int) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        reason = f"{name} is not a file, and models by name need timm"
        raise ImportError(f"{reason}: pip install 'torch_sap[timm]'") from error
    if not name.startswith(HUB) and not timm.is_model(name):
        found = similar(name, timm.list_models())
        hint = f"; similar: {', '.join(found)}" if found else ""
        raise ValueError(f"model must be a file, a folder or the name of a timm model, got {name!r}{hint}")
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(name, pretrained=pretrained)
    return model


def similar(name: str, known: Sequence[str]) -> list[str]:
    """Up to five known names: those that begin with the name, then those that are spelled like it or contain it."""
    begin, inside = [one for one in known if one.startswith(name)], [one for one in known if name in one]
    return list(dict.fromkeys([*begin, *difflib.get_close_matches(name, known), *inside]))[:5]


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
    check_outputs(arguments)
    check_exists(arguments.checkpoint)
    options = {name: getattr(arguments, name) for name in ("exclude", "include", "key", "overwrite")}
    beside = companions(Path(arguments.checkpoint), arguments.out)
    with progress(f"pruning {arguments.checkpoint}") as advance:
        given = arguments.checkpoint, arguments.out, arguments.scope, arguments.rule
        report = prune_checkpoint(*given, **options, advance=advance)
    if is_alphabetical(arguments.checkpoint):
        report = replace(report, tensors=sorted(report.tensors, key=natural))
    rows = []
    for one in (*report.tensors, TensorRecord("overall", (), report.remaining, report.total)):
        counts = {"total": one.total, "remaining": one.remaining, "density": one.density}
        rows.append({"name": one.name, "shape": shape_text(one.shape), **counts})
    titles = {"name": "layer", "shape": "shape", "total": "weights", "remaining": "remaining"}
    titles |= {"density": "remaining %"}
    heading = f"{arguments.out}: {arguments.checkpoint} after one SAP step, {report.scope} scope"
    table = Table(rows, titles, heading, left_out_text(report.left_out), total=True, spare=("shape", "total"))
    content = {"out": str(arguments.out), "copied": beside.copied, "not_copied": beside.left_out, **report.to_dict()}
    give(arguments, content, table)
    if beside.left_out:
        print(f"torch-sap: not copied, since they hold weights: {', '.join(beside.left_out)}", file=sys.stderr)


def report(arguments: Namespace) -> None:
    """Show the rounds of a run. RUN is a folder with history.json, as the benchmarks write it, or such a file.

    Examples:
      torch-sap report runs/test_resnet-digits-global/sap-0
      torch-sap report runs/a --plot a.png --csv a.csv
    """
    check_outputs(arguments)
    run = load_run(arguments.run)
    if arguments.metric is not None:
        run.values(arguments.metric)
    rows = [{**round.row(), "density": round.density} for round in run.history]
    titles = {"round": "round", "remaining": "remaining", "density": "remaining %", "pqi": "PQI"}
    names = dict.fromkeys(name for round in run.history for name in round.metrics)
    measured = {column for row in rows for column in row}  # train_fn's metrics are not of the pruned model
    columns = [column for name in names for column in (name, f"pruned_{name}") if column in measured]
    titles |= {column: column.replace("_", " ") for column in columns}
    shown = choose_metric(list(names), arguments.metric)
    spare = [*(f"pruned_{name}" for name in reversed(names)), *(name for name in reversed(names) if name != shown)]
    table = Table(rows, titles, run.name, spare=[*spare, "pqi", "remaining"])
    content = {"run": run.name, "config": run.config, "rounds": rows}
    give(arguments, content, table, lambda path: run.history.plot(path, metric=arguments.metric))


def compare(arguments: Namespace) -> None:
    """Compare runs by a metric and the share of remaining weights; settings in config.json that differ are shown.

    Examples:
      torch-sap compare runs/test_resnet-digits-global/* --plot runs.png
      torch-sap compare runs/a runs/b --metric accuracy --tolerance 0.02
    """
    check_outputs(arguments)
    runs = [load_run(path) for path in arguments.runs]
    metric = choose_metric(list(runs[0].history[0].metrics), arguments.metric) or "accuracy"
    rows = compare_runs(runs, metric, arguments.tolerance)
    within = f"remaining within {arguments.tolerance:g}"
    titles = {name: name.replace(",", "") for name in rows[0]}
    titles |= {"remaining": "remaining %", within: f"{within.replace(' ', ' % ', 1)}"}
    settings = list(rows[0])[1 : list(rows[0]).index("rounds")]
    spare = [f"{metric}, best", "rounds", *reversed(settings), f"{metric}, first"]
    content = {"metric": metric, "runs": rows}
    give(arguments, content, Table(rows, titles, spare=spare), lambda path: plot_runs(runs, metric, path))


def env(arguments: Namespace) -> None:
    """Show versions and devices, as issues ask for.

    Examples:
      torch-sap env
      torch-sap env --json
    """
    found = environment()
    width = max(map(len, found))
    print(json.dumps(found, indent=2) if arguments.json else "\n".join(f"{k:<{width}}  {v}" for k, v in found.items()))
