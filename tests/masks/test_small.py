"""Many small tensors are restored together; whatever has changed since the last time is seen."""

import copy
import gc
import weakref

import pytest
import torch
from helpers import assert_held
from torch import nn

from torch_sap import global_unstructured
from torch_sap.masks import small, zeros


def layers(count=10):
    return nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(count)), nn.Linear(6, 3))


def pruned(count=10):
    torch.manual_seed(3)
    model = layers(count)
    global_unstructured(model, eta_r=0.5)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def train(model, optimizer, steps=3):
    for step in range(steps):
        optimizer.zero_grad()
        inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        model(inputs.to(next(model.parameters()).dtype)).square().mean().backward()
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.weight_orig.grad is not None:
                assert not torch.count_nonzero(module.weight_orig.grad[~module.weight_mask])
        optimizer.step()
        assert_held(model)


@pytest.fixture
def restored(monkeypatch):
    """How many times small tensors were restored together."""
    calls, real = [], small.Small.restore

    def restore(self, tensors):
        done = real(self, tensors)
        if done and self.keepers:
            calls.append(len(self.keepers))
        return done

    monkeypatch.setattr(small.Small, "restore", restore)
    return calls


def test_the_same_weights_as_one_by_one(restored, monkeypatch):
    together, alone = pruned(), pruned()
    train(*together)
    assert restored == [10] * (2 + 1 + 2), "after the first forward, the first step and the second backward"
    monkeypatch.setattr(small, "FEW", 1000)
    train(*alone)
    for one, other in zip(together[0].parameters(), alone[0].parameters(), strict=True):
        assert torch.equal(one, other)


def replace_mask(model, optimizer):
    model[2][0].weight_mask = torch.zeros(6, 6, dtype=torch.bool)


def write_into_mask(model, optimizer):
    model[2][0].weight_mask.data.fill_(False)


def replace_weight(model, optimizer):
    model[2][0].weight_orig = nn.Parameter(torch.randn(6, 6))
    optimizer.add_param_group({"params": [model[2][0].weight_orig]})


def convert(model, optimizer):
    model.double()
    optimizer.state.clear()


def convert_one(model, optimizer):
    model[2][0].weight_orig.data = model[2][0].weight_orig.data.double().half().float() + 1


def swap(model, optimizer):
    torch.utils.swap_tensors(model[2][0].weight_orig, nn.Parameter(torch.randn(6, 6)))
    optimizer.state.clear()


def load(model, optimizer):
    state = {key: torch.randn_like(value) if value.is_floating_point() else ~value for key, value in state_of(model)}
    model.load_state_dict(state)


def assign(model, optimizer):
    state = {key: torch.randn_like(value) if value.is_floating_point() else ~value for key, value in state_of(model)}
    model.load_state_dict(state, assign=True)
    optimizer.add_param_group({"params": list(model.parameters())})


def state_of(model):
    return [(key, value.clone()) for key, value in model.state_dict().items()]


def freeze(model, optimizer):
    model[2][0].weight_orig.requires_grad_(False)


def prune_again(model, optimizer):
    global_unstructured(model, eta_r=0.5)


def ruin(model, optimizer):
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight_orig.fill_(float("nan")).masked_fill_(module.weight_mask, 0.5)


CHANGES = [replace_mask, write_into_mask, replace_weight, convert, convert_one, swap, load, assign, freeze, prune_again]


@pytest.mark.parametrize("change", [*CHANGES, ruin], ids=lambda change: change.__name__)
def test_changes_are_seen(change, restored):
    model, optimizer = pruned()
    train(model, optimizer)
    change(model, optimizer)
    restored.clear()
    train(model, optimizer)
    assert restored, "they are restored together again"


@pytest.mark.parametrize("change", [replace_mask, write_into_mask, load, prune_again])
def test_masks_that_changed_within_a_step_count_for_the_gradient(change):
    model, optimizer = pruned()
    train(model, optimizer)
    optimizer.zero_grad()
    loss = model(torch.randn(5, 6)).square().mean()
    change(model, optimizer) if change is not load else model[2][0].weight_mask.copy_(~model[2][0].weight_mask)
    loss.backward()
    for module in (layer[0] for layer in model[:-1]):
        assert not torch.count_nonzero(module.weight_orig.grad[~module.weight_mask])
    optimizer.step()
    assert_held(model)


def test_a_shape_that_changed_is_named():
    model, optimizer = pruned()
    train(model, optimizer)
    model[2][0].weight_orig.data = torch.randn(7, 6)
    with pytest.raises(RuntimeError, match=r"2\.0\.weight must keep its shape \(6, 6\)"):
        train(model, optimizer)


def test_gradients_that_come_in_part(restored):
    model, optimizer = pruned(20)
    for turn in range(6):
        used = nn.Sequential(*list(model)[: 20 if turn % 2 else 12])
        optimizer.zero_grad()
        used(torch.randn(5, 6)).square().mean().backward()
        for layer in model[:-1]:
            if (gradient := layer[0].weight_orig.grad) is not None:
                assert not torch.count_nonzero(gradient[~layer[0].weight_mask])
        optimizer.step()
        assert_held(model)
    assert {12, 20} <= set(restored)


def test_an_optimizer_restores_its_own_weights_alone():
    (model, optimizer), (other, _) = pruned(), pruned()
    dense = layers()
    foreign = torch.optim.SGD(dense.parameters(), lr=0.1)
    for _ in range(3):
        train(model, optimizer, steps=1)
        with torch.no_grad():
            other[0][0].weight_orig.fill_(1)
        dense(torch.randn(5, 6)).sum().backward()
        foreign.step()
        assert bool((other[0][0].weight_orig == 1).all())


def test_a_model_is_freed_while_its_optimizer_lives():
    model, optimizer = pruned()
    train(model, optimizer)
    copied = copy.deepcopy(model)
    gc.collect()
    gc.disable()
    try:
        ends = [weakref.ref(model[1][0]), weakref.ref(model[1][0].weight_mask)]
        del model
        assert [end() for end in ends] == [None, None]
    finally:
        gc.enable()
    assert not zeros._stepped
    train(copied, torch.optim.SGD(copied.parameters(), lr=0.1))
