"""Does unstructured sparsity make inference faster on a CPU? Dense, zeros in dense, CSR and ONNX Runtime, in turn.

    python benchmarks/inference.py --quick                                   # one small case
    python benchmarks/inference.py --onnx runs/inference --seconds 0         # export what is missing, time nothing
    python benchmarks/inference.py --onnx runs/inference --out docs/results/inference

Contestants compute the same batch in turn, in random order, in one process with one thread (threads of PyTorch and of
ONNX Runtime that wait for work would slow each other down):

- dense: the model before pruning;
- zeros: the pruned model as `torch_sap.remove` leaves it, ordinary modules with zeros;
- csr: its weights as torch.sparse_csr, `W @ x` for linear layers; PyTorch has no sparse convolution on a CPU, so
  convolutions gather their windows first (im2col) and multiply the CSR matrix with them;
- onnx: the pruned model exported to ONNX, in ONNX Runtime with all its optimisations (extra "onnxruntime").

Before the clock starts the pruned contestants must give the same outputs. Reported are medians, and medians of each
turn's ratio to dense. 2:4 kernels exist for GPUs only and are left out.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from speed import machine, write_csv
from style import COLORS, DPI, LINES, MARKERS, STYLE, WIDTH
from torch import Tensor, nn

import torch_sap

SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.99)
BATCHES = (1, 64)
CONTESTANTS = ("dense", "zeros", "csr", "onnx")


def mlp() -> nn.Module:
    """A classifier of 784 inputs."""
    return nn.Sequential(nn.Linear(784, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10))


def vit_mlp() -> nn.Module:
    """The MLP block of ViT-Ti, for 197 tokens an image."""
    return nn.Sequential(nn.Linear(192, 768), nn.GELU(), nn.Linear(768, 192))


def cnn() -> nn.Module:
    """Three convolutions on 32 x 32 images."""
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.ReLU())


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (784,)),
    "vit_mlp": (vit_mlp, (197, 192)),
    "cnn": (cnn, (3, 32, 32)),
}
"""Model and shape of one input, by name."""


class SparseLinear(nn.Module):
    """A linear layer whose weight is a CSR matrix."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = to_csr(linear.weight), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = torch.sparse.mm(self.weight, rows.t()).t() + self.bias
        return out.reshape(*x.shape[:-1], -1)


class SparseConv2d(nn.Module):
    """A convolution that multiplies its windows with a CSR matrix."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = to_csr(conv.weight.flatten(1)), conv.bias
        self.kernel_size, self.stride, self.padding = conv.kernel_size, conv.stride, conv.padding

    def forward(self, x: Tensor) -> Tensor:
        windows = F.unfold(x, self.kernel_size, stride=self.stride, padding=self.padding)
        columns = windows.transpose(0, 1).reshape(windows.shape[1], -1)
        out = torch.sparse.mm(self.weight, columns) + self.bias[:, None]
        height = (x.shape[2] + 2 * self.padding[0] - self.kernel_size[0]) // self.stride[0] + 1
        return out.view(len(out), len(x), height, -1).transpose(0, 1)


def to_csr(matrix: Tensor) -> Tensor:
    """The CSR form of a matrix."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it is in beta
        return matrix.detach().to_sparse_csr()


def sparse_form(model: nn.Module) -> nn.Module:
    """The model with CSR weights."""
    made: dict[type, Callable[[Any], nn.Module]] = {nn.Linear: SparseLinear, nn.Conv2d: SparseConv2d}
    return nn.Sequential(*(made.get(type(layer), lambda layer: layer)(layer) for layer in model))


def prune_to(model: nn.Module, sparsity: float) -> nn.Module:
    """A copy whose smallest weights of each layer are zeros, as many as asked for."""
    model = copy.deepcopy(model)
    stepper = torch_sap.OneShot(model, ratio=sparsity, scope="layer", rewind="none")
    stepper.step()
    return torch_sap.remove(model)


