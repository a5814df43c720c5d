"""Algorithm 1: what is pruned in each round, rewinding, nesting, repeatability, structure."""

import copy
import itertools

import numpy as np
import pytest
import reference
import torch
from helpers import (
    SCOPES,
    arrays,
    assert_held,
    assert_unchanged,
    convnet,
    fit,
    mask_of,
    masks_of,
    mlp,
    snapshot,
    value_of,
    weight_names,
)
from torch import nn

from torch_sap import SAP, iterative_sap

ARGUMENTS = {"p": 0.5, "q": 1.0, "eta_r": 0.05, "gamma": 1.0, "beta": 0.6}
MODELS = {"mlp": (mlp, (6, 6)), "convnet": (convnet, (6, 2, 6, 6))}
each_scope = pytest.mark.parametrize("scope", SCOPES)
each_model = pytest.mark.parametrize("kind", MODELS)


def trainer(shape, steps=4):
    """A train_fn with an optimizer of its own and other data each time; `seen` keeps what it was given."""

    def train(model):
        train.rounds += 1
        fit(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), shape, steps=steps, seed=train.rounds)

    train.rounds = 0
    return train


def state_without_masks(model):
    return {key.removesuffix("_orig"): value.clone() for key, value in model.state_dict().items() if "_mask" not in key}


def assert_rewound(model, start, masks):
    for key, value in state_without_masks(model).items():
        expected = torch.where(masks[key], start[key], 0) if key in masks else start[key]
        assert torch.equal(value, expected), key


@each_scope
@each_model
def test_every_round_starts_bitwise_from_the_start(scope, kind):
    (make, shape), seen = MODELS[kind], []
    model, start, train = make(), state_without_masks(make()), trainer(shape)

    def checked(given):
        assert given is model
        masks = masks_of(model)
        assert_rewound(model, start, masks)
        seen.append((masks, list(model.state_dict()), [id(value) for value in model.parameters()]))
        train(model)
        assert_held(model, pruned=len(seen) > 1)

    history = iterative_sap(model, checked, iterations=5, scope=scope, **ARGUMENTS)
    assert len(history) == len(seen) == 6
    for (before, keys, identities), (after, later_keys, later_identities) in itertools.pairwise(seen):
        assert keys == later_keys
        assert identities == later_identities
        assert not any((after[name] & ~before[name]).any() for name in before), "masks are nested"
        assert sum(int(mask.sum()) for mask in after.values()) < sum(int(mask.sum()) for mask in before.values())
    assert [id(value) for value in model.parameters()] == seen[0][2]
    assert all(torch.equal(mask, seen[-1][0][name]) for name, mask in masks_of(model).items())
    assert not torch.equal(value_of(model, weight_names(model)[0]), start[weight_names(model)[0]]), "left trained"
    assert_held(model)


@each_scope
def test_counts_and_masks_of_each_round_are_the_reference(scope):
    model = convnet()
    sap, train = SAP(model, scope=scope, **ARGUMENTS), trainer((6, 2, 6, 6))
    for number in range(4):
        train(model)
        weights, masks = arrays(model)
        expected, records = reference.prune(weights, masks, scope, **ARGUMENTS)
        record = sap.step()
        assert (record.number, record.scope, record.hyperparameters) == (number, scope, ARGUMENTS)
        assert list(record.groups) == list(records)
        for name, group in record.groups.items():
            assert group.c.tolist() == [wanted.c for wanted in records[name]]
            assert group.d.tolist() == [wanted.d for wanted in records[name]]
            np.testing.assert_allclose(group.index, [wanted.index for wanted in records[name]], rtol=0, atol=1e-12)
        for name, mask in masks_of(model).items():
            np.testing.assert_array_equal(mask.numpy(), expected[name])
        for tensors, kept in ((record.tensors, masks), (record.tensors_after, expected)):
            assert {tensor.name: tensor.remaining for tensor in tensors} == {name: kept[name].sum() for name in kept}
        assert record.pruned_count == sum(int(group.c.sum()) for group in record.groups.values()) > 0
        assert record.remaining == sum(int(mask.sum()) for mask in masks.values())
        assert record.density == pytest.approx(record.remaining / record.total)


