"""The contestants of the speed benchmark do equal work."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from helpers import SCOPES, masks_of
from torch import nn

import torch_sap

pytest.importorskip("timm")

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import overhead
import speed


def model_and_report(scope):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 20), nn.Linear(20, 10))
    return model, speed.FUNCTIONS[scope](copy.deepcopy(model))


@pytest.mark.parametrize("scope", SCOPES)
def test_contestants_prune_the_same_entries(scope):
    model, report = model_and_report(scope)
    entrants = speed.contestants(scope, report)
    masks = {}
    with torch.no_grad():
        for name in ("torch_sap", "torch"):
            pruned = copy.deepcopy(model)
            entrants[name](pruned)
            masks[name] = masks_of(pruned)
    assert report.pruned > 0
    for name, mask in masks["torch_sap"].items():
        torch.testing.assert_close(masks["torch"][name], mask)


@pytest.mark.parametrize("scope", SCOPES)
def test_the_literal_formula_prunes_nearly_as_many(scope):
    model, report = model_and_report(scope)
    groups = sum(len(group.c) for group in report.groups.values())
    assert abs(speed.literal(model, scope) - report.pruned) <= groups


def test_the_floor_writes_a_mask_of_every_weight():
    model, report = model_and_report("global")
    assert sum(mask.size for mask in speed.floor(model)) == report.total


def test_overhead_finds_a_pruned_entry_that_is_not_zero():
    model, _ = model_and_report("layer")
    torch_sap.layer_unstructured(model)
    overhead.assert_zeros(model)
    with torch.no_grad():
        model[0].weight_orig.fill_(1.0)
    with pytest.raises(AssertionError, match="not zero"):
        overhead.assert_zeros(model)
