"""Zeros are restored bit by bit: in pieces on the host, and all together as on a device."""

import copy

import pytest
import torch
from helpers import FUNCTIONS, SCOPES, assert_held, fit, masked_by_hand, masks_of, mlp, value_of, weight_names

from torch_sap.decide import keys
from torch_sap.masks import zeros


@pytest.fixture
def as_on_a_device(monkeypatch):
    """No tensor says that it is on the host, so that the computation of other devices is done, and little at a time."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda tensor: False), raising=False)
    monkeypatch.setattr(keys, "DEVICE_CHUNK", 50)


@pytest.mark.parametrize("chunk", [5, 2**22])
@pytest.mark.parametrize("memory", ["contiguous", "channels_last", "with gaps"])
@pytest.mark.parametrize("dtype", keys.INTEGER_OF)
def test_whatever_is_there_becomes_positive_zero(dtype, memory, chunk, monkeypatch):
    monkeypatch.setattr(zeros, "TORCH_CHUNK", chunk)
    tensor = torch.randn(3, 4, 2, 6).to(dtype)
    if memory == "channels_last":
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    elif memory == "with gaps":
        tensor = tensor[..., ::2]
    mask = torch.rand(tensor.shape) > 0.5
    kept = tensor[mask].clone()
    tensor[~mask] = torch.tensor([float("nan"), float("-inf"), -0.0, 1.0]).to(dtype).repeat(99)[: int((~mask).sum())]
    zeros.restore_zeros_(tensor, mask)
    assert torch.equal(tensor[mask], kept)
    assert not torch.count_nonzero(tensor[~mask].view(keys.INTEGER_OF[dtype]))


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
@pytest.mark.parametrize("scope", SCOPES)
def test_training_as_on_a_device_is_masking_by_hand(scope, make):
    """With an optimizer from before the pruning, whose momentum would move pruned entries."""
    model, shape = mlp(), (8, 6)
    keywords = {"momentum": 0.9} if make is not torch.optim.AdamW else {}
    dense = copy.deepcopy(model)
    optimizers = [make(each.parameters(), lr=0.01, **keywords) for each in (model, dense)]
    for each, optimizer in zip((model, dense), optimizers, strict=True):
        fit(each, optimizer, shape)
    for number in range(3):
        FUNCTIONS[scope](model, eta_r=0.1)
        masked_by_hand(dense, masks_of(model))
        losses = [
            fit(each, optimizer, shape, masks=masks, seed=number)
            for each, optimizer, masks in zip((model, dense), optimizers, (None, masks_of(model)), strict=True)
        ]
        assert losses[0] == losses[1]
        assert_held(model)
        for name in weight_names(dense):
            assert torch.equal(value_of(model, name), value_of(dense, name))


@pytest.mark.usefixtures("as_on_a_device")
def test_a_write_that_nobody_counts_is_undone_as_on_a_device():
    model = mlp()
    FUNCTIONS["layer"](model, eta_r=0.5)
    expected = model.eval()(torch.ones(2, 6))
    for name, mask in masks_of(model).items():
        value_of(model, name).data[~mask] = 7.0
    assert torch.equal(model(torch.ones(2, 6)), expected)
    assert_held(model)