@each_scope
def test_a_round_measures_the_retrained_and_the_pruned_model_at_all_scopes(scope):
    model = convnet()
    sap, train = SAP(model, scope=scope, gini=True, **ARGUMENTS), trainer((6, 2, 6, 6))
    train(model)
    weights, masks = arrays(model)
    expected, _ = reference.prune(weights, masks, scope, **ARGUMENTS)
    record = sap.step()
    for measured, kept in ((record.retrained, masks), (record.pruned, expected)):
        assert_measures(measured.pqi, weights, kept, lambda values: reference.pq_index(values, 0.5, 1.0))
        assert_measures(measured.gini, weights, kept, reference.gini_index)
    assert record.pqi == pytest.approx(record.retrained.pqi["global"]["global"][0])
    assert SAP(convnet()).record().retrained.gini is None


def assert_measures(measures, weights, masks, plain):
    alive = {name: weight[masks[name]] for name, weight in weights.items()}
    assert measures["global"]["global"].tolist() == pytest.approx(
        [plain(np.concatenate(list(alive.values())))], abs=1e-12
    )
    assert list(measures["layer"]) == list(measures["neuron"]) == list(weights)
    for name, weight in weights.items():
        assert measures["layer"][name].tolist() == pytest.approx([plain(alive[name])], abs=1e-12)
        rows = [plain(row[mask]) for row, mask in zip(weight, masks[name], strict=True)]
        np.testing.assert_allclose(measures["neuron"][name], rows, rtol=0, atol=1e-12)


def test_the_last_round_is_measured_and_not_pruned():
    model, masks = mlp(), []
    history = iterative_sap(
        model, trainer((6, 6)), iterations=2, callback=lambda _: masks.append(masks_of(model)), **ARGUMENTS
    )
    assert [record.number for record in history] == [0, 1, 2]
    assert [record.pruned_count > 0 for record in history] == [True, True, False]
    assert all((group.c == 0).all() for group in history[-1].groups.values())
    assert all(torch.equal(masks[1][name], mask) for name, mask in masks[2].items())
    for before, after in itertools.pairwise(history):
        assert after.remaining == before.remaining - before.pruned_count
        assert after.tensors == before.tensors_after


@each_scope
def test_two_runs_with_one_seed_are_identical(scope):
    def run():
        torch.manual_seed(11)
        model = convnet()
        history = iterative_sap(model, trainer((6, 2, 6, 6)), iterations=3, scope=scope, **ARGUMENTS)
        return model, history

    (first, history), (second, other) = run(), run()
    for (key, value), again in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(value, again), key
    for record, again in zip(history, other, strict=True):
        assert record.retrained.pqi["layer"] == again.retrained.pqi["layer"]
        assert all(group.c.tolist() == again.groups[name].c.tolist() for name, group in record.groups.items())


def test_rewinding_is_by_copy_and_the_kept_state_does_not_drift():
    model, start = mlp(), state_without_masks(mlp())
    sap, train = SAP(model, **ARGUMENTS), trainer((6, 6))
    for _ in range(4):
        train(model)
        assert not torch.equal(model[1].running_mean, start["1.running_mean"])
        sap.step()
        assert_rewound(model, start, masks_of(model))
        assert int(model[1].num_batches_tracked) == 0


def test_rewind_none_goes_on_from_the_trained_weights():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sap = SAP(model, rewind="none", optimizer=optimizer, **ARGUMENTS)
    for seed in range(3):
        fit(model, optimizer, (6, 6), seed=seed)
        trained, momentum = state_without_masks(model), len(optimizer.state)
        sap.step()
        assert_rewound(model, trained, masks_of(model))
        assert len(optimizer.state) == momentum > 0
    assert_held(model)


@pytest.mark.parametrize("live", [False, True], ids=["copied", "live tensors"])
def test_rewinding_to_a_state_dict(live):
    model = mlp()
    train = trainer((6, 6))
    train(model)
    state = model.state_dict() if live else copy.deepcopy(model.state_dict())
    start = copy.deepcopy(state)
    sap = SAP(model, rewind=state, **ARGUMENTS)
    for _ in range(3):
        train(model)
        sap.step()
        assert_rewound(model, start, masks_of(model))
    assert live or all(torch.equal(value, start[key]) for key, value in state.items())


