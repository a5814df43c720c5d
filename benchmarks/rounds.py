"""What a round of iterative pruning costs beside the one-shot function of its scope, up to a language model's size.

    python benchmarks/rounds.py                                   # resnet50, global scope
    python benchmarks/rounds.py --models resnet50 llama --scopes global layer neuron --out docs/results/rounds

On fresh copies of a model, in turn, in one process: the function (``global_unstructured`` and so on), ``SAP(model)``,
``SAP.record`` and ``SAP.step`` (which measures all scopes before and after, prunes and rewinds). Reported are medians,
and the median over the turns of the ratio to the function just before. "llama" is a random Llama of 1.1 billion
bfloat16 weights (transformers' LlamaConfig, hidden size 2048, 22 layers).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from speed import FUNCTIONS, machine, synchronize, write_csv
from torch import nn

import torch_sap

COLUMNS = ("function", "SAP(model)", "record", "step")


def build(name: str, device: str) -> nn.Module:
    """An untrained timm model, or the language model."""
    torch.manual_seed(0)
    if name != "llama":
        return timm.create_model(name).to(device)
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device=device)
    for parameter in model.parameters():
        nn.init.normal_(parameter.data, std=0.02)
    return model


def measure(name: str, scopes: Sequence[str], device: str, turns: int) -> list[dict[str, Any]]:
    """Time the four in each scope, in turn; a row of results each."""
    start = build(name, device)
    times: dict[tuple[str, str], list[float]] = {(scope, column): [] for scope in scopes for column in COLUMNS}

    def timed(scope: str, column: str, work: Callable[[], Any]) -> Any:
        synchronize(device)
        started = time.perf_counter()
        result = work()
        synchronize(device)
        times[scope, column].append(time.perf_counter() - started)
        return result

    for scope in (turns + 1) * list(scopes):
        model = copy.deepcopy(start)
        timed(scope, "function", lambda model=model, scope=scope: FUNCTIONS[scope](model))
        del model
        model = copy.deepcopy(start)
        sap = timed(scope, "SAP(model)", lambda model=model, scope=scope: torch_sap.SAP(model, scope=scope))
        timed(scope, "record", sap.record)
        timed(scope, "step", sap.step)
        del model, sap
    weights = sum(getattr(*pair).numel() for pair in torch_sap.prunable_parameters(start))
    return [
        {
            "model": name,
            "weights": weights,
            "scope": scope,
            "call": column,
            "milliseconds": 1000 * statistics.median(seconds[1:]),  # the first turn warms up
            "ratio_to_function": statistics.median(
                a / b for a, b in zip(seconds[1:], times[scope, "function"][1:], strict=True)
            ),
        }
        for (scope, column), seconds in times.items()
    ]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet50"])
    parser.add_argument("--scopes", nargs="+", default=["global"], choices=list(FUNCTIONS))
    parser.add_argument("--turns", type=int, default=5, help="turns that count")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write OUT.csv")
    arguments = parser.parse_args()
    print(machine(arguments.device))
    rows = []
    for name in arguments.models:
        for row in measure(name, arguments.scopes, arguments.device, arguments.turns):
            rows.append(row)
            print(
                f"{name:12} {row['scope']:7} {row['call']:10} {row['milliseconds']:9.1f} ms "
                f"{row['ratio_to_function']:6.2f} x the function",
                flush=True,
            )
    if arguments.out:
        write_csv(rows, arguments.out, machine(arguments.device))


if __name__ == "__main__":
    main()
