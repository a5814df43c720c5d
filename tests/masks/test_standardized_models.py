"""Masked standardised convolutions in whole models, under PyTorch's tools, and together with its pruning methods."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import fit, mask_of, value_of, weight_names
from standardised_layers import ScaledStdConv2d, StdConv2d, by_hand, every_kind, images, layer, record
from torch import nn
from torch.nn.utils import prune

import torch_sap

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])

timm = pytest.importorskip("timm")


@pytest.fixture
def received(monkeypatch):
    return record(monkeypatch)


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
