"""Masks of standardized convolutions hold behind the standardization: alone, in models, and exported."""

import copy
import gc
import io
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    FUNCTIONS,
    SCOPES,
    assert_held,
    assert_unchanged,
    fit,
    import_transformers,
    mask_of,
    snapshot,
    value_of,
    weight_names,
)
from standardized_layers import ScaledStdConv2d, StdConv2d, by_hand, every_kind, images, layer, record
from torch import nn
from torch.nn.utils import prune

import torch_sap

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
timm = pytest.importorskip("timm")


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
def test_channels_that_lost_nothing_are_computed_as_before(kind):
    pruned, dense = layer(kind, torch.float32), layer(kind, torch.float32)
    mask = torch.ones_like(pruned.weight, dtype=torch.bool)
    mask[0, 0] = False
    torch_sap.masks.mask.hold_masks(torch_sap.masks.parameters.resolve(pruned).prunables, [mask])
    outputs = pruned(images(torch.float32)), dense(images(torch.float32))
    assert torch.equal(outputs[0][:, 1:], outputs[1][:, 1:])
    assert not torch.allclose(outputs[0][:, 0], outputs[1][:, 0])


@every_kind
@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
def test_channels_with_one_weight_or_none(kind, received):
    pruned = layer(kind)
    mask = torch.zeros_like(pruned.weight, dtype=torch.bool)
    mask[0, 0, 0, 0] = True
    torch_sap.masks.mask.hold_masks(torch_sap.masks.parameters.resolve(pruned).prunables, [mask])
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


