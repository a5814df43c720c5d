"""Mixed precision and channels_last on pruned timm models: bitwise as masked by hand."""

import copy

import pytest
import torch
from helpers import FUNCTIONS, SCOPES, assert_held, masks_of, value_of, weight_names
from timm_training import (
    Hand,
    assert_same_training,
    batches,
    convolutional,
    each_kind,
    loss_of,
    make,
    momentum,
    twins,
)

from torch_sap import layer_unstructured

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@each_kind
def test_autocast_in_bf16(kind):
    def step(model, optimizer, inputs, hand):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, inputs)
        loss.backward()
        hand.gradients()
        optimizer.step()
        hand.weights()
        return loss.item()

    model, dense = twins(kind)
    assert_same_training(model, dense, step)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("half", HALVES)
@each_kind
def test_grad_scaler(kind, half):
    """The scaler of timm's and PyTorch's scripts: scale, unscale, clip, a step that may be skipped."""
    scalers, scales = {}, []

    def step(model, optimizer, inputs, hand):
        scaler = scalers.setdefault(model, torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2))
        optimizer.zero_grad()
        with torch.autocast("cpu", HALVES[half]):
            loss = loss_of(model, inputs)
        scaler.scale(loss).backward()
        hand.gradients()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        hand.weights()
        scaler.update()
        scales.append(scaler.get_scale())
        return loss.item(), str(norm.item())  # nan where the gradients overflow, and the step is skipped

    assert_same_training(*twins(kind), step)
    assert len(set(scales)) > 1
    assert scales[::2] == scales[1::2]


@each_kind
def test_a_step_that_the_scaler_skips(kind):
    model = make(kind)
    optimizer, scaler = momentum(model), torch.amp.GradScaler("cpu", init_scale=2.0**8)
    good, overflow = batches(2)
    overflow[0, 0, 0, 0] = float("inf")
    for inputs in (good, overflow, good):
        layer_unstructured(model, eta_r=0.2)
        before = {name: value_of(model, name).clone() for name in weight_names(model)}
        optimizer.zero_grad()
        scaler.scale(loss_of(model, inputs)).backward()
        scaler.step(optimizer)
        scaler.update()
        skipped = all(torch.equal(value_of(model, name), value) for name, value in before.items())
        assert skipped == (inputs is overflow)
        assert_held(model)
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.nan_to_num_()  # batch-norm has seen the infinity, as in a dense model
    assert scaler.get_scale() == 2.0**7


@convolutional
@pytest.mark.parametrize("made", ["before", "after"])
def test_channels_last(kind, made):
    """The memory format changes neither the masks nor the training, and pruning does not change the format."""
    model, dense = twins(kind)
    if made == "after":
        layer_unstructured(model, eta_r=0.1)
        Hand(dense, masks_of(model)).weights()
    for each in (model, dense):
        each.to(memory_format=torch.channels_last)

    def step(model, optimizer, inputs, hand):
        optimizer.zero_grad()
        loss = loss_of(model, inputs.to(memory_format=torch.channels_last))
        loss.backward()
        hand.gradients()
        optimizer.step()
        hand.weights()
        return loss.item()

    assert_same_training(model, dense, step)
    images = [value_of(model, name) for name in weight_names(model) if value_of(model, name).dim() == 4]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in images)
    assert any(not weight.is_contiguous() for weight in images)


@convolutional
@pytest.mark.parametrize("scope", SCOPES)
def test_channels_last_gets_the_masks_of_a_contiguous_model(kind, scope):
    model = make(kind)
    with torch.no_grad():
        for parameter in model.parameters():  # few values, so that ties are broken by position
            parameter.copy_((parameter * 20).round() / 20)
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    for _ in range(2):
        for each in (model, other):
            FUNCTIONS[scope](each, eta_r=0.1)
        assert all(torch.equal(mask, masks_of(other)[name]) for name, mask in masks_of(model).items())
