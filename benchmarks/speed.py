"""How long a pruning step takes, and how much memory, beside PyTorch's and a literal implementation of the paper.

    python benchmarks/speed.py --quick                  # the first step of resnet50: under a minute
    python benchmarks/speed.py --out docs/results/speed # two models, three scopes, as committed
    python benchmarks/speed.py --models convnext_base vit_large_patch16_224 --contestants torch_sap floor
    python benchmarks/speed.py --device cuda

All contestants prune the same number of entries of fresh copies of the same model, in turn, in one process; what is
reported are medians over the rounds of turns, and medians of each round's ratio to torch_sap. Extra memory is the peak
of resident memory above what the model took, in a process of its own for each (on a GPU of allocated memory).

- global: `torch.nn.utils.prune.global_unstructured` with L1Unstructured and the count that torch_sap found;
- layer: `torch.nn.utils.prune.l1_unstructured`, tensor by tensor, with the counts that torch_sap found;
- neuron: each tensor's rows ranked by `torch.sort`, with the counts that torch_sap found;
- literal: the paper's formula in float32 as one would write it down: mask, norms, sort, for each group;
- floor: every weight read once and a mask of its shape written once, which no method can do without.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from style import COLORS, DPI, LINES, MARKERS, STYLE, WIDTH
from torch import Tensor, nn
from torch.nn.utils import prune

import torch_sap
from torch_sap.records.report import PruningReport

FUNCTIONS = {
    "global": torch_sap.global_unstructured,
    "layer": torch_sap.layer_unstructured,
    "neuron": torch_sap.neuron_unstructured,
}
MODELS = ["resnet50", "vit_base_patch16_224"]
CONTESTANTS = ["torch_sap", "torch", "literal", "floor"]
Contestant = Callable[[nn.Module], Any]


@lru_cache(maxsize=1)
def untrained(name: str, device: str) -> nn.Module:
    """An untrained timm model, made once."""
    torch.manual_seed(0)
    return timm.create_model(name).to(device)  # type: ignore[no-any-return]


def build(name: str, sparsity: float, device: str) -> nn.Module:
    """An untrained timm model; its smallest weights are pruned already if a sparsity is given."""
    model = copy.deepcopy(untrained(name, device))
    if sparsity:
        parameters = torch_sap.prunable_parameters(model)
        with torch.no_grad():
            for module, attribute in parameters:
                weight = getattr(module, attribute)
                order = weight.abs().flatten().kthvalue(max(1, int(sparsity * weight.numel()))).values
                prune.custom_from_mask(module, attribute, weight.abs() > order)
    return model


def in_place(model: nn.Module) -> nn.Module:
    """The model with its masks held as torch_sap does, without pruning anything: gamma = 0."""
    torch_sap.global_unstructured(model, gamma=0.0)
    return model


def contestants(scope: str, report: PruningReport) -> dict[str, Contestant]:
    """What is timed in a scope, by name; torch_sap first."""
    counts = {name: group.c for name, group in report.groups.items()}
    ours: dict[str, Contestant] = {"torch_sap": FUNCTIONS[scope]}
    if scope == "global":
        ours["torch"] = lambda model: prune.global_unstructured(
            torch_sap.prunable_parameters(model), prune.L1Unstructured, amount=int(counts["global"][0])
        )
    elif scope == "layer":
        ours["torch"] = lambda model: l1_each(model, [int(c[0]) for c in counts.values()])
    else:
        ours["torch"] = lambda model: sort_rows(model, list(counts.values()))
    ours["literal"] = lambda model: literal(model, scope)
    if scope == "global":
        ours["floor"] = floor
    return ours


def l1_each(model: nn.Module, counts: list[int]) -> None:
    """PyTorch's own method, one tensor after the other."""
    for (module, name), count in zip(torch_sap.prunable_parameters(model), counts, strict=True):
        prune.l1_unstructured(module, name, amount=count)


