"""Masks of timm's standardised convolutions hold behind the standardisation, also in copies and after removal."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from helpers import FUNCTIONS, SCOPES, assert_held, assert_unchanged, snapshot
from standardised_layers import StdConv2d, by_hand, every_kind, images, layer, record
from torch.nn.utils import prune

import torch_sap


@pytest.fixture
def received(monkeypatch):
    return record(monkeypatch)


@every_kind
@pytest.mark.parametrize("scope", SCOPES)
def test_the_convolution_receives_exact_zeros(kind, scope, received):
    pruned = layer(kind)
    FUNCTIONS[scope](pruned, eta_r=0.3)
    for training in (True, False):
        pruned.train(training)(images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pruned.float()(images(torch.float32))
    assert len(received) == 3
    assert not pruned.weight_mask.all()
    for weight in received:
        assert torch.equal(weight != 0, pruned.weight_mask)


@every_kind
def test_values_and_gradients_are_those_of_masking_by_hand(kind):
    pruned, dense = layer(kind), layer(kind)
    torch_sap.neuron_unstructured(pruned, eta_r=0.3)
    mask = pruned.weight_mask.clone()
    with torch.no_grad():
        dense.weight.mul_(mask)
    inputs = [images().requires_grad_(), images().requires_grad_()]
    outputs = [pruned(inputs[0]), by_hand(dense, mask, inputs[1])]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    dense.weight.grad.mul_(mask)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for ours, theirs in zip(pruned.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert pruned.weight.grad.abs().sum() > 0


@every_kind
def test_channels_that_lost_nothing_are_computed_as_timm_does(kind):
    pruned, dense = layer(kind, torch.float32), layer(kind, torch.float32)
    mask = torch.ones_like(pruned.weight, dtype=torch.bool)
    mask[0, 0] = False
    torch_sap.masks.mask.hold_masks(torch_sap.masks.parameters.resolve(pruned), [mask])
    outputs = pruned(images(torch.float32)), dense(images(torch.float32))
    assert torch.equal(outputs[0][:, 1:], outputs[1][:, 1:])
    assert not torch.allclose(outputs[0][:, 0], outputs[1][:, 0])


@every_kind
@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
def test_channels_with_one_weight_or_none(kind, received):
    pruned = layer(kind)
    mask = torch.zeros_like(pruned.weight, dtype=torch.bool)
    mask[0, 0, 0, 0] = True
    torch_sap.masks.mask.hold_masks(torch_sap.masks.parameters.resolve(pruned), [mask])
    with torch.autograd.detect_anomaly():
        output = pruned(images())
        output.sum().backward()
    torch.testing.assert_close(output, pruned.bias.view(-1, 1, 1).expand_as(output))
    assert torch.count_nonzero(received[0]) == 0
    assert all(parameter.grad.isfinite().all() for parameter in pruned.parameters())


@every_kind
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), lambda module: saved(module)]
)
def test_a_copy_computes_with_its_own_mask(kind, copied):
    pruned = layer(kind)
    torch_sap.layer_unstructured(pruned)
    expected = pruned(images())
    expected.sum().backward()
    twin = copied(pruned)
    torch_sap.layer_unstructured(pruned)
    with torch.no_grad():
        pruned.weight_orig.zero_()
    assert torch.equal(twin(images()), expected)
    assert_held(twin)


def saved(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@every_kind
def test_keys_are_those_of_any_pruned_module_and_a_state_loads(kind):
    pruned, other = layer(kind), layer(kind)
    for module in (pruned, other):
        torch_sap.SAP(module)
    torch_sap.neuron_unstructured(pruned, eta_r=0.3)
    keys = [name.replace("weight", "weight_orig") for name, _ in layer(kind).named_parameters()]
    assert list(pruned.state_dict()) == [*keys, "weight_mask"]
    other.load_state_dict(pruned.state_dict())
    assert torch.equal(other(images()), pruned(images()))


@every_kind
@pytest.mark.parametrize("remove", [torch_sap.remove, lambda module: prune.remove(module, "weight")])
def test_a_removed_module_is_timms_own_and_computes_the_same(kind, remove):
    pruned, fresh = layer(kind), layer(kind)
    attributes, keys = set(vars(pruned)), list(fresh.state_dict())
    torch_sap.neuron_unstructured(pruned, eta_r=0.3)
    mask, expected = pruned.weight_mask.clone(), pruned(images())
    remove(pruned)
    assert set(vars(pruned)) == attributes
    assert torch.equal(pruned.weight != 0, mask), "exact zeros are stored"
    assert list(pruned.state_dict()) == keys
    fresh.load_state_dict(pruned.state_dict(), strict=True)
    for module in (pruned, fresh):
        torch.testing.assert_close(module(images()), expected)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_a_removed_modules_zeros_are_zeros_but_for_rounding(dtype, rounding, received):
    pruned = layer(StdConv2d, dtype)
    torch_sap.neuron_unstructured(pruned, eta_r=0.3)
    mask = pruned.weight_mask.clone()
    torch_sap.remove(pruned)(images(dtype))
    assert received[0][~mask].abs().max() < rounding < received[0][mask].abs().median()


def test_a_stepper_that_pruned_nothing_leaves_the_module_bit_for_bit():
    module = layer(StdConv2d)
    before = snapshot(module)
    with pytest.raises(RuntimeError, match="no training today"):
        torch_sap.iterative_sap(module, raising, iterations=1)
    assert_unchanged(module, before)
    assert "forward" not in vars(module)


def raising(model):
    raise RuntimeError("no training today")


def test_a_pruned_module_is_freed_without_the_collector():
    module = layer(StdConv2d)
    torch_sap.layer_unstructured(module)
    module(images()).sum().backward()
    reference = weakref.ref(module)
    gc.disable()
    try:
        del module
        assert reference() is None
    finally:
        gc.enable()
