"""Which tensors of a model are pruned: the paper's rule, exclude, pairs, and what cannot be."""

import pytest
import torch
from helpers import FUNCTIONS, SCOPES, Mixed, masks_of, mlp, weight_names, zoo
from torch import nn

from torch_sap import SAP, layer_unstructured, prunable_parameters, summary

each_scope = pytest.mark.parametrize("scope", SCOPES)


def test_prunable_parameters_by_the_papers_rule():
    model = Mixed()
    expected = weight_names(model)
    assert {"attention.in_proj_weight", "recurrent.weight_hh_l0", "bilinear.weight", "custom_weights"} <= set(expected)
    names = {module: path for path, module in model.named_modules()}

    def found():
        return [f"{names[module]}.{name}".removeprefix(".") for module, name in prunable_parameters(model)]

    assert found() == expected
    layer_unstructured(model, eta_r=0.5)
    assert sorted(found()) == sorted(expected), "the names are those before pruning"


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ("linear", {"linear.weight"}),
        ("linear.weight", {"linear.weight"}),
        (["*transposed*", "embedding"], {"transposed.weight", "plain_transposed.weight", "embedding.weight"}),
        ("*ed", {"grouped.weight", "transposed.weight", "plain_transposed.weight"}),
    ],
)
@each_scope
def test_exclude(scope, exclude, left):
    model = zoo()
    report = FUNCTIONS[scope](model, eta_r=0.5, exclude=exclude)
    kept = set(weight_names(model)) - left
    assert {tensor.name for tensor in report.tensors} == kept
    assert len(prunable_parameters(model, exclude=exclude)) == len(kept)
    for name, mask in masks_of(model).items():
        assert name not in left or mask.all()
        assert (f"{name}_orig" in model.state_dict()) == (name not in left)


@each_scope
@pytest.mark.parametrize("form", ["list", "generator", "tuple"])
def test_a_model_or_any_iterable_of_pairs(scope, form):
    model, by_pairs = zoo(), zoo()
    pairs = prunable_parameters(by_pairs)
    given = {"list": pairs, "generator": (pair for pair in pairs), "tuple": tuple(pairs)}[form]
    report, other = FUNCTIONS[scope](model, eta_r=0.5), FUNCTIONS[scope](by_pairs, eta_r=0.5)
    assert report.remaining == other.remaining
    report = FUNCTIONS[scope](given, eta_r=0.5)
    assert report.remaining == FUNCTIONS[scope](model, eta_r=0.5).remaining
    for name, mask in masks_of(model).items():
        assert torch.equal(mask, masks_of(by_pairs)[name])


def test_a_pair_may_name_a_bias_or_a_norm_scale():
    model = mlp()
    report = layer_unstructured([(model[0], "weight"), (model[0], "bias")], eta_r=0.5)
    assert report.pruned > 0
    assert "bias_mask" in dict(model[0].named_buffers())
    assert [tensor.total for tensor in report.tensors] == [54, 9]


class OwnBuffer(nn.Linear):
    def __init__(self):
        super().__init__(6, 6)
        self.register_buffer("weight_mask", torch.ones(6, 6).tril())

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.weight_mask, self.bias)


class OwnAttribute(nn.Linear):
    weight_orig = None

    def __init__(self):
        super().__init__(6, 6)


def test_a_dotted_name_is_refused_and_nothing_is_changed():
    """That nn.Module does not take, but torchrl's losses give."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Module())
    model[1]._parameters["net.0.weight"] = nn.Parameter(torch.ones(3, 3))
    names = list(model.state_dict())
    for prune in (layer_unstructured, SAP):
        with pytest.raises(ValueError, match=r"1\.net\.0\.weight must belong to a layer, but Module keeps it under a"):
            prune(model)
        assert list(model.state_dict()) == names
    layer_unstructured(model, exclude="1")
    model[0](torch.ones(2, 6))


@pytest.mark.parametrize("kind", [OwnBuffer, OwnAttribute])
def test_names_that_a_layer_has_already_are_refused_and_nothing_is_changed(kind):
    model = nn.Sequential(nn.Linear(6, 6), kind())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for prune in (layer_unstructured, SAP):
        with pytest.raises(ValueError, match=r"1\.weight needs the names weight_orig and weight_mask in its layer"):
            prune(model)
        assert {name: tensor.tolist() for name, tensor in model.state_dict().items()} == {
            name: tensor.tolist() for name, tensor in before.items()
        }
    assert len(prunable_parameters(model)) == 2
    assert summary(model).total == 72
    layer_unstructured(model, exclude="1")
    model(torch.ones(2, 6))


def test_an_expanded_parameter_is_refused_and_nothing_is_changed():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = nn.Parameter(torch.randn(1, 6).expand(6, 6))
    for prune in (layer_unstructured, SAP):
        with pytest.raises(ValueError, match=r"1\.weight must have memory of its own for each entry"):
            prune(model)
        assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    layer_unstructured(model, exclude="1")
