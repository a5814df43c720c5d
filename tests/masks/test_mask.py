"""Masks held in place: the form of PyTorch, a live reference, copies, other methods, whole or not at all."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from helpers import (
    FUNCTIONS,
    SCOPES,
    TRAINABLE,
    RaiseAt,
    assert_held,
    bits,
    fit,
    half_pruned,
    hooks,
    mask_of,
    masks_of,
    mlp,
    tiny_convnet,
    value_of,
)
from torch import nn
from torch.nn.utils import prune
from torch.optim.optimizer import _global_optimizer_post_hooks

from torch_sap import SAP, layer_unstructured, remove

each_model = pytest.mark.parametrize("kind", TRAINABLE)


def momentum(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def test_form_and_keys_are_those_of_pytorch():
    model, _ = half_pruned()
    other = mlp()
    for place in (0, 3):
        prune.l1_unstructured(other[place], "weight", 0.5)
        assert prune.is_pruned(model[place])
        assert model[place].weight_mask.dtype == torch.bool
        assert isinstance(model[place].weight_orig, nn.Parameter)
    assert set(model.state_dict()) == set(other.state_dict())
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in other.named_parameters()}


def test_parameters_are_the_same_objects_and_leave_no_gap():
    model = mlp()
    before = {id(parameter) for parameter in model.parameters()}
    layer_unstructured(model, eta_r=0.5)
    layer_unstructured(model, eta_r=0.5)
    assert {id(parameter) for parameter in model.parameters()} == before
    assert len(list(model.parameters())) == len(before)
    remove(model)
    assert {id(parameter) for parameter in model.parameters()} == before


@each_model
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
@pytest.mark.parametrize("trained", [False, True])
def test_a_copy_that_is_trained_keeps_its_zeros(kind, how, trained, tmp_path):
    model, shape = half_pruned(kind)
    if trained:
        fit(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), shape)
    if how == "save":
        torch.save(model, tmp_path / "model.pt")
        copied = torch.load(tmp_path / "model.pt", weights_only=False)
    else:
        copied = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert_held(copied)
    assert copied[0].weight is not model[0].weight
    optimizers = [torch.optim.AdamW(each.parameters(), lr=0.02) for each in (model, copied)]
    assert fit(model, optimizers[0], shape) == fit(copied, optimizers[1], shape)
    assert_held(copied)
    copied(torch.randn(shape)).square().mean().backward()
    mask = mask_of(copied, "0.weight")
    assert torch.count_nonzero(copied[0].weight_orig.grad[~mask]) == 0
    assert torch.count_nonzero(copied[0].weight_orig.grad[mask]) > 0
    FUNCTIONS["layer"](copied, eta_r=0.2)
    assert int(mask_of(copied, "0.weight").sum()) < int(mask_of(model, "0.weight").sum())
    assert_held(model)


@pytest.mark.parametrize("scope", SCOPES)
def test_twenty_rounds_leave_one_hook_and_nothing_that_grows(scope):
    model, shape = mlp(), (5, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sizes, counts, global_hooks = [], [], []
    for _ in range(20):
        FUNCTIONS[scope](model, eta_r=0.01, beta=0.1)
        fit(model, optimizer, shape, steps=1)
        model.zero_grad()
        counts.append(len(hooks(model)))
        sizes.append(len(pickle.dumps(model)))
        global_hooks.append(len(_global_optimizer_post_hooks))
        for place in (0, 3):
            (hook,) = (
                hook for hook in model[place]._forward_pre_hooks.values() if isinstance(hook, prune.BasePruningMethod)
            )
            assert not isinstance(hook, prune.PruningContainer) or len(hook) == 1
            kept = [value for value in vars(hook).values() if isinstance(value, torch.Tensor)]
            assert all(isinstance(value, nn.Parameter) for value in kept), "no mask kept in the hook"
    assert len(set(counts)) == 1
    assert len(set(global_hooks)) == 1
    assert max(sizes[1:]) <= sizes[1]


def test_prune_remove_of_pytorch_gives_the_original_keys():
    model, shape = half_pruned()
    masks, identities = masks_of(model), {id(parameter) for parameter in model.parameters()}
    fit(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), shape)
    expected = model.eval()(torch.ones(2, 6))
    for place in (0, 3):
        prune.remove(model[place], "weight")
    assert not prune.is_pruned(model)
    assert set(model.state_dict()) == set(mlp().state_dict())
    assert {id(parameter) for parameter in model.parameters()} == identities
    assert torch.equal(model(torch.ones(2, 6)), expected)
    for name, mask in masks.items():
        assert torch.count_nonzero(value_of(model, name)[~mask]) == 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fit(model, optimizer, shape)
    assert torch.count_nonzero(model[0].weight[~masks["0.weight"]]) > 0, "a dense model again"


@pytest.mark.parametrize("foreign", ["l1", "ln", "random", "custom"])
def test_a_foreign_method_before(foreign):
    model, shape = mlp(), (5, 6)
    apply = {
        "l1": lambda: prune.l1_unstructured(model[0], "weight", 0.4),
        "ln": lambda: prune.ln_structured(model[0], "weight", 0.4, n=2, dim=0),
        "random": lambda: prune.random_unstructured(model[0], "weight", 0.4),
        "custom": lambda: prune.custom_from_mask(model[0], "weight", torch.eye(9, 6) + torch.ones(9, 1)),
    }
    apply[foreign]()
    fit(model, torch.optim.SGD(model.parameters(), lr=0.1), shape)
    before = mask_of(model, "0.weight").clone()
    layer_unstructured(model, eta_r=0.5)
    assert not (mask_of(model, "0.weight") & ~before).any()
    assert_held(model)
    fit(model, torch.optim.AdamW(model.parameters(), lr=0.1), shape)
    assert_held(model)
    assert (
        len([hook for hook in model[0]._forward_pre_hooks.values() if isinstance(hook, prune.BasePruningMethod)]) == 1
    )
    copy.deepcopy(model)


@pytest.mark.parametrize("foreign", [prune.L1Unstructured, prune.RandomUnstructured])
def test_a_foreign_method_on_top_and_ours_again(foreign):
    model, shape = half_pruned()
    before = mask_of(model, "0.weight").clone()
    foreign.apply(model[0], "weight", amount=4)
    between = mask_of(model, "0.weight").clone()
    assert int(between.sum()) == int(before.sum()) - 4
    assert not (between & ~before).any()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    fit(model, optimizer, shape)
    assert torch.count_nonzero(model[0].weight[~between]) == 0
    layer_unstructured(model, eta_r=0.2)
    assert not (mask_of(model, "0.weight") & ~between).any()
    assert int(mask_of(model, "0.weight").sum()) < int(between.sum())
    assert_held(model)
    fit(model, optimizer, shape)
    assert_held(model)
    remove(model)
    assert set(model.state_dict()) == set(mlp().state_dict())


def every_hook(module):
    kinds = [kind for kind in vars(module) if kind.endswith("_hooks")]
    tensor_hooks = ("_backward_hooks", "_post_accumulate_grad_hooks")
    on_tensors = [getattr(tensor, kind, None) or () for tensor in module.parameters() for kind in tensor_hooks]
    return {kind: len(getattr(module, kind)) for kind in kinds}, sorted(len(hooks) for hooks in on_tensors)


@pytest.mark.parametrize("removed", [False, True])
def test_methods_in_turn_leave_nothing_that_grows(removed):
    """PyTorch tells our hook neither of the method on top of it nor of the removal of both."""
    model, _ = half_pruned()
    once, dense = every_hook(model[0]), every_hook(mlp()[0])
    for _ in range(3):
        prune.random_unstructured(model[0], "weight", amount=2)
        if removed:
            prune.remove(model[0], "weight")
        layer_unstructured(model, gamma=0)
        assert every_hook(model[0]) == once
    prune.random_unstructured(model[0], "weight", amount=2)
    assert every_hook(remove(model)[0]) == dense


def test_a_foreign_method_on_top_then_prune_remove():
    model, _ = half_pruned()
    prune.l1_unstructured(model[0], "weight", amount=4)
    mask = mask_of(model, "0.weight").clone()
    prune.remove(model[0], "weight")
    assert torch.equal(model[0].weight != 0, mask)
    assert not prune.is_pruned(model[0])


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("convert", [nn.Module.double, nn.Module.half, lambda model: model.to("cpu", torch.bfloat16)])
def test_conversions_keep_the_live_reference(convert, overwrite):
    model = mlp()
    layer_unstructured(model, eta_r=0.5)
    masks = masks_of(model)
    torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
    try:
        convert(model)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert model[0].weight_mask.dtype == torch.bool
    dtype = model[0].weight_orig.dtype
    output = model(torch.randn(5, 6).to(dtype))
    assert output.dtype == dtype
    assert model[0].weight.dtype == dtype
    fit(model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), (5, 6))
    assert_held(model)
    assert all(torch.equal(mask, masks[name]) for name, mask in masks_of(model).items())


@pytest.mark.parametrize("when", ["before", "after"])
def test_frozen_weights(when):
    model = mlp()
    if when == "before":
        model[0].weight.requires_grad_(False)
    layer_unstructured(model, eta_r=0.3)
    model[0].weight_orig.requires_grad_(False)
    frozen = model[0].weight_orig.clone()
    fit(model, torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1), (5, 6))
    assert torch.equal(model[0].weight, frozen)
    assert model[0].weight_orig.grad is None
    assert_held(model)
    layer_unstructured(model, eta_r=0.3)
    assert [value.requires_grad for value in model.parameters()].count(False) == 1
    model[0].weight_orig.requires_grad_(True)
    fit(model, momentum(model), (5, 6))
    assert_held(model)
    assert not torch.equal(model[0].weight, frozen)
    assert torch.count_nonzero(model[0].weight_orig.grad[~mask_of(model, "0.weight")]) == 0


SCRIPT = """
import sys, torch
model, optimizer = torch.load(sys.argv[1], weights_only=False)
model(torch.randn(5, 6)).square().mean().backward()
module = model[0]
assert module.weight is module.weight_orig
assert not module.weight_orig.grad[~module.weight_mask].any()
module.weight_orig.data.fill_(1.0)
optimizer.step()
assert not module.weight_orig[~module.weight_mask].any()
"""


def test_a_saved_module_trained_in_a_new_process_keeps_its_zeros(tmp_path):
    model, shape = half_pruned()
    optimizer = momentum(model)
    fit(model, optimizer, shape)
    torch.save([model, optimizer], tmp_path / "model.pt")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "model.pt")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr


AT_THE_END = """
import sys
import torch
from torch import nn
torch.main = sys.modules["__main__"]  # as dill does where it is installed: the script's globals go late
import torch_sap
model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
torch_sap.layer_unstructured(model)
"""


def test_a_model_that_outlives_the_globals_of_modules_ends_quietly():
    command = [sys.executable, "-W", "ignore", "-c", AT_THE_END]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def small_model(again):
    model = tiny_convnet()
    if again:
        layer_unstructured(model, gamma=0.5)
    return model


def state_of(model):
    return {key: bits(value).tolist() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("again", [False, True], ids=["first", "again"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), MemoryError(), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("scope", SCOPES)
def test_a_whole_model_function_is_whole_or_not_at_all(scope, error, again):
    """At whichever operation an error comes, the model is as before the call or as after it."""
    model = small_model(again)
    before, twin = state_of(model), copy.deepcopy(model)  # which is asked whether it has changed
    with RaiseAt(0, error) as counting:
        FUNCTIONS[scope](model)
    after, left = state_of(model), []
    for number in range(1, counting.count + 1):
        model = small_model(again)
        twin = copy.deepcopy(model)
        with RaiseAt(number, error), pytest.raises(type(error)):
            FUNCTIONS[scope](model)
        assert state_of(twin) == before
        left.append("before" if state_of(model) == before else "after" if state_of(model) == after else "between")
    assert before != after
    assert len(left) > 10
    assert set(left) == {"before", "after"} or (again and set(left) == {"before"})


@pytest.mark.parametrize("first", [layer_unstructured, SAP])
def test_masks_made_in_inference_mode_can_be_trained_with_and_pruned_further(first):
    model = mlp()
    with torch.inference_mode():
        pruner = first(model)
    optimizer = momentum(model)
    fit(model, optimizer, (5, 6))
    layer_unstructured(model)
    if first is SAP:
        with torch.inference_mode():
            pruner.step()
    model.load_state_dict(copy.deepcopy(model).state_dict())
    fit(model, optimizer, (5, 6))
    assert_held(model)
