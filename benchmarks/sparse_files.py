"""Size of a pruned model on disk, and time to save and load it, compared with PyTorch's own files.

    python benchmarks/sparse_files.py --out docs/results/sparse_files.csv

Models are pruned to a given sparsity in every layer. Each file is written and read in turn, into a new model that is
not part of the time; the results are medians. Loaded models are compared bit for bit.

- torch.save, dense: the state_dict after `torch_sap.remove`, `torch.load`, `load_state_dict`;
- torch.save, pruned: the state_dict with its masks, into a model that already has masks;
- save_sparse, load_sparse: values and bits;
- gzip of dense: the dense file compressed by gzip (level 6).
"""

from __future__ import annotations

import argparse
import copy
import gzip
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from speed import machine, write_csv
from torch import nn

import torch_sap

MODELS = ["resnet50", "vit_small_patch16_224"]


def pruned_to(name: str, sparsity: float) -> nn.Module:
    """An untrained timm model, pruned in every layer."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    torch_sap.OneShot(model, ratio=sparsity, scope="layer", rewind="none").step()
    return model


def masked(name: str) -> nn.Module:
    """A new model with masks of ones."""
    model = timm.create_model(name)
    torch_sap.global_unstructured(model, gamma=0.0)
    return model


def load_state(model: nn.Module, path: Path) -> None:
    """Load one of PyTorch's own files, as users do."""
    model.load_state_dict(torch.load(path))


def seconds_of(work: Callable[[], Any]) -> float:
    """Time a call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(name: str, sparsity: float, turns: int, folder: Path) -> list[dict[str, Any]]:
    """Write and read each kind of file in turn; one row of results per kind."""
    model = pruned_to(name, sparsity)
    plain = torch_sap.remove(copy.deepcopy(model))
    kinds: dict[str, tuple[Callable[[Path], Any], Callable[[], nn.Module], Callable[[nn.Module, Path], Any], Any]] = {
        "torch.save, dense": (
            lambda path: torch.save(plain.state_dict(), path),
            lambda: timm.create_model(name),
            load_state,
            plain,
        ),
        "torch.save, pruned": (
            lambda path: torch.save(model.state_dict(), path),
            lambda: masked(name),
            load_state,
            model,
        ),
        "save_sparse": (
            lambda path: torch_sap.save_sparse(model, path),
            lambda: timm.create_model(name),
            torch_sap.load_sparse,
            model,
        ),
    }
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for _ in range(turns):
        for kind, (save, make, load, expected) in kinds.items():
            path, fresh = folder / kind, make()
            times[kind].append((seconds_of(lambda: save(path)), seconds_of(lambda: load(fresh, path))))  # noqa: B023
            assert_same(fresh, expected)
    packed = folder / "gzip"
    with open(folder / "torch.save, dense", "rb") as source, gzip.open(packed, "wb", compresslevel=6) as target:
        shutil.copyfileobj(source, target)
    dense = (folder / "torch.save, dense").stat().st_size
    rows = [{"kind": "gzip of dense", "bytes": packed.stat().st_size}]
    for kind, found in times.items():
        save_seconds, load_seconds = (1000 * statistics.median(column) for column in zip(*found, strict=True))
        size = (folder / kind).stat().st_size
        rows.append({"kind": kind, "bytes": size, "save_ms": save_seconds, "load_ms": load_seconds})
    return [{"model": name, "sparsity": sparsity, **row, "share_of_dense": row["bytes"] / dense} for row in rows]


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    """Raise unless two models are equal bit for bit."""
    one, other = model.state_dict(), expected.state_dict()
    if list(one) != list(other):
        raise AssertionError("other keys")
    for key, value in one.items():
        if not torch.equal(value.reshape(-1).view(torch.uint8), other[key].reshape(-1).view(torch.uint8)):
            raise AssertionError(f"{key} has other bits")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.9])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write a CSV file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    description = machine("cpu")
    print(description)
    rows = []
    for name in arguments.models:
        for sparsity in arguments.sparsities:
            with tempfile.TemporaryDirectory() as folder:
                for row in measure(name, sparsity, arguments.turns, Path(folder)):
                    rows.append(row)
                    times = [f"{key} {row[key]:7.1f}" for key in ("save_ms", "load_ms") if key in row]
                    size = f"{row['bytes'] / 1e6:8.2f} MB {row['share_of_dense']:6.3f} of dense"
                    print(f"{name:24} {sparsity:4.0%} {row['kind']:20} {size}", *times, flush=True)
    if arguments.out:
        write_csv(rows, arguments.out, description)


if __name__ == "__main__":
    main()
