"""The contestants of speed.py do equal work, and overhead.py checks its zeros."""

import copy

import pytest
import torch
from helpers import SCOPES, masks_of
from torch import nn

import torch_sap

pytest.importorskip("timm")

import overhead
import speed


@pytest.mark.parametrize("scope", SCOPES)
def test_contestants_do_equal_work(scope):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 20), nn.Linear(20, 10))
    report = speed.FUNCTIONS[scope](copy.deepcopy(model))
    entrants, masks = speed.contestants(scope, report), {}
    with torch.no_grad():
        for name in ("torch_sap", "torch"):
            pruned = copy.deepcopy(model)
            entrants[name](pruned)
            masks[name] = masks_of(pruned)
    assert report.pruned > 0
    for name, mask in masks["torch_sap"].items():
        torch.testing.assert_close(masks["torch"][name], mask)
    groups = sum(len(group.c) for group in report.groups.values())
    assert abs(speed.literal(model, scope) - report.pruned) <= groups
    assert sum(mask.size for mask in speed.floor(model)) == report.total


def test_overhead_finds_a_pruned_entry_that_is_not_zero():
    model = nn.Sequential(nn.Linear(20, 10))
    torch_sap.layer_unstructured(model)
    overhead.assert_zeros(model)
    with torch.no_grad():
        model[0].weight_orig.fill_(1.0)
    with pytest.raises(AssertionError, match="not zero"):
        overhead.assert_zeros(model)


def test_the_picture_tells_the_contestants_apart_without_color(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **settings: drawn.append(figure))
    contestants = ("torch_sap", "torch", "literal", "floor")
    rows = [
        {"scope": scope, "contestant": name, "weights": weights, "milliseconds": weights * place, "sparsity": 0.0}
        for scope in ("global", "layer")
        for place, name in enumerate(contestants, 1)
        for weights in (10, 20)
        if (scope, name) != ("layer", "floor")
    ]
    speed.plot(rows, tmp_path / "speed.png", "this machine")
    lines = [axes.get_lines() for axes in drawn[0].axes]
    assert [[line.get_label() for line in panel] for panel in lines] == [list(contestants), list(contestants[:3])]
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines[0]}) == len(contestants)
