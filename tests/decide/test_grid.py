"""Counts and masks of the whole-model functions equal the literal reference on every case of a grid."""

import itertools

import numpy as np
import pytest
import reference
import torch
from helpers import (
    FUNCTIONS,
    SCOPES,
    ZOO_TRANSPOSED,
    arrays,
    assert_held,
    lookup,
    masks_of,
    value_of,
    weight_names,
    zoo,
)
from torch import nn
from torch.nn.utils import prune

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
KEPT = {"none": 1.0, "some": 0.7, "most": 0.15}
ARGUMENTS = [
    {"p": p, "q": q, "eta_r": eta_r, "gamma": gamma, "beta": beta}
    for (p, q), eta_r, gamma, beta in itertools.product(
        reference.PQ_PAIRS, [0.0, 0.05, 1.0], [0.5, 1.0, 4.0], [0.3, 0.9]
    )
]
each_scope = pytest.mark.parametrize("scope", SCOPES)


def prepared(dtype, kept, seed=0):
    """The zoo with some entries pruned by PyTorch's own method before."""
    model, generator = zoo(dtype), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in weight_names(model):
            if kept < 1:
                mask = torch.rand(value_of(model, name).shape, generator=generator) < kept
                mask[0] = mask[0] & (mask.sum() < 0)  # the first row is gone entirely
                prune.custom_from_mask(*lookup(model, name), mask.to(dtype))
    return model


def check(model, scope, arguments, transposed=ZOO_TRANSPOSED):
    """Prune the model and compare masks, counts and the report with the reference; returns the report."""
    weights, masks = arrays(model)
    expected, records = reference.prune(weights, masks, scope, transposed=transposed, **arguments)
    report = FUNCTIONS[scope](model, **arguments)
    assert list(report.groups) == list(records)
    for name, group in report.groups.items():
        wanted = records[name]
        assert group.c.tolist() == [record.c for record in wanted], (name, arguments)
        assert group.d.tolist() == [record.d for record in wanted], name
        np.testing.assert_allclose(group.index, [record.index for record in wanted], rtol=0, atol=1e-12)
        alive = [place for place, record in enumerate(wanted) if record.d and not np.isnan(record.index)]
        np.testing.assert_allclose(group.r[alive], [wanted[place].r for place in alive], rtol=1e-10)
    for name, mask in masks_of(model).items():
        np.testing.assert_array_equal(mask.numpy(), expected[name], err_msg=f"{name} {arguments}")
    return report


@each_scope
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_case_of_the_grid(scope, kept, dtype):
    counts = set()
    for arguments in ARGUMENTS:
        model = prepared(dtype, KEPT[kept])
        report = check(model, scope, arguments)
        counts.add(report.pruned)
    assert len(counts) > 5, "the arguments make a difference"


@each_scope
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_rounds_on_one_model(scope, dtype):
    model = zoo(dtype)
    remaining = []
    for _ in range(5):
        report = check(model, scope, {"eta_r": 0.3, "beta": 0.6})
        remaining.append(report.remaining)
        assert_held(model)
    assert remaining == sorted(remaining, reverse=True)
    assert len(set(remaining)) == 5


def fill_rounded(weight):
    weight.copy_(weight.mul(4).round())


def fill_checkerboard(weight):
    weight.copy_((torch.arange(weight.numel()) % 3 - 1.0).reshape(weight.shape))


def fill_live_zeros(weight):
    weight.mul_(torch.arange(weight.numel()).reshape(weight.shape) % 2)


