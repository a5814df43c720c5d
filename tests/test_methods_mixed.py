"""The PQI classes pruned on top of each other and of PyTorch's methods, importance scores, failures."""

from unittest import mock

import numpy as np
import pytest
import reference
import torch
from helpers import assert_unchanged, mlp, snapshot
from test_methods import ARGUMENTS, CLASSES, SCOPE_OF, each_method, each_method_and_tensor, each_module, expected_mask
from torch import nn
from torch.nn.utils import prune

from torch_sap import PQIGlobal, PQILayer, PQINeuron

FOREIGN = {
    "l1": (prune.L1Unstructured, {"amount": 0.3}),
    "random": (prune.RandomUnstructured, {"amount": 0.3}),
    "ln": (prune.LnStructured, {"amount": 1, "n": 2, "dim": 0}),
    "identity": (prune.Identity, {}),
}


def only_hook(module):
    (hook,) = module._forward_pre_hooks.values()
    return hook


@each_method
def test_three_calls_give_one_container_with_nested_masks(method):
    module, masks = nn.Conv3d(2, 4, 3), []
    for calls in (1, 2, 3):
        method.apply(module, "weight", **ARGUMENTS)
        masks.append(module.weight_mask.bool())
        hook = only_hook(module)
        assert isinstance(hook, prune.PruningContainer) == (calls > 1)
        assert hook._tensor_name == "weight"
        assert torch.equal(module.weight, module.weight_orig * masks[-1])
    assert len(hook) == 3
    assert all(isinstance(part, method) for part in hook)
    assert not (masks[1] & ~masks[0]).any()
    assert not (masks[2] & ~masks[1]).any()
    assert masks[2].sum() < masks[1].sum() < masks[0].sum()


@pytest.mark.parametrize("scope", CLASSES)
@pytest.mark.parametrize("foreign", FOREIGN)
def test_on_top_of_a_method_of_pytorch(scope, foreign):
    module, (other, arguments) = nn.Conv2d(3, 6, 3), FOREIGN[foreign]
    other.apply(module, "weight", **arguments)
    before = module.weight_mask.clone()
    expected = expected_mask(scope, module.weight_orig * before, before, **ARGUMENTS)
    CLASSES[scope].apply(module, "weight", **ARGUMENTS)
    assert torch.equal(module.weight_mask.bool(), expected)
    assert [type(part) for part in only_hook(module)] == [other, CLASSES[scope]]


@pytest.mark.parametrize("scope", CLASSES)
@pytest.mark.parametrize("foreign", FOREIGN)
def test_below_a_method_of_pytorch(scope, foreign):
    module, (other, arguments) = nn.Conv2d(3, 6, 3), FOREIGN[foreign]
    CLASSES[scope].apply(module, "weight", **ARGUMENTS)
    before = module.weight_mask.bool().clone()
    other.apply(module, "weight", **arguments)
    assert not (module.weight_mask.bool() & ~before).any()
    assert (module.weight_mask.sum() < before.sum()) == (foreign != "identity")
    assert torch.equal(module.weight, module.weight_orig * module.weight_mask)
    assert [type(part) for part in only_hook(module)] == [CLASSES[scope], other]


def test_all_three_scopes_on_one_tensor():
    module = nn.Linear(20, 10)
    mask = torch.ones(10, 20)
    for scope in ("neuron", "layer", "global"):
        mask = expected_mask(scope, module.weight.detach(), mask, eta_r=0.1)
        CLASSES[scope].apply(module, "weight", eta_r=0.1)
        assert torch.equal(module.weight_mask.bool(), mask)
    assert len(only_hook(module)) == 3


@each_method
def test_container_refuses_other_tensors_and_other_things(method):
    container = prune.PruningContainer()
    container._tensor_name = "test"
    assert len(container) == 0
    own, alien = method(), method()
    own._tensor_name, alien._tensor_name = "test", "another_test"
    container.add_pruning_method(own)
    with pytest.raises(ValueError, match="another_test"):
        container.add_pruning_method(alien)
    for thing in (10, "ugh"):
        with pytest.raises(TypeError, match="BasePruningMethod"):
            container.add_pruning_method(thing)
    assert list(container) == [own]


@pytest.mark.parametrize("scope", CLASSES)
def test_container_compute_mask(scope):
    container, method = prune.PruningContainer(), CLASSES[scope](**ARGUMENTS)
    container._tensor_name = method._tensor_name = "test"
    container.add_pruning_method(method)
    t = torch.tensor([[1.0, 2.0, 3.0, 4.0], [50.0, 6.0, 7.0, 8.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 1]])
    computed = container.compute_mask(t, mask)
    assert torch.equal(computed, expected_mask(scope, t, mask, **ARGUMENTS).float())
    rows = prune.LnStructured(amount=1, n=2, dim=0)
    rows._tensor_name = "test"
    container.add_pruning_method(rows)
    assert torch.equal(container.compute_mask(t, computed)[0], torch.zeros(4))


@each_method
def test_a_row_without_entries_left(method):
    module = nn.Linear(6, 3)
    prune.ln_structured(module, "weight", amount=1, n=2, dim=0)
    method.apply(module, "weight", **ARGUMENTS)
    before = only_hook(module)[0].compute_mask(module.weight_orig, torch.ones(3, 6))
    assert torch.equal(
        module.weight_mask.bool(), expected_mask(SCOPE_OF[method], module.weight_orig, before, **ARGUMENTS)
    )


