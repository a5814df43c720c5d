"""verify tells what operations receive of pruned weights, and leaves the model as it was."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from helpers import mlp
from torch import nn
from torch.nn.utils import prune, spectral_norm
from weighted import Weighted, vector

import torch_sap
from torch_sap import verify
from torch_sap.inspect.verify import Verification, VerifiedWeight

REASONS = {
    "standardized weight (native_batch_norm)": lambda m, w, x: F.linear(
        x, F.batch_norm(w.view(1, 8, 8), None, None, training=True)[0]
    ),
    "standardized weight (native_layer_norm)": lambda m, w, x: F.linear(x, F.layer_norm(w, (8,))),
    "standardized weight (div, sub)": lambda m, w, x: F.linear(x, (w - w.mean(1, keepdim=True)) / w.std()),
    "reparametrized (add)": lambda m, w, x: F.linear(x, w * 2 + m.other),
    "reparametrized (exp)": lambda m, w, x: F.linear(x, w.exp()),
    "not used": lambda m, w, x: x,
    "zeros among unpruned entries": lambda m, w, x: F.linear(x, w * (m.other > 1)),
}


@pytest.mark.parametrize("reason", REASONS)
def test_reasons(reason):
    model = nn.Sequential(Weighted(REASONS[reason]), nn.Linear(8, 2))
    torch_sap.layer_unstructured(model, gamma=3.0)
    found = verify(model, vector())
    assert [(weight.name, weight.module, weight.reason) for weight in found.differing] == [
        ("0.weight", "Weighted", reason)
    ]
    pruned = int((~model[0].weight_mask).sum())
    revives = reason.startswith(("standardized", "reparam"))
    assert found.weights[0].revived == (pruned if revives else 0)
    assert found.effective != revives
    assert (found.weights[0].effective_sparsity is None) == (reason == "not used")
    assert "1 received with another sparsity" in str(found)
    assert reason in str(found)


def test_a_parameter_read_behind_pytorchs_mask():
    model = Weighted(lambda m, w, x: F.linear(x, m.weight_orig))
    prune.random_unstructured(model, "weight", amount=0.5)
    found = verify(model, vector())
    (weight,) = found.weights
    assert (weight.mask_sparsity, weight.effective_sparsity) == (0.5, 0.0)
    assert " 50.0% in the mask, 100.0% received: read without the mask" in str(found)
    assert "<td>50.0%</td><td>100.0%</td><td>read without the mask</td>" in found._repr_html_()
    assert weight.reason == "read without the mask"


def test_pytorchs_mask_does_not_reach_the_other_user_of_a_shared_weight_and_ours_does():
    def tied():
        model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8, bias=False))
        model[1].weight = model[0].weight
        return model

    theirs, ours = tied(), tied()
    prune.random_unstructured(theirs[0], "weight", amount=0.5)
    torch_sap.layer_unstructured(ours)
    (weight,) = verify(theirs, torch.arange(8)).weights
    assert weight.reason == "shared with a module that is not masked"
    assert weight.effective_sparsity == pytest.approx(0.25, abs=0.01)
    assert verify(ours, torch.arange(8)).effective


def test_old_spectral_norm_keeps_zeros():
    model = nn.Sequential(spectral_norm(nn.Linear(8, 8)))
    torch_sap.layer_unstructured(model)
    found = verify(model, vector())
    assert [weight.name for weight in found.weights] == ["0.weight_orig"]
    assert found.effective
    assert not found.differing


def test_zeros_of_a_removed_model_count_as_pruned():
    model = mlp()
    report = torch_sap.layer_unstructured(model)
    torch_sap.remove(model)
    found = verify(model, torch.randn(3, 6))
    sparsity = {tensor.name: 1 - tensor.remaining / tensor.total for tensor in report.tensors}
    assert {weight.name: weight.effective_sparsity for weight in found.weights} == pytest.approx(sparsity)


def test_negative_zeros_are_zeros():
    """As PyTorch's own masks leave them."""
    found = []
    for zero in (0.0, -0.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 2))
        with torch.no_grad():
            model[0].weight[:3] = zero
        found.append([torch_sap.verify(model, torch.ones(1, 8)).to_dict(), torch_sap.summary(model).to_dict()])
    assert found[0] == found[1]
    assert found[1][0]["weights"][0]["effective_sparsity"] == 0.5
    assert found[1][1]["tensors"][0]["empty_rows"] == [0, 1, 2]


def test_weights_that_are_not_pruned_are_left_out():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    torch_sap.layer_unstructured(model, exclude="1")
    assert [weight.name for weight in verify(model, vector()).weights] == ["0.weight"]


def test_a_tensor_that_pytorchs_hook_computed_stays():
    model = mlp()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    weight = model[0].weight
    verify(model, torch.randn(3, 6))
    assert model[0].weight is weight
    model(torch.randn(3, 6)).sum().backward()


def test_a_compiled_model_is_computed_eagerly():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), Weighted(REASONS["reparametrized (add)"]))
    torch_sap.layer_unstructured(model)
    model(vector())
    compiled = torch.compile(model, backend="eager")
    compiled(vector())
    found = verify(compiled, vector())
    assert [weight.reason for weight in found.weights] == ["", "reparametrized (add)"]
    assert found.weights[0].effective_sparsity == found.weights[0].mask_sparsity


def test_the_model_is_in_eval_mode_without_gradients():
    def function(module, weight, x):
        assert not torch.is_grad_enabled()
        return x if module.training else F.linear(x, weight)

    model = Weighted(function).train()
    torch_sap.layer_unstructured(model)
    assert not verify(model, vector()).differing
    assert model.training


def test_records_are_frozen_plain_values():
    model = mlp()
    torch_sap.layer_unstructured(model)
    found = verify(model, torch.randn(3, 6))
    values = json.loads(json.dumps(found.to_dict()))
    assert values["effective"] is True
    assert Verification(tuple(VerifiedWeight(**weight) for weight in values["weights"])) == found
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.weights = ()
    assert str(found) == "2 pruned weights, 0 received with another sparsity"