def current(module: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """A weight and its mask, as PyTorch's methods see them."""
    weight = getattr(module, name).detach()
    return weight, getattr(module, name + "_mask", torch.ones_like(weight))


def sort_rows(model: nn.Module, counts: list[np.ndarray]) -> None:
    """Prune the given number of smallest entries of each row, ranked by torch.sort."""
    for (module, name), count in zip(torch_sap.prunable_parameters(model), counts, strict=True):
        weight, mask = current(module, name)
        rows = weight.flatten(1).abs().masked_fill(mask.flatten(1) == 0, torch.inf)
        order = rows.sort(dim=1, stable=True).indices
        places = torch.arange(rows.shape[1], device=rows.device)
        drop = places < torch.as_tensor(count, device=rows.device)[:, None]
        new = mask.flatten(1).scatter(1, order, (~drop).to(mask.dtype)) * mask.flatten(1)
        prune.custom_from_mask(module, name, new.view_as(weight))


def literal(model: nn.Module, scope: str, p: float = 0.5, q: float = 1.0, beta: float = 0.9) -> int:
    """The paper's formulas in the weights' own type, group by group; returns how many entries it prunes."""
    pairs = torch_sap.prunable_parameters(model)
    found = [current(*pair) for pair in pairs]
    if scope == "global":
        flat = torch.cat([weight.flatten() for weight, _ in found])
        masks = [torch.cat([mask.flatten() for _, mask in found])]
        groups = [flat]
    elif scope == "layer":
        groups, masks = [w.flatten() for w, _ in found], [m.flatten() for _, m in found]
    else:
        groups = [row for weight, _ in found for row in weight.flatten(1)]
        masks = [row for _, mask in found for row in mask.flatten(1)]
    pruned = 0
    for group, mask in zip(groups, masks, strict=True):
        kept = group[mask != 0]
        d = kept.numel()
        if d == 0 or not kept.any():
            continue
        index = 1 - d ** (1 / q - 1 / p) * torch.linalg.vector_norm(kept, p) / torch.linalg.vector_norm(kept, q)
        r = d * (1 - index) ** (p * q / (q - p))
        count = int(d * torch.clamp(1 - r / d, max=beta))
        threshold = kept.abs().sort().values[max(count - 1, 0)]
        torch.gt(group.abs(), threshold)  # the new mask
        pruned += count
    return pruned


def floor(model: nn.Module) -> list[Any]:
    """Read every weight once, write masks that stay once."""
    weights = [current_weight(*pair) for pair in torch_sap.prunable_parameters(model)]
    return [np.greater(weight.numpy(), 0.01) if weight.is_cpu else torch.gt(weight, 0.01) for weight in weights]


def current_weight(module: nn.Module, name: str) -> Tensor:
    """A weight as it is stored."""
    weight: Tensor = getattr(module, name + "_orig", None)
    return (getattr(module, name) if weight is None else weight).detach()


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device != "cpu":
        torch.cuda.synchronize()


def start_state(name: str, sparsity: float, device: str, contestant: str) -> nn.Module:
    """The model that a contestant starts from: in its own form if it is pruned already."""
    model = build(name, sparsity, device)
    return in_place(model) if sparsity and contestant == "torch_sap" else model


def measure(
    name: str, scope: str, sparsity: float, device: str, rounds: int, chosen: list[str], *, memory: bool
) -> Iterator[dict[str, Any]]:
    """Time the contestants in turn; a row of results each."""
    report = FUNCTIONS[scope](start_state(name, sparsity, device, "torch_sap"))
    entrants = {key: entrant for key, entrant in contestants(scope, report).items() if key in chosen}
    starts = {key: start_state(name, sparsity, device, key) for key in entrants}
    times: dict[str, list[float]] = {key: [] for key in entrants}
    for turn in range(rounds + 1):
        for key, contestant in entrants.items():
            with torch.no_grad():
                model = copy.deepcopy(starts[key])
                synchronize(device)
                started = time.perf_counter()
                contestant(model)
                synchronize(device)
            if turn:  # the first turn warms up
                times[key].append(time.perf_counter() - started)
            del model
    for key in entrants:
        yield {
            "model": name,
            "weights": report.total,
            "scope": scope,
            "sparsity": sparsity,
            "contestant": key,
            "pruned": report.pruned,
            "milliseconds": 1000 * statistics.median(times[key]),
            "ratio_to_torch_sap": statistics.median(a / b for a, b in zip(times[key], times["torch_sap"], strict=True)),
            "extra_mib": peak_memory(name, scope, sparsity, device, key) if memory else float("nan"),
        }


def peak_memory(name: str, scope: str, sparsity: float, device: str, contestant: str) -> float:
    """Peak memory of one call above what was there before, in MiB; for the CPU measured in a process of its own."""
    if device != "cpu":
        return extra_memory(name, scope, sparsity, device, contestant)
    arguments = json.dumps([name, scope, sparsity, device, contestant])
    done = subprocess.run(
        [sys.executable, __file__, "--memory-of", arguments], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def extra_memory(name: str, scope: str, sparsity: float, device: str, contestant: str) -> float:
    """Peak memory of one call in this process above what was there before, in MiB."""
    report = FUNCTIONS[scope](start_state(name, sparsity, device, "torch_sap"))
    entrant = contestants(scope, report)[contestant]
    model = start_state(name, sparsity, device, contestant)
    with torch.no_grad():
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            entrant(model)
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident("VmRSS")
        entrant(model)
        return (resident("VmHWM") - before) / 1024


def resident(field: str) -> int:
    """A line of /proc/self/status, in KiB."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1])


def machine(device: str) -> str:
    """What the figures were taken on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    cpu = f"{names[0]}, {len(names)} cores, {torch.get_num_threads()} threads" if names else platform.processor()
    gpu = "" if device == "cpu" else f"; {torch.cuda.get_device_name()}"
    return f"{cpu}{gpu}; Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--scopes", nargs="+", default=list(FUNCTIONS), choices=list(FUNCTIONS))
    parser.add_argument("--contestants", nargs="+", default=CONTESTANTS, choices=CONTESTANTS)
    parser.add_argument("--rounds", type=int, default=7, help="turns that count")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write OUT.csv and OUT.png")
    parser.add_argument("--quick", action="store_true", help="resnet50, global, first step, three turns, no memory")
    parser.add_argument("--memory-of", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(extra_memory(*arguments.memory_of))
        return
    if arguments.quick:
        arguments.models, arguments.scopes, arguments.rounds = ["resnet50"], ["global"], 3
    print(machine(arguments.device))
    rows = []
    for name in arguments.models:
        for sparsity in (0.0,) if arguments.quick else (0.0, 0.6):
            for scope in arguments.scopes:
                memory = not arguments.quick and not sparsity
                how = arguments.device, arguments.rounds, arguments.contestants
                for row in measure(name, scope, sparsity, *how, memory=memory):
                    rows.append(row)
                    print(
                        f"{name:24} {scope:7} {sparsity:4.0%} {row['contestant']:10} {row['milliseconds']:9.1f} ms "
                        f"{row['ratio_to_torch_sap']:7.2f} x {row['extra_mib']:9.1f} MiB",
                        flush=True,
                    )
    if arguments.out:
        write(rows, arguments.out, machine(arguments.device))


def write_csv(rows: list[dict[str, Any]], out: Path, description: str) -> None:
    """The rows as OUT.csv, with the machine in every row; their columns are those of the longest row."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_suffix(".csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*max(rows, key=len), "machine"])
        writer.writeheader()
        writer.writerows({**row, "machine": description} for row in rows)


def write(rows: list[dict[str, Any]], out: Path, description: str) -> None:
    """The rows as CSV (with the machine in every row) and as a figure."""
    write_csv(rows, out, description)
    plot(rows, out.with_suffix(".png"), description)


def plot(rows: list[dict[str, Any]], path: Path, description: str) -> None:
    """Time of a first step against the number of weights, a panel for each scope."""
    import matplotlib.style
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    first = [row for row in rows if row["sparsity"] == 0]
    scopes, names = (list(dict.fromkeys(row[key] for row in first)) for key in ("scope", "contestant"))
    with matplotlib.style.context(STYLE, after_reset=True):
        figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
        panels = figure.subplots(1, len(scopes), sharey=True, squeeze=False)[0]
        for axes, scope in zip(panels, scopes, strict=True):
            for name, color, style, marker in zip(names, COLORS, LINES, MARKERS, strict=False):
                here = [row for row in first if (row["scope"], row["contestant"]) == (scope, name)]
                points = sorted((row["weights"] / 1e6, row["milliseconds"]) for row in here)
                if points:
                    axes.loglog(*zip(*points, strict=True), color=color, linestyle=style, marker=marker, label=name)
            axes.set_title(f"{scope} scope, first step", fontsize="small")
            axes.set_xlabel("million weights")
            axes.tick_params(axis="x", labelsize="x-small")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.grid(alpha=0.3)
        panels[0].set_ylabel("milliseconds")
        panels[0].yaxis.set_major_formatter("{x:,.0f}")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
        figure.suptitle(description, fontsize="x-small")
        figure.savefig(path, dpi=DPI)


if __name__ == "__main__":
    main()
