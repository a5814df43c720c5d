"""Which engines make use of a removed model's zeros: file size and time, of a dense and of pruned models.

    pip install coremltools openvino onnxruntime onnx onnxscript        # the first two are in no extra
    python benchmarks/engines.py --out docs/results/engines             # minutes; writes the CSV file
    python benchmarks/engines.py --page                                 # the table of docs/ship.md, from the CSV file

An MLP of 25 million weights, float32, as `torch_sap.remove` leaves it: dense, and with 50 % and 90 % of the smallest
weights of each layer pruned. Each engine writes its own file. Then all of them compute the same batches in turn, in
random order, with one thread; the times are medians. Before the clock starts each output is compared with PyTorch's.
Core ML models are only converted here: they run on Apple's systems.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from inference import onnx_form, prune_to, sparse_form
from pages import DOCS, fill, table
from speed import machine, write_csv
from torch import Tensor, nn

import torch_sap

PAGE = DOCS / "ship.md"
RESULTS = DOCS / "results" / "engines.csv"
SPARSITIES = (0.0, 0.5, 0.9)
BATCHES = (1, 64)
WIDTHS = (1024, 4096, 4096, 1024)
Compute = Callable[[Tensor], Tensor]
Exported = tuple[int, Compute | None]


def mlp(widths: Sequence[int]) -> nn.Module:
    """Linear layers with ReLU between them."""
    torch.manual_seed(0)
    layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).eval()


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())


def pytorch(model: nn.Module, example: Tensor, folder: Path) -> Exported:
    """Ordinary modules; zeros are stored and multiplied like other numbers."""
    torch.save(model.state_dict(), folder / "dense.pt")
    return size(folder / "dense.pt"), model


def pytorch_csr(model: nn.Module, example: Tensor, folder: Path) -> Exported:
    """Weights as torch.sparse_csr; 8-byte positions beside 4-byte values."""
    sparse = sparse_form(model)
    torch.save([(layer.weight, layer.bias) for layer in sparse if hasattr(layer, "weight")], folder / "csr.pt")
    return size(folder / "csr.pt"), sparse


def sparse_file(model: nn.Module, example: Tensor, folder: Path) -> Exported:
    """The file of save_sparse, which is loaded into ordinary modules."""
    torch_sap.save_sparse(model, folder / "sparse.safetensors")
    return size(folder / "sparse.safetensors"), None


def onnxruntime(model: nn.Module, example: Tensor, folder: Path) -> Exported:
    """An ONNX file in ONNX Runtime, one session per batch size."""
    sessions = {batch: onnx_form(model, example[:1].expand(batch, -1), folder / f"{batch}.onnx") for batch in BATCHES}
    return size(folder / "1.onnx"), lambda x: sessions[len(x)](x)


def openvino(model: nn.Module, example: Tensor, folder: Path, **properties: Any) -> Exported:
    """OpenVINO on the CPU, compiled per batch size."""
    import openvino as ov

    converted = ov.convert_model(model, example_input=example)
    ov.save_model(converted, folder / "openvino.xml", compress_to_fp16=False)
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32", **properties}
    compiled = {}
    for batch in BATCHES:
        converted.reshape([batch, *example.shape[1:]])
        compiled[batch] = ov.Core().compile_model(converted, "CPU", settings)
    return size(folder / "openvino.bin"), lambda x: torch.from_numpy(compiled[len(x)](x.numpy())[0])


def openvino_sparse(model: nn.Module, example: Tensor, folder: Path) -> Exported:
    """OpenVINO, asked to compress weights of which at least half are zeros."""
    return openvino(model, example, folder, CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE=0.5)


def coreml(model: nn.Module, example: Tensor, folder: Path, pipeline: str = "DEFAULT") -> Exported:
    """A Core ML package."""
    import coremltools

    converted = coremltools.convert(
        torch.jit.trace(model, example[:1]),
        inputs=[coremltools.TensorType(shape=example[:1].shape)],
        compute_precision=coremltools.precision.FLOAT32,
        minimum_deployment_target=coremltools.target.iOS16,  # older formats have no sparse weights: they are left dense
        pass_pipeline=getattr(coremltools.PassPipeline, pipeline),
    )
    converted.save(str(folder / "model.mlpackage"))
    return size(folder / "model.mlpackage"), None


def coreml_sparse(model: nn.Module, example: Tensor, folder: Path) -> Exported:
    """A Core ML package whose weights are stored without their zeros."""
    return coreml(model, example, folder, "DEFAULT_PRUNING")


ENGINES: dict[str, tuple[str, Callable[..., Exported]]] = {
    "PyTorch": ("torch", pytorch),
    "PyTorch, CSR weights": ("torch", pytorch_csr),
    "`save_sparse`": ("torch", sparse_file),
    "ONNX Runtime": ("onnxruntime", onnxruntime),
    "OpenVINO": ("openvino", openvino),
    "OpenVINO, sparse decompression": ("openvino", openvino_sparse),
    "Core ML": ("coremltools", coreml),
    "Core ML, `DEFAULT_PRUNING`": ("coremltools", coreml_sparse),
}
"""The package of each engine and what writes its file, by name."""
ON_PAGE = ("PyTorch", "PyTorch, CSR weights", "ONNX Runtime", "OpenVINO", "Core ML, `DEFAULT_PRUNING`")
"""Not those that differ from one of these in nothing but an option, nor save_sparse, which computes nothing."""


def measure(names: Sequence[str], seconds: float, widths: Sequence[int] = WIDTHS) -> list[dict[str, Any]]:
    """Export every model to every engine and time them in turn; a row per engine and sparsity."""
    dense, example = mlp(widths), torch.randn(max(BATCHES), widths[0])
    rows: list[dict[str, Any]] = []
    computing: list[tuple[dict[str, Any], Compute]] = []
    with tempfile.TemporaryDirectory() as root, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters, about their own parts
        for sparsity in SPARSITIES:
            model = prune_to(dense, sparsity) if sparsity else dense
            for number, name in enumerate(names):
                package, export = ENGINES[name]
                folder = Path(root, f"{number}-{sparsity}")
                folder.mkdir()
                file_size, compute = export(model, example, folder)
                made_with = f"{package} {version(package)}"
                rows.append({"engine": name, "sparsity": sparsity, "bytes": file_size, "version": made_with})
                if compute is not None:
                    torch.testing.assert_close(compute(example), model(example), rtol=1e-3, atol=1e-4)
                    computing.append((rows[-1], compute))
        for batch in BATCHES:
            x, order = example[:batch].contiguous(), random.Random(0)
            times: list[list[float]] = [[] for _ in computing]
            end = time.perf_counter() + seconds
            while len(times[0]) < 4 or time.perf_counter() < end:
                for place in order.sample(range(len(computing)), len(computing)):
                    started = time.perf_counter()
                    computing[place][1](x)
                    times[place].append(time.perf_counter() - started)
            for (row, _), found in zip(computing, times, strict=True):
                row[f"milliseconds_{batch}"] = 1000 * statistics.median(found[1:])  # the first turn warms up
    return [{**row, "date": date.today().isoformat()} for row in rows]


def table_of(rows: Sequence[dict[str, str]]) -> str:
    """The table of the page: a line per engine, sizes at each sparsity, times of the dense model and at 90 %."""
    head = ["engine", "MB: dense, 50\u00a0%, 90\u00a0%", "ms, 1 input: dense, 90\u00a0%", "ms, 64 inputs"]
    lines = []
    for name in ON_PAGE:
        dense, half, most = (row for row in rows if row["engine"] == name)
        sizes = [int(row["bytes"]) / 1e6 for row in (dense, half, most)]
        times = [[row[f"milliseconds_{batch}"] for row in (dense, most)] for batch in BATCHES]
        shown = [",\u00a0".join(f"{float(value):.1f}" for value in found if value) for found in (sizes, *times)]
        lines.append([name, *shown])
    return table(head, lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--seconds", type=float, default=40.0, help="for each batch size")
    parser.add_argument("--out", type=Path, help="write OUT.csv")
    parser.add_argument("--page", action="store_true", help="measure nothing; fill docs/ship.md from the CSV file")
    arguments = parser.parse_args()
    if arguments.page:
        with open(RESULTS, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), {"engines": table_of(rows)}), encoding="utf-8")
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    with torch.inference_mode():
        rows = measure(arguments.engines, arguments.seconds)
    for row in rows:
        times = [f"{row[key]:8.2f} ms" for key in map("milliseconds_{}".format, BATCHES) if key in row]
        print(f"{row['engine']:32} {row['sparsity']:4.0%} {row['bytes'] / 1e6:8.2f} MB", *times)
    if arguments.out:
        write_csv(rows, arguments.out, machine("cpu"))


if __name__ == "__main__":
    main()