def onnx_form(model: nn.Module, example: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    """The model in ONNX Runtime, exported to a file unless that exists."""
    import onnxruntime

    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(model, (example,), path, dynamo=True, external_data=False, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def contestants(case: str, sparsity: float, batch: int, folder: Path | None) -> tuple[dict[str, Any], Tensor]:
    """What computes the batch, by name, and the batch; the pruned ones were found to compute the same."""
    build, shape = CASES[case]
    torch.manual_seed(0)
    dense = build().eval()
    x = torch.randn(batch, *shape)
    zeros = prune_to(dense, sparsity)
    entrants: dict[str, Any] = {"dense": dense, "zeros": zeros, "csr": sparse_form(zeros)}
    if folder is not None:
        entrants["onnx"] = onnx_form(zeros, x, folder / f"{case}_{sparsity}_{batch}.onnx")
    expected = zeros(x)
    for name, entrant in entrants.items():
        if name != "dense":
            torch.testing.assert_close(entrant(x), expected, rtol=1e-4, atol=1e-5, msg=f"{name} computes otherwise")
    return entrants, x


def measure(case: str, sparsity: float, batch: int, folder: Path | None, seconds: float) -> list[dict[str, Any]]:
    """Time the contestants in turn for some seconds, at least four turns that count; a row of results each."""
    entrants, x = contestants(case, sparsity, batch, folder)
    times: dict[str, list[float]] = {name: [] for name in entrants}
    end, order = time.perf_counter() + seconds, random.Random(0)
    while seconds and (len(times["dense"]) < 5 or time.perf_counter() < end):
        for name, entrant in order.sample(sorted(entrants.items()), len(entrants)):
            started = time.perf_counter()
            entrant(x)
            times[name].append(time.perf_counter() - started)
    return [
        {
            "case": case,
            "batch": batch,
            "sparsity": sparsity,
            "contestant": name,
            "milliseconds": 1000 * statistics.median(found[1:]),  # the first turn warms up
            "ratio_to_dense": statistics.median(a / b for a, b in zip(found[1:], times["dense"][1:], strict=True)),
            "turns": len(found) - 1,
        }
        for name, found in times.items()
        if found
    ]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time relative to dense against sparsity, a panel for each case and batch."""
    from matplotlib import style
    from matplotlib.figure import Figure

    cases, batches = (list(dict.fromkeys(row[key] for row in rows)) for key in ("case", "batch"))
    with style.context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.3 * len(batches) + 0.4), layout="constrained")
        panels = figure.subplots(len(batches), len(cases), squeeze=False, sharex=True, sharey=True)
        for line, batch in zip(panels, batches, strict=True):
            for axes, case in zip(line, cases, strict=True):
                here = [row for row in rows if (row["case"], row["batch"]) == (case, batch)]
                for number, name in enumerate(n for n in CONTESTANTS if any(row["contestant"] == n for row in here)):
                    points = [(100 * r["sparsity"], r["ratio_to_dense"]) for r in here if r["contestant"] == name]
                    if name != "dense":
                        form = {"color": COLORS[number], "linestyle": LINES[number], "marker": MARKERS[number]}
                        axes.semilogy(*zip(*points, strict=True), markersize=4, label=name, **form)
                axes.axhline(1, color="black", linewidth=0.8)
                axes.set_title(f"{case}, batch {batch}", fontsize="medium")
                axes.set_yticks([0.1, 0.2, 0.5, 1, 2, 5, 10], ["0.1", "0.2", "0.5", "1", "2", "5", "10"])
                axes.set_yticks([], minor=True)
                axes.set_xticks([50, 60, 70, 80, 90, 100], ["50 %", "", "70 %", "", "90 %", ""])
                axes.grid(alpha=0.3)
        figure.supxlabel("pruned weights", fontsize="medium")
        figure.supylabel("time / time of dense", fontsize="medium")
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
        figure.savefig(path, dpi=DPI)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--onnx", type=Path, help="folder of exported models; left out: no ONNX Runtime")
    parser.add_argument("--seconds", type=float, default=1.5, help="for each case, batch and sparsity; 0 times nothing")
    parser.add_argument("--out", type=Path, help="write OUT.csv and OUT.png")
    parser.add_argument("--quick", action="store_true", help="the MLP at one sparsity, a fifth of a second")
    arguments = parser.parse_args()
    sparsities = SPARSITIES
    if arguments.quick:
        arguments.cases, sparsities, arguments.seconds = ["mlp"], (0.9,), 0.2
    torch.set_num_threads(1)
    description = machine("cpu")
    print(description)
    rows = []
    with torch.inference_mode():
        for case in arguments.cases:
            for batch in BATCHES:
                for sparsity in sparsities:
                    for row in measure(case, sparsity, batch, arguments.onnx, arguments.seconds):
                        rows.append(row)
                        print(
                            f"{case:8} batch {batch:3} {sparsity:4.0%} {row['contestant']:6} "
                            f"{row['milliseconds']:9.3f} ms {row['ratio_to_dense']:7.2f} x dense",
                            flush=True,
                        )
    if arguments.out and rows:
        write_csv(rows, arguments.out, description)
        plot(rows, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