def fill_one(weight):
    weight.zero_()
    weight.view(-1)[weight.numel() // 2] = -1.0


FILLS = {
    "rounded": fill_rounded,
    "checkerboard": fill_checkerboard,
    "live zeros": fill_live_zeros,
    "constant": lambda weight: weight.fill_(-0.3),
    "all zero": lambda weight: weight.zero_(),
    "tiny": lambda weight: weight.mul_(1e-30),
    "first row zero": lambda weight: weight[0].zero_(),
    "last row only": lambda weight: weight[:-1].zero_(),
}


@each_scope
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kept", ["none", "some"])
def test_ties_zeros_and_constants(scope, fill, dtype, kept):
    model = prepared(dtype, KEPT[kept])
    with torch.no_grad():
        for name in weight_names(model):
            FILLS[fill](value_of(model, name))
    # eta_r = 0.2 would put r of a constant tensor on an integer, where float64 decides by its last bit
    for arguments in ({"eta_r": 0.21}, {"p": 1.0, "q": 2.0, "gamma": 2.0, "beta": 0.5}):
        check(model, scope, arguments)


@each_scope
def test_sparse_values_tie_at_zero_and_are_still_pruned(scope):
    model = nn.Sequential(nn.Linear(40, 10, bias=False))
    with torch.no_grad():
        model[0].weight.mul_(torch.rand(10, 40) < 0.3)
    zeros = int((model[0].weight == 0).sum())
    report = check(model, scope, {"gamma": 0.5})
    assert 0 < report.pruned < zeros


@each_scope
def test_only_some_groups_are_zero(scope):
    model = zoo()
    with torch.no_grad():
        model["linear"].weight.zero_()
        model["conv"].weight[2].zero_()
    report = check(model, scope, {"eta_r": 0.5})
    assert report.pruned > 0
    if scope == "layer":
        assert report.groups["linear.weight"].c.tolist() == [0]


@each_scope
def test_channels_last(scope):
    model = nn.Sequential(nn.Conv2d(4, 5, 3), nn.ConvTranspose2d(4, 6, 2, groups=2)).to(
        memory_format=torch.channels_last
    )
    assert not model[0].weight.is_contiguous()
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(layer.weight.mul(8).round())
    for _ in range(2):
        check(model, scope, {"eta_r": 0.2}, transposed={"1.weight": 2})
        assert_held(model)


@each_scope
def test_transposed_weights_that_are_not_contiguous(scope):
    model = nn.Sequential(nn.Linear(6, 8))
    model[0].weight = nn.Parameter(torch.randn(6, 8).mul(3).round().t())
    check(model, scope, {"eta_r": 0.2})


def tied():
    model = nn.ModuleDict({"embedding": nn.Embedding(8, 5), "middle": nn.Linear(5, 5), "head": nn.Linear(5, 8)})
    model["head"].weight = model["embedding"].weight
    return model


@each_scope
def test_shared_weights_count_once_and_are_masked_everywhere(scope):
    model = tied()
    for _ in range(2):
        report = check(model, scope, {"eta_r": 0.3})
    assert [tensor.name for tensor in report.tensors] == ["embedding.weight", "middle.weight"]
    assert report.total == 40 + 25
    assert report.remaining == sum(int(mask.sum()) for mask in masks_of(model).values())
    assert model["head"].weight_orig is model["embedding"].weight_orig
    assert torch.equal(model["head"].weight, model["embedding"].weight)
    assert torch.equal(model["head"].weight_mask, model["embedding"].weight_mask)


@each_scope
def test_importance_scores(scope):
    model, scores = (
        zoo(),
        {name: torch.randn_like(value_of(zoo(), name)) for name in ("linear.weight", "grouped.weight")},
    )
    weights, masks = arrays(model)
    by_name = {name: score.double().numpy() for name, score in scores.items()}
    arguments = {"transposed": ZOO_TRANSPOSED, "eta_r": 0.4}
    expected, records = reference.prune(weights, masks, scope, scores=by_name, **arguments)
    plain, _ = reference.prune(weights, masks, scope, **arguments)
    by_pair = {lookup(model, name): score for name, score in scores.items()}
    report = FUNCTIONS[scope](model, eta_r=0.4, importance_scores=by_pair)
    for name, mask in masks_of(model).items():
        np.testing.assert_array_equal(mask.numpy(), expected[name], err_msg=name)
    assert not np.array_equal(expected["linear.weight"], plain["linear.weight"])
    assert {name: group.c.tolist() for name, group in report.groups.items()} == {
        name: [record.c for record in group] for name, group in records.items()
    }


@each_scope
def test_what_is_read_is_the_stored_weight_not_the_stale_product(scope):
    """After a step under PyTorch's own hooks, module.weight is stale until the next forward."""
    model = prepared(torch.float32, KEPT["some"])
    with torch.no_grad():
        for name in weight_names(model):
            value_of(model, name).copy_(torch.randn_like(value_of(model, name)))
    check(model, scope, {"eta_r": 0.3})


@each_scope
def test_entries_that_a_mask_hides_do_not_count_whatever_they_hold(scope):
    model = prepared(torch.float32, KEPT["some"])
    with torch.no_grad():
        for name in weight_names(model):
            value_of(model, name)[~masks_of(model)[name]] = 1e6
    check(model, scope, {"eta_r": 0.3})
