"""Saving, loading and copying pruned timm models in the middle of training, which continues bitwise."""

import copy
import io

import pytest
import torch
from helpers import assert_held, assert_unchanged, masks_of, snapshot, value_of, weight_names
from timm_training import (
    Hand,
    assert_same_training,
    batches,
    each_kind,
    make,
    optim,
    plain_step,
    timm,
)

from torch_sap import SAP, layer_unstructured, remove


def through_a_file(thing, **how):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, **how)


def go_on(model, optimizer, seed=8):
    """Losses of two more rounds."""
    losses = []
    for number in (seed, seed + 1):
        losses += [plain_step(model, optimizer, inputs, Hand(model)) for inputs in batches(2, seed=number)]
        assert_held(model)
        layer_unstructured(model, eta_r=0.1)
    return losses


def started(kind):
    model = make(kind)
    layer_unstructured(model, eta_r=0.2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for inputs in batches(2):
        plain_step(model, optimizer, inputs, Hand(model))
    return model, optimizer


@each_kind
@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts(kind, assign):
    """torch.load(weights_only=True) into a fresh model that has the form, with its optimizer's state."""
    model, optimizer = started(kind)
    states = through_a_file([model.state_dict(), optimizer.state_dict()], weights_only=True)
    other = make(kind)
    layer_unstructured(other, gamma=0)
    other.load_state_dict(states[0], assign=assign)
    resumed = torch.optim.AdamW(other.parameters(), lr=1e-3)
    resumed.load_state_dict(states[1])
    assert all(torch.equal(mask, masks_of(other)[name]) for name, mask in masks_of(model).items())
    assert go_on(other, resumed) == go_on(model, optimizer)
    assert_same_state(other, model)


@each_kind
def test_whole_modules(kind):
    """torch.save(model) and torch.load(weights_only=False), with the optimizer in the same file."""
    model, optimizer = started(kind)
    other, resumed = through_a_file([model, optimizer], weights_only=False)
    assert not {id(parameter) for parameter in other.parameters()} & {id(parameter) for parameter in model.parameters()}
    assert go_on(other, resumed) == go_on(model, optimizer)
    assert_same_state(other, model)


def assert_same_state(model, other):
    assert list(model.state_dict()) == list(other.state_dict())
    for name, value in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_resuming_with_the_functions_of_timm(kind, tmp_path):
    """Its CheckpointSaver and resume_checkpoint, with the average that they save too, and SAP's state beside."""

    def scripted(offset=0.0):
        model = make(kind)
        with torch.no_grad():
            model.get_parameter(weight_names(model)[0]).add_(offset)  # another start, so another point to rewind to
        optimizer = optim.create_optimizer_v2(model, "adamw", lr=1e-3)
        sap = SAP(model, eta_r=0.1, optimizer=optimizer)
        return model, optimizer, sap, timm.utils.ModelEmaV3(model, decay=0.5)

    def round_of(model, optimizer, sap, average, number):
        for inputs in batches(2, seed=number):
            plain_step(model, optimizer, inputs, Hand(model))
            average.update(model)
        sap.step()

    first = scripted()
    for number in range(2):
        round_of(*first, number)
    saver = timm.utils.CheckpointSaver(
        first[0], first[1], model_ema=first[3], checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path)
    )
    saver.save_checkpoint(1, metric=0.5)
    sap_state = through_a_file(first[2].state_dict(), weights_only=True)
    second = scripted(offset=0.5)
    path = str(tmp_path / "last.pth.tar")
    assert timm.models.resume_checkpoint(second[0], path, optimizer=second[1], log_info=False) == 2
    timm.models.load_checkpoint(second[3].module, path, use_ema=True)
    second[2].load_state_dict(sap_state)
    for each in (first, second):
        round_of(*each, 2)
    assert [found.to_dict()["tensors"] for found in second[2].history] == [
        found.to_dict()["tensors"] for found in first[2].history
    ]
    assert_same_state(second[0], first[0])
    for each in (first, second):
        each[3](batches(1)[0])  # a forward gives an average the zeros of the latest pruning
    assert_same_state(second[3].module, first[3].module)
    assert second[2].history[-1].remaining == first[2].history[-1].remaining < first[2].history[-1].total


@each_kind
def test_the_state_after_remove_loads_into_a_plain_timm_model(kind):
    model, _ = started(kind)
    zeros = {name: int((~mask).sum()) for name, mask in masks_of(model).items()}
    state = through_a_file(remove(model).state_dict(), weights_only=True)
    fresh = make(kind)
    assert list(state) == list(fresh.state_dict())
    fresh.load_state_dict(state)
    inputs = batches(1)[0]
    assert torch.equal(fresh.eval()(inputs), model.eval()(inputs))
    for name in weight_names(fresh):
        assert int((value_of(fresh, name) == 0).sum()) == zeros[name] > 0


@each_kind
def test_a_copy_and_its_model_are_trained_and_pruned_apart(kind):
    model, optimizer = started(kind)
    other = copy.deepcopy(model)
    before = snapshot(other)
    go_on(model, optimizer)
    assert_unchanged(other, before)
    dense = make(kind)
    dense.load_state_dict(remove(copy.deepcopy(other)).state_dict())
    masks = masks_of(model)
    assert_same_training(other, dense)
    assert all(torch.equal(mask, masks[name]) for name, mask in masks_of(model).items())
    assert any(not torch.equal(mask, masks[name]) for name, mask in masks_of(other).items())
