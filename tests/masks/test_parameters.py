"""Which tensors of a model are pruned: the paper's rule, exclude, pairs."""

import pytest
import torch
from helpers import FUNCTIONS, SCOPES, Mixed, masks_of, mlp, weight_names, zoo

from torch_sap import layer_unstructured, prunable_parameters

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
