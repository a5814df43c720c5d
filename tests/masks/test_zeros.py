"""Zeros are restored, bit by bit, after every write that a hook can see, and gradients are masked."""

import pytest
import torch
from helpers import (
    TRAINABLE,
    assert_held,
    fit,
    half_pruned,
    mask_of,
    masked_by_hand,
    masks_of,
    mlp,
    value_of,
    weight_names,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from torch_sap import global_unstructured, layer_unstructured, neuron_unstructured
from torch_sap.decide import keys
from torch_sap.masks import zeros

each_model = pytest.mark.parametrize("kind", TRAINABLE)
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1),
    "adam fused": lambda parameters: torch.optim.Adam(parameters, lr=0.02, fused=True),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, momentum=0.9, foreach=True),
}
each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


@pytest.mark.parametrize(("size", "chunk"), [(0, 5), (0, 2**22), (2**9, 2**22)])
@pytest.mark.parametrize("count", [1, 20])
@pytest.mark.parametrize("memory", ["contiguous", "channels_last", "with gaps"])
@pytest.mark.parametrize("dtype", keys.INTEGER_OF)
def test_any_value_becomes_positive_zero(dtype, memory, count, size, chunk, monkeypatch):
    monkeypatch.setattr(zeros, "SIZE", size)
    monkeypatch.setattr(zeros, "CHUNK", chunk)
    bad = torch.tensor([float("nan"), float("-inf"), -0.0, 1.0]).to(dtype).repeat(99)
    pairs, kept = [], []
    for _ in range(count):
        tensor = torch.randn(3, 4, 2, 6).to(dtype)
        if memory == "channels_last":
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        elif memory == "with gaps":
            tensor = tensor[..., ::2]
        mask = torch.rand(tensor.shape) > 0.5
        kept.append(tensor[mask].clone())
        tensor[~mask] = bad[: int((~mask).sum())]
        pairs.append((tensor, mask))
    zeros.restore_zeros_(pairs)
    for (tensor, mask), own in zip(pairs, kept, strict=True):
        assert torch.equal(tensor[mask], own)
        assert not torch.count_nonzero(tensor[~mask].view(keys.INTEGER_OF[dtype]))


@pytest.mark.parametrize("count", [1, 20])
def test_masks_of_another_shape_are_refused(count):
    """One of shape (1, 6) could be broadcast with a tensor of shape (6, 1)."""
    with pytest.raises(RuntimeError, match=r"mask of shape \(1, 6\) for a tensor of shape \(6, 1\)"):
        zeros.restore_zeros_([(torch.ones(6, 1), torch.zeros(1, 6, dtype=torch.bool)) for _ in range(count)])


@pytest.mark.parametrize("count", [1, 20])
def test_autograd_does_not_see_it(count):
    weights = [nn.Parameter(torch.randn(3, 4)) for _ in range(count)]
    loss = sum(weight.square().sum() for weight in weights)
    zeros.restore_zeros_([(weight, torch.rand(3, 4) > 0.5) for weight in weights])
    loss.backward()
    assert all(weight._version == 0 and weight.is_leaf and weight.requires_grad for weight in weights)


def assert_same_weights(model, dense):
    for name, value in dense.named_parameters():
        stored = value_of(model, name) if name in weight_names(dense) else dict(model.named_parameters())[name]
        assert torch.equal(stored, value), name


@each_model
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("made", ["before", "after"])
def test_training_equals_training_masked_by_hand(kind, optimizer, made):
    make, shape = TRAINABLE[kind]
    model, dense = make(), make()
    early = [OPTIMIZERS[optimizer](each.parameters()) for each in (model, dense)]
    assert fit(model, early[0], shape) == fit(dense, early[1], shape)
    layer_unstructured(model, eta_r=0.5)
    masks = masks_of(model)
    masked_by_hand(dense, masks)
    late = [OPTIMIZERS[optimizer](each.parameters()) for each in (model, dense)]
    ours, theirs = early if made == "before" else late
    assert fit(model, ours, shape, seed=7) == fit(dense, theirs, shape, masks=masks, seed=7)
    assert_same_weights(model, dense)
    assert_held(model)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zeros_after_every_single_step(optimizer):
    model, shape = mlp(), (5, 6)
    made = OPTIMIZERS[optimizer](model.parameters())
    fit(model, made, shape)
    for round_number in range(3):
        neuron_unstructured(model, eta_r=0.3)
        for step in range(3):
            fit(model, made, shape, steps=1, seed=10 * round_number + step)
            assert_held(model)


def test_closures_that_accumulate():
    model, shape = half_pruned()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    inputs = torch.randn(shape)

    def closure():
        optimizer.zero_grad()
        for part in inputs.split(2):
            model(torch.cat([part, part])).square().mean().backward()
        return model(inputs).square().mean()

    optimizer.step(closure)
    assert_held(model)