def test_late_rewinding_inside_training():
    model, points = mlp(), []
    sap, train = SAP(model, **ARGUMENTS), trainer((6, 6))
    for number in range(3):
        train(model)
        if number == 0:
            sap.set_rewind_point()
            points.append(state_without_masks(model))
            train(model)
        sap.step()
        assert_rewound(model, points[0], masks_of(model))
    train(model)
    sap.set_rewind_point()
    points.append(state_without_masks(model))
    train(model)
    sap.step()
    assert_rewound(model, points[1], masks_of(model))


@pytest.mark.parametrize("make", [lambda values: torch.optim.SGD(values, lr=0.1, momentum=0.9), torch.optim.AdamW])
def test_optimizer_state_is_cleared_on_rewinding(make):
    model = mlp()
    optimizer = make(model.parameters())
    sap = SAP(model, optimizer=optimizer, **ARGUMENTS)
    groups = [[id(value) for value in group["params"]] for group in optimizer.param_groups]
    for seed in range(3):
        fit(model, optimizer, (6, 6), seed=seed)
        assert optimizer.state
        sap.step()
        assert not optimizer.state
        assert [[id(value) for value in group["params"]] for group in optimizer.param_groups] == groups
        assert_held(model)


def test_optimizers_that_fill_their_state_when_they_are_made_get_it_back():
    """Adagrad starts with sums, as timm's adahessian does with step counts; neither can step without them."""
    model = mlp()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05, initial_accumulator_value=0.25)
    sap = SAP(model, optimizer=optimizer, **ARGUMENTS)
    for seed in range(2):
        fit(model, optimizer, (6, 6), seed=seed)
        sap.step()
        sums = [state["sum"] for state in optimizer.state.values()]
        assert len(sums) == len(list(model.parameters()))
        assert all((value == 0.25).all() for value in sums)


def test_one_optimizer_for_all_rounds_trains_like_a_fresh_one():
    model, other = mlp(), mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    saps = SAP(model, optimizer=optimizer, **ARGUMENTS), SAP(other, **ARGUMENTS)
    for seed in range(3):
        losses = fit(model, optimizer, (6, 6), seed=seed)
        assert losses == fit(other, torch.optim.AdamW(other.parameters(), lr=0.05), (6, 6), seed=seed)
        assert saps[0].step().pruned_count == saps[1].step().pruned_count


def test_making_a_stepper_prunes_nothing():
    model, inputs = mlp(), torch.randn(6, 6)
    expected = mlp()(inputs)
    SAP(model)
    assert torch.equal(model(inputs), expected)
    assert all(mask.all() for mask in masks_of(model).values())


def test_a_model_pruned_before_keeps_its_zeros_and_counts_the_rest():
    model = mlp()
    nn.utils.prune.l1_unstructured(model[0], "weight", 0.5)
    before = mask_of(model, "0.weight").clone()
    history = iterative_sap(model, trainer((6, 6)), iterations=2, **ARGUMENTS)
    assert history[0].groups["0.weight"].d.tolist() == [int(before.sum())]
    assert not (mask_of(model, "0.weight") & ~before).any()


def test_exclude_leaves_tensors_dense_and_they_are_rewound_too():
    model, start = mlp(), state_without_masks(mlp())
    sap, train = SAP(model, exclude="3", **ARGUMENTS), trainer((6, 6))
    for _ in range(2):
        train(model)
        record = sap.step()
    assert [tensor.name for tensor in record.tensors] == ["0.weight"]
    assert "3.weight" in model.state_dict()
    assert_rewound(model, start, masks_of(model))


def test_sap_leaves_everything_as_it_was_when_refused():
    model = mlp()
    sap = SAP(model, **ARGUMENTS)
    trainer((6, 6))(model)
    sap.step()
    before = snapshot(model)
    for arguments in ({"metrics": "high"}, {"eval_fn": 3}):
        with pytest.raises((TypeError, ValueError), match=next(iter(arguments))):
            sap.step(**arguments)
        assert_unchanged(model, before)
        assert len(sap.history) == 1