@every_kind
def test_compile_and_export_see_the_mask(kind):
    pruned = layer(kind, torch.float32)
    torch_sap.neuron_unstructured(pruned)
    model = nn.Sequential(pruned, nn.ReLU())
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    x = images(torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    if TORCH < (2, 6):  # Dynamo cannot follow a forward of the module's own, and says so
        with pytest.raises(torch._dynamo.exc.Unsupported, match="bound method"):
            compiled(x)
        return
    for _ in range(2):
        torch.testing.assert_close(compiled(x), model(x))
        torch_sap.neuron_unstructured(model)
    assert len(graphs) == 1, "later rounds compile nothing"
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


@pytest.mark.parametrize("kind", [StdConv2d, ScaledStdConv2d])
def test_torch_fx_traces_the_mask_and_the_parameter(kind):
    model = nn.Sequential(layer(kind))
    torch_sap.layer_unstructured(model)
    traced = torch.fx.symbolic_trace(model)
    before = traced(images())
    assert torch.equal(before, model(images()))
    before.sum().backward()
    torch.optim.SGD(traced.parameters(), lr=0.1).step()
    assert torch.equal(traced(images()), model(images()))
    assert not torch.equal(traced(images()), before)


def test_functional_call_computes_with_the_lent_weight():
    pruned, other = layer(ScaledStdConv2d), layer(ScaledStdConv2d)
    torch_sap.layer_unstructured(pruned)
    with torch.no_grad():
        other.weight.mul_(2).add_(torch.randn_like(other.weight))
    state = {**pruned.state_dict(), "weight_orig": other.weight.detach()}
    expected = by_hand(other, pruned.weight_mask, images())
    torch.testing.assert_close(torch.func.functional_call(pruned, state, (images(),)), expected)


def test_masks_of_pytorchs_methods_are_taken_over_and_given_up(received):
    module = layer(StdConv2d)
    prune.l1_unstructured(module, "weight", amount=30)
    module(images())
    assert torch.count_nonzero(received[-1]) == received[-1].numel(), "PyTorch's own masks do not reach it"
    torch_sap.layer_unstructured(module)
    module(images())
    assert torch.equal(received[-1] != 0, module.weight_mask)
    prune.l1_unstructured(module, "weight", amount=2)
    module(images())
    assert torch.equal(received[-1] != 0, module.weight_mask != 0)
    prune.remove(module, "weight")
    dense = layer(StdConv2d)
    dense.load_state_dict(module.state_dict())
    assert torch.equal(module(images()), dense(images()))


def test_what_pytorchs_methods_pruned_on_top_is_removed_too():
    module, fresh = layer(StdConv2d), layer(StdConv2d)
    torch_sap.layer_unstructured(module)
    prune.l1_unstructured(module, "weight", amount=20)
    expected = module(images())
    fresh.load_state_dict(torch_sap.remove(module).state_dict(), strict=True)
    torch.testing.assert_close(module(images()), expected)
    torch.testing.assert_close(fresh(images()), expected)


@every_kind
@pytest.mark.parametrize("on_top", [False, True])
def test_dense_state_dict_is_what_remove_leaves(kind, on_top):
    module = layer(kind)
    torch_sap.layer_unstructured(module)
    if on_top:
        prune.l1_unstructured(module, "weight", amount=20)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    state = torch_sap.dense_state_dict(module)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    expected = torch_sap.remove(module).state_dict()
    assert set(state) == set(expected)
    assert all(torch.equal(state[key], value) for key, value in expected.items())


@every_kind
def test_pytorchs_entrance_warns_where_its_masks_do_not_hold(kind, received):
    module, masked = layer(kind), layer(kind)
    with pytest.warns(UserWarning, match=rf"{kind.__name__} standardizes its weight.*layer_unstructured") as warned:
        torch_sap.PQILayer.apply(module, "weight", eta_r=0.3)
    assert warned[0].filename == __file__
    module(images())
    assert torch.count_nonzero(received[-1]) == received[-1].numel()
    torch_sap.layer_unstructured([(masked, "weight")])
    torch_sap.PQILayer.apply(masked, "weight", eta_r=0.3)
    masked(images())
    assert torch.equal(received[-1] != 0, masked.weight_mask != 0)


def test_only_modules_that_compute_as_timms_do_are_changed():
    class Renamed(StdConv2d):
        pass

    class Other(StdConv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight)

    renamed, other, plain = layer(Renamed), layer(Other), nn.Conv2d(4, 6, 3)
    for module in (renamed, other, plain):
        torch_sap.layer_unstructured(module)
    assert ["forward" in vars(module) for module in (renamed, other, plain)] == [True, False, False]


@pytest.mark.parametrize("name", ["test_nfnet", "vit_tiny_r_s16_p8_224"])
def test_whole_models_keep_their_zeros_through_rounds(name):
    kwargs = {"img_size": 32} if name.startswith("vit") else {}
    model = timm.create_model(name, num_classes=3, **kwargs)
    sap = torch_sap.SAP(model, scope="layer", gamma=2.0)
    x = torch.randn(1, 3, 32, 32)
    for _ in range(2):
        fit(model, torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9), (2, 3, 32, 32), steps=2)
        sap.step()
        assert torch_sap.verify(model, x).effective
    masks = {key: mask_of(model, key).clone() for key in weight_names(model)}
    expected = model.eval()(x)
    fresh = timm.create_model(name, num_classes=3, **kwargs)
    fresh.load_state_dict(torch_sap.remove(model).state_dict(), strict=True)
    assert all(torch.count_nonzero(value_of(fresh, key)[~mask]) == 0 for key, mask in masks.items())
    torch.testing.assert_close(fresh.eval()(x), expected, rtol=1e-4, atol=1e-4)


def test_torch_sap_does_not_import_timm():
    code = """
import sys, torch, torch_sap
model = torch.nn.Conv2d(3, 4, 3)
torch_sap.layer_unstructured(model)
torch_sap.verify(model, torch.ones(1, 3, 4, 4))
torch_sap.remove(model)
assert not any(name.partition(".")[0] == "timm" for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_bit_of_transformers_holds_its_zeros(received):
    transformers = import_transformers()
    config = transformers.BitConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_groups=4, global_padding="SAME"
    )
    model = transformers.BitForImageClassification(config).eval()
    torch_sap.layer_unstructured(model, eta_r=0.3)
    inputs = torch.randn(2, 3, 32, 32)
    output = model(inputs).logits
    masks = [module.weight_mask for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(received) == len(masks) > 4
    for mask in masks:
        assert not mask.all()
        assert any(weight.shape == mask.shape and torch.equal(weight != 0, mask) for weight in received)
    assert torch_sap.verify(model, inputs).effective
    plain = transformers.BitForImageClassification(config).eval()
    plain.load_state_dict(torch_sap.remove(model).state_dict())
    torch.testing.assert_close(plain(inputs).logits, output)
