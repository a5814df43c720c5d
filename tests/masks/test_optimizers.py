"""Zeros after every step of an optimizer: known where nothing can have moved them, restored everywhere else."""

import pytest
import torch
from helpers import assert_held, mlp
from torch import nn

from torch_sap import global_unstructured, layer_unstructured
from torch_sap.masks import gradients, masking, optimizers, zeros
from torch_sap.masks.linking import hooks_of
from torch_sap.masks.stamps import Probe, Stamp

MAKERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1, amsgrad=True, weight_decay=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "eps 0": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, eps=1e-30),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, momentum=0.9),
}
each_optimizer = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@pytest.fixture
def passes(monkeypatch):
    """How many tensors were multiplied with their masks, but for gradients."""
    calls = []

    for module in (zeros, masking, optimizers):
        restore = module.restore_zeros_
        monkeypatch.setattr(module, "restore_zeros_", lambda *a, restore=restore: (calls.append(1), restore(*a)))
    return calls


def backward(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(5, 6)).square().mean().backward()


def step(model, optimizer):
    backward(model, optimizer)
    optimizer.step()


def test_steps_that_keep_the_zeros_cost_no_pass(passes):
    for name in ("sgd", "nesterov", "adam", "adamw"):
        model = mlp()
        layer_unstructured(model, eta_r=0.5)
        optimizer = MAKERS[name](model.parameters())
        for _ in range(2):
            step(model, optimizer)
        passes.clear()
        for _ in range(3):
            step(model, optimizer)
            assert_held(model)
        assert not passes


def test_momentum_from_before_the_pruning_is_masked_once(passes):
    model = mlp()
    optimizer = MAKERS["adam"](model.parameters())
    for _ in range(3):
        step(model, optimizer)
    layer_unstructured(model, eta_r=0.5)
    step(model, optimizer)
    passes.clear()
    step(model, optimizer)
    assert not passes
    weight, mask = model[0].weight_orig, model[0].weight_mask
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert torch.count_nonzero(optimizer.state[weight][key][~mask]) == 0
        assert torch.count_nonzero(optimizer.state[weight][key][mask]) > 0


def add_noise_to_gradients(model, optimizer):
    for parameter in model.parameters():
        parameter.grad.add_(1.0)


def replace_gradients(model, optimizer):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)


def clip(model, optimizer):
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


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


def load_state(model, optimizer):
    state = optimizer.state_dict()
    for values in state["state"].values():
        values.update({k: torch.ones_like(v) for k, v in values.items() if torch.is_tensor(v) and v.dim()})
    optimizer.load_state_dict(state)


def prune_more(model, optimizer):
    global_unstructured(model, eta_r=0.5)


MEDDLERS = [
    add_noise_to_gradients,
    replace_gradients,
    clip,
    write_weights,
    write_weights_through_data,
    write_state,
    load_state,
    prune_more,
]


@each_optimizer
@pytest.mark.parametrize("meddle", MEDDLERS)
def test_zeros_hold_whatever_was_done_before_the_step(make, meddle):
    model = mlp()
    layer_unstructured(model, eta_r=0.5)
    optimizer = make(model.parameters())
    for _ in range(3):
        step(model, optimizer)
    for _ in range(2):
        backward(model, optimizer)
        meddle(model, optimizer)
        optimizer.step()
        assert_held(model)
        step(model, optimizer)
        assert_held(model)


@each_optimizer
def test_closures_are_not_trusted(make):
    model = mlp()
    layer_unstructured(model, eta_r=0.5)
    optimizer = make(model.parameters())

    def closure():
        backward(model, optimizer)
        add_noise_to_gradients(model, optimizer)

    for _ in range(3):
        optimizer.step(closure)
        assert_held(model)
        step(model, optimizer)
        assert_held(model)


@pytest.mark.parametrize("when", ["pre", "post"])
def test_steps_with_hooks_of_their_own_are_not_trusted(when):
    model = mlp()
    layer_unstructured(model, eta_r=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def hook(optimizer, args, kwargs):
        add_noise_to_gradients(model, optimizer)
        write_weights(model, optimizer)

    register = optimizer.register_step_pre_hook if when == "pre" else optimizer.register_step_post_hook
    register(hook)
    for _ in range(2):
        step(model, optimizer)
        assert_held(model)


def test_a_step_that_failed_leaves_nothing_to_trust():
    model = mlp()
    layer_unstructured(model, eta_r=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, optimizer)
    backward(model, optimizer)
    (group,) = optimizer.param_groups
    group["lr"] = "no number"
    with pytest.raises(TypeError):
        optimizer.step()
    group["lr"] = 0.1

    def closure():
        backward(model, optimizer)
        add_noise_to_gradients(model, optimizer)

    optimizer.step(closure)
    assert_held(model)


def test_subclasses_are_not_trusted():
    class Noisy(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for parameter in self.param_groups[0]["params"]:
                parameter.data.add_(1.0)

    model = mlp()
    layer_unstructured(model, eta_r=0.5)
    optimizer = Noisy(model.parameters(), lr=0.1)
    for _ in range(3):
        step(model, optimizer)
        assert_held(model)


def test_adam_without_eps_divides_by_the_zeros():
    model = mlp()
    layer_unstructured(model, eta_r=0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, eps=0.0)
    for _ in range(3):
        step(model, optimizer)
        assert_held(model)


def test_a_stamp_sees_writes_exchanges_and_moves():
    tensor = torch.zeros(3)
    stamp = Stamp(tensor)
    assert stamp.holds(tensor)
    assert not stamp.holds(tensor.clone())
    assert not stamp.holds(tensor, tensor)
    tensor.data = torch.zeros(3)
    assert not stamp.holds(tensor)
    stamp = Stamp(tensor)
    tensor.add_(1)
    assert not stamp.holds(tensor)


def test_inference_tensors_are_never_known():
    with torch.inference_mode():
        tensor = torch.zeros(3)
    assert not Stamp(tensor).holds(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_probe_sees_a_dense_write(dtype):
    mask = torch.ones(40, 50, dtype=torch.bool)
    mask[39, 49] = False
    probe, weight = Probe(mask), torch.ones(40, 50, dtype=dtype) * mask
    assert probe.fits(mask)
    assert probe.finds_zeros(weight)
    assert not probe.finds_zeros(torch.ones(40, 50, dtype=dtype))
    assert Probe(torch.ones(2, 2, dtype=torch.bool)).finds_zeros(torch.ones(2, 2))
    assert Probe(torch.ones(0, 2, dtype=torch.bool)).finds_zeros(torch.ones(0, 2))


def test_gradients_are_known_to_be_masked_until_they_are_written():
    model = mlp()
    layer_unstructured(model, eta_r=0.5)
    model(torch.randn(5, 6)).sum().backward()
    (hook,) = hooks_of(model[0], "weight")
    assert isinstance(hook._gradient, gradients.GradientMask)
    assert hook.known_zeros() is not None
    model[0].weight_orig.grad.mul_(2.0)
    assert hook.known_zeros() is None
