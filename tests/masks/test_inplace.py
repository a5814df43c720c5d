"""How the whole-model functions hold masks: live reference, zeros in every optimizer, copies, other methods."""

import copy
import pickle

import pytest
import torch
from helpers import (
    FUNCTIONS,
    SCOPES,
    assert_held,
    clone,
    convnet,
    fit,
    hooks,
    mask_of,
    masked_by_hand,
    masks_of,
    mlp,
    value_of,
    weight_names,
)
from torch import nn
from torch.nn.utils import prune
from torch.optim.optimizer import _global_optimizer_post_hooks

from torch_sap import layer_unstructured, neuron_unstructured, remove

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1),
    "adam fused": lambda parameters: torch.optim.Adam(parameters, lr=0.02, fused=True),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, momentum=0.9, foreach=True),
}
MODELS = {"mlp": (mlp, (5, 6)), "convnet": (convnet, (5, 2, 6, 6))}
each_model = pytest.mark.parametrize("kind", MODELS)


def half_pruned(kind="mlp"):
    make, shape = MODELS[kind]
    model = make()
    layer_unstructured(model, eta_r=0.5)
    assert_held(model)
    return model, shape


def assert_same_weights(model, dense):
    for name, value in dense.named_parameters():
        stored = value_of(model, name) if name in weight_names(dense) else dict(model.named_parameters())[name]
        assert torch.equal(stored, value), name


@each_model
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("made", ["before", "after"])
def test_training_equals_training_masked_by_hand(kind, optimizer, made):
    make, shape = MODELS[kind]
    model, dense = make(), make()
    early = [OPTIMIZERS[optimizer](each.parameters()) for each in (model, dense)]
    assert fit(model, early[0], shape) == fit(dense, early[1], shape)
    layer_unstructured(model, eta_r=0.5)
    masks = masks_of(model)
    masked_by_hand(dense, masks)
    late = [OPTIMIZERS[optimizer](each.parameters()) for each in (model, dense)]
    ours, theirs = early if made == "before" else late
    assert fit(model, ours, shape, seed=7) == fit(dense, theirs, shape, masks=masks, seed=7)
    assert_same_weights(model, dense)
    assert_held(model)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zeros_after_every_single_step(optimizer):
    model, shape = mlp(), (5, 6)
    made = OPTIMIZERS[optimizer](model.parameters())
    fit(model, made, shape)
    for round_number in range(3):
        neuron_unstructured(model, eta_r=0.3)
        for step in range(3):
            fit(model, made, shape, steps=1, seed=10 * round_number + step)
            assert_held(model)


def test_closure_accumulation_and_scheduler():
    model, shape = half_pruned()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    inputs = torch.randn(shape)

    def closure():
        optimizer.zero_grad()
        for part in inputs.split(2):
            model(torch.cat([part, part])).square().mean().backward()
        return model(inputs).square().mean()

    optimizer.step(closure)
    assert_held(model)


@each_model
def test_gradient_is_masked(kind):
    model, shape = half_pruned(kind)
    make, _ = MODELS[kind]
    dense, inputs = masked_by_hand(make(), masks_of(model)), torch.randn(shape)
    for each in (model, dense):
        for _ in range(2):
            each(inputs).square().mean().backward()
    for name in weight_names(dense):
        own, mask = dict(model.named_parameters())[name + "_orig"].grad, mask_of(model, name)
        assert torch.equal(own, dict(dense.named_parameters())[name].grad * mask)
        assert torch.count_nonzero(own[~mask]) == 0


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


def test_pruning_many_models_registers_one_optimizer_hook():
    half_pruned()
    before = len(_global_optimizer_post_hooks)
    for _ in range(5):
        half_pruned()
    assert len(_global_optimizer_post_hooks) == before


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


def test_clone_is_independent():
    model, _ = half_pruned()
    twin = clone(model)
    layer_unstructured(twin, eta_r=0.3)
    assert int(mask_of(twin, "0.weight").sum()) < int(mask_of(model, "0.weight").sum())