@each_model
def test_gradient_is_masked(kind):
    model, shape = half_pruned(kind)
    make, _ = TRAINABLE[kind]
    dense, inputs = masked_by_hand(make(), masks_of(model)), torch.randn(shape)
    for each in (model, dense):
        for _ in range(2):
            each(inputs).square().mean().backward()
    for name in weight_names(dense):
        own, mask = dict(model.named_parameters())[name + "_orig"].grad, mask_of(model, name)
        assert torch.equal(own, dict(dense.named_parameters())[name].grad * mask)
        assert torch.count_nonzero(own[~mask]) == 0


def backward(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(5, 6)).square().mean().backward()


def step(model, optimizer):
    backward(model, optimizer)
    optimizer.step()


def add_noise_to_gradients(model, optimizer):
    for parameter in model.parameters():
        parameter.grad.add_(1.0)


def replace_gradients(model, optimizer):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)


def write_weights(model, optimizer):
    with torch.no_grad():
        model[0].weight_orig.fill_(1.0)


def write_weights_through_data(model, optimizer):
    model[0].weight_orig.data.fill_(1.0)


def write_state(model, optimizer):
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor) and value.dim():
                value.add_(1.0)


def prune_more(model, optimizer):
    global_unstructured(model, eta_r=0.5)


MEDDLERS = [
    add_noise_to_gradients,
    replace_gradients,
    write_weights,
    write_weights_through_data,
    write_state,
    prune_more,
]


@each_optimizer
@pytest.mark.parametrize("meddle", MEDDLERS)
def test_zeros_hold_after_any_write_before_the_step(make, meddle):
    model = mlp()
    layer_unstructured(model, eta_r=0.5)
    optimizer = make(model.parameters())
    for _ in range(2):
        step(model, optimizer)
        backward(model, optimizer)
        meddle(model, optimizer)
        optimizer.step()
        assert_held(model)
    assert all(torch.isfinite(value_of(model, name)).all() for name in weight_names(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_adam_with_an_eps_below_the_type_divides_zero_by_zero(dtype):
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).to(dtype)
    layer_unstructured(model, eta_r=0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, eps=1e-8 if dtype is torch.float16 else 1e-50)
    model(torch.randn(5, 6).to(dtype)).sum().backward()
    optimizer.step()
    assert_held(model)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert optimizer.param_groups[0]["eps"] < 1e-7, "as it was given"


def test_subclasses_and_closures_change_nothing():
    class Noisy(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for parameter in self.param_groups[0]["params"]:
                parameter.data.add_(1.0)

    model = mlp()
    layer_unstructured(model, eta_r=0.5)
    optimizer = Noisy(model.parameters(), lr=0.1)
    optimizer.step(lambda: backward(model, optimizer))
    assert_held(model)


def test_an_optimizer_restores_its_own_weights_only():
    model = mlp()
    layer_unstructured(model, eta_r=0.5)
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with torch.no_grad():
        for layer in (model[0], model[3]):
            layer.weight_orig.fill_(1.0)
    first.step()
    assert not model[0].weight_orig[~model[0].weight_mask].any()
    assert model[3].weight_orig[~model[3].weight_mask].all()


@pytest.mark.parametrize("kind", ["", "none", "sparse"])
def test_gradients_are_masked_when_backward_ends(kind):
    model = nn.Sequential(nn.Embedding(9, 6, sparse=kind == "sparse"), nn.Linear(6, 4))
    layer_unstructured(model, eta_r=0.5, include="0")
    if kind == "none":  # a hook drops the gradient before the backward ends
        model[0].weight_orig.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
    model(torch.arange(9)).square().sum().backward()
    for module in model:
        gradient = module.weight_orig.grad
        if gradient is not None:
            gradient = gradient.to_dense()
            assert not gradient[~module.weight_mask].any()
            assert gradient[module.weight_mask].any()


def test_a_backward_that_fails_is_forgotten_and_the_next_one_masked():
    class Fail(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("no")

    model = mlp()
    layer_unstructured(model, eta_r=0.5)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no"):
            (model[3](torch.tanh(Fail.apply(model[0](torch.randn(5, 6))))).square().mean()).backward()
        model.zero_grad()
        model(torch.randn(5, 6)).square().mean().backward()
        for layer in (model[0], model[3]):
            assert not layer.weight_orig.grad[~layer.weight_mask].any()
            assert layer.weight_orig.grad[layer.weight_mask].any()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_of_recomputed_and_nested_backwards_are_masked(use_reentrant):
    model, x = mlp(), torch.randn(5, 6, requires_grad=True)
    layer_unstructured(model, eta_r=0.5)
    for _ in range(2):  # the second one accumulates
        checkpoint(model, x, use_reentrant=use_reentrant).square().mean().backward()
    for layer in (model[0], model[3]):
        assert not layer.weight_orig.grad[~layer.weight_mask].any()
        assert layer.weight_orig.grad[layer.weight_mask].any()
