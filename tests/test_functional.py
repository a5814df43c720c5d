"""The report of the whole-model functions, remove, and what they leave alone."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import FUNCTIONS, SCOPES, Mixed, assert_held, masks_of, mlp, snapshot, zoo
from torch import nn
from torch.nn.utils import prune

import torch_sap
from torch_sap import layer_unstructured, remove

each_scope = pytest.mark.parametrize("scope", SCOPES)


@each_scope
def test_report(scope):
    model = zoo()
    report = FUNCTIONS[scope](model, p=0.3, q=0.9, eta_r=0.2, gamma=0.8, beta=0.7)
    assert report.scope == scope
    assert report.hyperparameters == {"p": 0.3, "q": 0.9, "eta_r": 0.2, "gamma": 0.8, "beta": 0.7}
    assert report.total == sum(mask.numel() for mask in masks_of(model).values())
    assert report.remaining == sum(int(mask.sum()) for mask in masks_of(model).values())
    assert report.density == pytest.approx(report.remaining / report.total)
    assert report.sparsity == pytest.approx(1 - report.density)
    assert report.compression_ratio == pytest.approx(report.total / report.remaining)
    assert report.pruned == sum(int(group.c.sum()) for group in report.groups.values()) > 0
    for tensor in report.tensors:
        mask = masks_of(model)[tensor.name]
        assert (tuple(tensor.shape), tensor.total, tensor.remaining) == (mask.shape, mask.numel(), int(mask.sum()))
    rows = {"global": None, "layer": 1, "neuron": 5}[scope]
    if rows:
        assert len(report.groups["linear.weight"].d) == rows
    else:
        assert list(report.groups) == ["global"]
    json.dumps(report.to_dict())
    assert "linear.weight" in str(report)
    with pytest.raises(AttributeError):
        report.scope = "other"


@each_scope
def test_remove_gives_the_original_keys_order_and_exact_zeros(scope):
    model = nn.Sequential(zoo(), Mixed())
    dense, before = copy.deepcopy(model), snapshot(model)
    for _ in range(2):
        FUNCTIONS[scope](model, eta_r=0.5)
    masks = masks_of(model)
    assert remove(model) is model
    after = snapshot(model)
    assert after["keys"] == before["keys"]
    assert after["parameters"] == before["parameters"]
    assert after["hooks"] == before["hooks"]
    assert not prune.is_pruned(model)
    originals = dict(dense.named_parameters())
    for name, parameter in model.named_parameters():
        mask = masks.get(name, torch.ones((), dtype=torch.bool))
        assert torch.equal(parameter, torch.where(mask, originals[name], 0)), name
        assert isinstance(parameter, nn.Parameter)
    dense.load_state_dict(model.state_dict())


def test_remove_takes_foreign_methods_off_too():
    model = mlp()
    prune.l1_unstructured(model[0], "weight", 0.5)
    layer_unstructured([(model[3], "weight")], eta_r=0.5)
    zeros = [int((model[place].weight == 0).sum()) for place in (0, 3)]
    assert min(zeros) > 0
    remove(model)
    assert set(model.state_dict()) == set(mlp().state_dict())
    assert [int((model[place].weight == 0).sum()) for place in (0, 3)] == zeros


def test_weights_written_after_pruning_are_zero_after_remove():
    model = mlp()
    layer_unstructured(model, eta_r=0.5)
    masks = masks_of(model)
    with torch.no_grad():
        model[0].weight_orig.fill_(7.0)
    remove(model)
    assert torch.equal(model[0].weight, 7.0 * masks["0.weight"])


def test_a_weight_without_elements_and_a_dense_model_are_fine():
    model = nn.Sequential(nn.Linear(4, 3))
    model.weight_of_nothing = nn.Parameter(torch.empty(0, 4))
    report = layer_unstructured(model, eta_r=1.0)
    assert report.pruned > 0
    assert {tensor.total for tensor in report.tensors} <= {12, 0}
    assert_held(nn.Sequential(model[0]))
    keys = list(mlp().state_dict())
    assert list(remove(mlp()).state_dict()) == keys


@each_scope
def test_random_numbers_are_left_alone(scope):
    model = zoo()
    state = torch.get_rng_state()
    FUNCTIONS[scope](model, eta_r=0.5)
    assert torch.equal(torch.get_rng_state(), state)


@each_scope
def test_a_step_from_the_same_weights_is_the_same(scope):
    first, second = zoo(), zoo()
    for model in (first, second):
        FUNCTIONS[scope](model, eta_r=0.3)
    for name, mask in masks_of(first).items():
        assert torch.equal(mask, masks_of(second)[name])


DEFAULT_DEVICE = """
import torch

torch.set_default_device("meta")  # as people set "cuda"; what is made there by mistake has no values
import torch_sap
from torch import nn

x = torch.linspace(-1, 1, 40, device="cpu").reshape(5, 8)


def model():
    return nn.Sequential(*[nn.Linear(8, 8, device="cpu") for _ in range(12)])


def train(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(x).pow(2).mean().backward()
        optimizer.step()
    return {"accuracy": 0.5}


for scope in ("global", "layer", "neuron"):
    pruned = model()
    history = torch_sap.iterative_sap(pruned, train, iterations=2, scope=scope, gini=True, checkpoint=scope)
    assert history[-1].remaining < history[-1].total
    assert torch_sap.verify(pruned, x).effective
    assert torch_sap.summary(pruned, x).remaining == history[-1].remaining
    torch_sap.save_sparse(pruned, "sparse.safetensors")
    assert torch.equal(torch_sap.load_sparse(model(), "sparse.safetensors")(x), pruned(x))
assert torch_sap.pq_index(x) > 0 and torch_sap.gini_index(x) > 0
"""


def test_the_default_device_does_not_matter(tmp_path):
    root = Path(torch_sap.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", DEFAULT_DEVICE]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