@pytest.mark.parametrize("scope", CLASSES)
def test_importance_scores_take_the_place_of_the_weights(scope):
    module, mask = nn.Linear(6, 4), torch.ones(4, 6)
    scores = torch.randn(4, 6)
    assert not torch.equal(expected_mask(scope, scores, **ARGUMENTS), expected_mask(scope, module.weight, **ARGUMENTS))
    for _ in range(2):
        mask = expected_mask(scope, scores, mask, **ARGUMENTS)
        CLASSES[scope].apply(module, "weight", importance_scores=scores, **ARGUMENTS)
        assert torch.equal(module.weight_mask.bool(), mask)
    assert torch.equal(module.weight, module.weight_orig * mask)


@each_method
@pytest.mark.parametrize("earlier", [0, 1, 2])
def test_importance_scores_of_another_shape(method, earlier):
    model = mlp()
    for _ in range(earlier):
        method.apply(model[0], "weight", **ARGUMENTS)
    before = snapshot(model)
    with pytest.raises(AssertionError, match="same shape"):
        method.apply(model[0], "weight", importance_scores=torch.ones(9, 5))
    assert_unchanged(model, before)


@each_method_and_tensor
@each_module
@pytest.mark.parametrize("earlier", [0, 1, 2])
def test_rollback_when_the_mask_cannot_be_computed(method, make, name, earlier):
    model = nn.Sequential(make())
    for _ in range(earlier):
        method.apply(model[0], name, **ARGUMENTS)
    before = snapshot(model)
    with (
        mock.patch.object(method, "compute_mask", side_effect=RuntimeError("no mask")),
        pytest.raises(RuntimeError, match="no mask"),
    ):
        method.apply(model[0], name)
    assert_unchanged(model, before)


@each_method
@pytest.mark.parametrize("earlier", [0, 1, 2])
@pytest.mark.parametrize(
    ("value", "text"), [({"p": 3.0}, "p=3.0"), ({"beta": 2.0}, "beta"), ({"eta_r": -1.0}, "eta_r")]
)
def test_bad_arguments_leave_the_module_as_it_was(method, earlier, value, text):
    model = mlp()
    for _ in range(earlier):
        method.apply(model[0], "weight", **ARGUMENTS)
    before, inputs = snapshot(model), torch.randn(3, 6)
    output = model.eval()(inputs)
    model.train()
    with pytest.raises(ValueError, match=text):
        method.apply(model[0], "weight", **value)
    assert_unchanged(model, before)
    assert torch.equal(model.eval()(inputs), output)


@each_method
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("earlier", [0, 1])
def test_values_that_are_not_finite(method, value, earlier):
    model = mlp()
    for _ in range(earlier):
        method.apply(model[0], "weight", **ARGUMENTS)
    with torch.no_grad():
        getattr(model[0], "weight_orig" if earlier else "weight").fill_(value)
        model(torch.ones(2, 6))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"(?i)nan|inf|finite"):
        method.apply(model[0], "weight")
    assert_unchanged(model, before)


@pytest.mark.parametrize("dim", [2, -3, 0.5, None])
def test_neuron_dim_out_of_range(dim):
    model = mlp()
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError, IndexError), match="dim"):
        PQINeuron.apply(model[0], "weight", dim=dim)
    assert_unchanged(model, before)


def test_a_bias_has_no_rows():
    model = mlp()
    before = snapshot(model)
    with pytest.raises(ValueError, match="dimension"):
        PQINeuron.apply(model[0], "bias")
    assert_unchanged(model, before)


def pairs_of(model):
    return [(model[0], "weight"), (model[3], "weight")]


def arrays_of(pairs):
    weights = {str(place): module.weight.detach().double().numpy() for place, (module, _) in enumerate(pairs)}
    return weights, {name: np.ones(weight.shape) for name, weight in weights.items()}


@pytest.mark.parametrize("scored", ["no", "one", "all"])
def test_global_unstructured_of_pytorch(scored):
    model = mlp()
    pairs = pairs_of(model)
    chosen = {"no": [], "one": [1], "all": [0, 1]}[scored]
    scores = {place: torch.randn_like(pairs[place][0].weight) for place in chosen}
    weights, masks = arrays_of(pairs)
    by_name = {str(place): score.double().numpy() for place, score in scores.items()}
    for _ in range(2):
        masks, _ = reference.prune(weights, masks, "global", scores=by_name, **ARGUMENTS)
        prune.global_unstructured(
            pairs,
            pruning_method=PQIGlobal,
            importance_scores={pairs[place]: score for place, score in scores.items()},
            **ARGUMENTS,
        )
        for place, (module, _) in enumerate(pairs):
            np.testing.assert_array_equal(module.weight_mask.bool().numpy(), masks[str(place)])
    assert model[0].weight_mask.sum() + model[3].weight_mask.sum() < 54 + 36


@pytest.mark.parametrize("method", [PQILayer, PQINeuron])
def test_global_unstructured_of_pytorch_refuses_other_scopes(method):
    model = mlp()
    before = snapshot(model)
    with pytest.raises(TypeError, match="unstructured"):
        prune.global_unstructured(pairs_of(model), pruning_method=method)
    assert_unchanged(model, before)
