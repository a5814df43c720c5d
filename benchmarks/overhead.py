"""What masks cost while training: a training step of a pruned model beside the dense one's.

    python benchmarks/overhead.py --quick                        # a few steps
    python benchmarks/overhead.py --out docs/results/overhead    # as committed
    python benchmarks/overhead.py --device cuda --models resnet18 vit_tiny_patch16_224 resnet50
    python benchmarks/overhead.py --device cuda --models resnet50 --amp    # float16 and a GradScaler
    python benchmarks/overhead.py --models tiny tiny240 --threads 1 --cpu-time   # Python time per layer

Four copies of a model take a step (forward, backward, optimizer) in turn, in one process: dense, dense again (what the
measurement itself is worth), pruned by torch_sap, and pruned at the same counts by PyTorch's hooks. Reported are
medians, and the median over the turns of the ratio to the dense step just before. After every step of the pruned model
its zeros are checked, outside the clock. "tiny" is 60 layers Linear(8, 8), where all that counts is Python: there the
contestants take ten steps each in turn, and what masks add per layer and step is reported too.
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
from speed import machine, synchronize, write_csv
from torch import Tensor, nn
from torch.nn.utils import prune

import torch_sap

CASES = {
    "tiny": (4, 8),
    "tiny240": (4, 8),
    "resnet18": (16, 64),
    "vit_tiny_patch16_224": (8, 224),
    "resnet50": (64, 224),
    "vit_base_patch16_224": (32, 224),
}
"""Images per batch and their side, by model; for "tiny" (60 layers) and "tiny240" rows and features. All but the last
two are so small that a GPU waits for Python all the time."""

BLOCK = 10
"""Steps of a turn of "tiny"."""

MODELS = ["tiny", "resnet18", "vit_tiny_patch16_224"]

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=5e-4),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
}


def contestants(name: str, device: str) -> dict[str, nn.Module]:
    """The same model dense, pruned in place by torch_sap, and pruned at the same counts by PyTorch."""
    torch.manual_seed(0)
    if name.startswith("tiny"):
        layers = int(name.removeprefix("tiny") or 60)
        dense: nn.Module = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(layers))).to(device)
    else:
        dense = timm.create_model(name, num_classes=10).to(device).train()
    again, ours, theirs = (copy.deepcopy(dense) for _ in range(3))
    torch_sap.layer_unstructured(ours, gamma=3.0)
    for (module, attribute), mask in zip(torch_sap.prunable_parameters(theirs), masks_of(ours), strict=True):
        prune.custom_from_mask(module, attribute, mask.to(torch.float32))
    return {"dense": dense, "dense again": again, "torch_sap": ours, "torch": theirs}


def masks_of(model: nn.Module) -> list[Tensor]:
    """The masks of a pruned model, in the order of its prunable parameters."""
    return [getattr(module, name + "_mask") for module, name in torch_sap.prunable_parameters(model)]


def stepper(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], *, amp: bool
) -> Callable[[], None]:
    """One training step; with ``amp`` in float16 where autocast says so, with scaled gradients."""
    device = batch[0].device.type
    scaler = torch.amp.GradScaler(device, enabled=amp)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16, enabled=amp):
            loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def assert_zeros(model: nn.Module) -> None:
    """Every pruned entry is exactly zero."""
    for module, name in torch_sap.prunable_parameters(model):
        pruned = getattr(module, name)[~getattr(module, name + "_mask")]
        if torch.count_nonzero(pruned):
            raise AssertionError(f"{name} of {module} has pruned entries that are not zero")


def measure(
    name: str, optimizer: str, device: str, turns: int, *, amp: bool = False, cpu_time: bool = False
) -> list[dict[str, Any]]:
    """Time the contestants in turn; a row of results each."""
    clock = time.process_time if cpu_time else time.perf_counter
    batch_size, side = CASES[name]
    shape = (batch_size, side) if name.startswith("tiny") else (batch_size, 3, side, side)
    batch = torch.randn(shape, device=device), torch.arange(batch_size, device=device) % 8
    block = BLOCK if name.startswith("tiny") else 1
    models = contestants(name, device)
    steps = {
        key: stepper(model, OPTIMIZERS[optimizer](model.parameters()), batch, amp=amp) for key, model in models.items()
    }
    times: dict[str, list[float]] = {key: [] for key in models}
    for turn in range(turns + 2):
        for key, step in steps.items():
            synchronize(device)
            started = clock()
            for _ in range(block):
                step()
            synchronize(device)
            if turn > 1:  # the first turns warm up
                times[key].append((clock() - started) / block)
        assert_zeros(models["torch_sap"])
    pruned = len(masks_of(models["torch_sap"]))
    dense = [(a + b) / 2 for a, b in zip(times["dense"], times["dense again"], strict=True)]
    added = {key: statistics.median(a - b for a, b in zip(times[key], dense, strict=True)) for key in models}
    return [
        {
            "model": name,
            "optimizer": optimizer,
            "batch": batch_size,
            "side": side,
            "precision": "amp" if amp else "float32",
            "contestant": key,
            "milliseconds": 1000 * statistics.median(times[key]),
            "ratio_to_dense": statistics.median(a / b for a, b in zip(times[key], times["dense"], strict=True)),
            "microseconds_per_layer": 1e6 * added[key] / pruned,
        }
        for key in models
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=list(CASES))
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=list(OPTIMIZERS))
    parser.add_argument("--turns", type=int, default=40, help="steps that count")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", action="store_true", help="automatic mixed precision")
    parser.add_argument("--cpu-time", action="store_true", help="time of the process, where others use the machine")
    parser.add_argument("--out", type=Path, help="write OUT.csv")
    parser.add_argument("--quick", action="store_true", help="resnet18 and SGD, ten turns")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.models, arguments.optimizers, arguments.turns = ["resnet18"], ["sgd"], 10
    torch.set_num_threads(arguments.threads)
    print(machine(arguments.device))
    rows = []
    for name in arguments.models:
        for optimizer in arguments.optimizers:
            for row in measure(
                name, optimizer, arguments.device, arguments.turns, amp=arguments.amp, cpu_time=arguments.cpu_time
            ):
                rows.append(row)
                print(
                    f"{name:22} {optimizer:6} {row['contestant']:11} {row['milliseconds']:8.1f} ms "
                    f"{row['ratio_to_dense']:6.3f} x dense {row['microseconds_per_layer']:+9.1f} us per layer",
                    flush=True,
                )
    if arguments.out:
        write_csv(rows, arguments.out, machine(arguments.device))


if __name__ == "__main__":
    main()
