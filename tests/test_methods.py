"""PQIGlobal, PQILayer, and PQINeuron in PyTorch's own functions: what PyTorch's tests ask of a method, and mixtures."""

import copy
import inspect
import io
import pickle
from unittest import mock

import numpy as np
import pytest
import reference
import torch
from helpers import assert_unchanged, mlp, snapshot
from torch import nn
from torch.nn.utils import prune

from torch_sap import PQIGlobal, PQILayer, PQINeuron

CLASSES = {"global": PQIGlobal, "layer": PQILayer, "neuron": PQINeuron}
SCOPE_OF = {method: scope for scope, method in CLASSES.items()}
ARGUMENTS = {"p": 0.5, "q": 1.0, "eta_r": 0.7, "gamma": 1.0, "beta": 0.8}
FOREIGN = {
    "l1": (prune.L1Unstructured, {"amount": 0.3}),
    "random": (prune.RandomUnstructured, {"amount": 0.3}),
    "ln": (prune.LnStructured, {"amount": 1, "n": 2, "dim": 0}),
    "identity": (prune.Identity, {}),
}
each_method = pytest.mark.parametrize("method", CLASSES.values(), ids=CLASSES)
# A bias has no rows, as for PyTorch's structured methods.
each_method_and_tensor = pytest.mark.parametrize(
    ("method", "name"),
    [
        (method, name)
        for method in CLASSES.values()
        for name in ("weight", "bias")
        if (method, name) != (PQINeuron, "bias")
    ],
)

each_module = pytest.mark.parametrize(
    "make", [lambda: nn.Linear(5, 7), lambda: nn.Conv3d(2, 3, 2)], ids=["fc", "conv3d"]
)


def expected_mask(scope, tensor, mask=None, dim=0, **arguments):
    mask = torch.ones_like(tensor) if mask is None else mask
    weights, masks = {"w": tensor.detach().double().numpy()}, {"w": mask.bool().numpy()}
    return torch.from_numpy(reference.prune(weights, masks, scope, dim=dim, **arguments)[0]["w"])


@each_method_and_tensor
@each_module
def test_parameter_mask_and_product(method, make, name):
    module = make()
    original, copied = getattr(module, name), getattr(module, name).detach().clone()
    method.apply(module, name, **ARGUMENTS)
    orig, mask = getattr(module, name + "_orig"), getattr(module, name + "_mask")
    assert orig.size() == mask.size() == getattr(module, name).size() == original.size()
    assert orig is original
    assert torch.equal(orig, copied), "weight_orig keeps the unpruned values"
    assert torch.equal(getattr(module, name), orig * mask.to(orig.dtype))
    assert not isinstance(getattr(module, name), nn.Parameter)


@each_method_and_tensor
@each_module
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mask_is_the_reference(method, make, name, dtype):
    module = make().to(dtype)
    expected = expected_mask(SCOPE_OF[method], getattr(module, name), **ARGUMENTS)
    method.apply(module, name, **ARGUMENTS)
    assert torch.equal(getattr(module, name + "_mask").bool(), expected)
    assert name == "bias" or 0 < int(expected.sum()) < expected.numel()


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_neuron_dim(dim):
    module = nn.Conv1d(4, 5, 3)
    expected = expected_mask("neuron", module.weight, dim=dim % 3, **ARGUMENTS)
    PQINeuron.apply(module, "weight", **ARGUMENTS, dim=dim)
    assert torch.equal(module.weight_mask.bool(), expected)
    others = [
        expected_mask("neuron", module.weight_orig, dim=axis, **ARGUMENTS) for axis in range(3) if axis != dim % 3
    ]
    assert not any(torch.equal(expected, other) for other in others)


@each_method
def test_mask_of_ones_changes_nothing(method):
    inputs, module = torch.ones(1, 5), nn.Linear(5, 2)
    nn.init.constant_(module.weight, -0.25)
    before = module(inputs)
    before.sum().backward()
    gradients = [parameter.grad.clone() for parameter in (module.weight, module.bias)]
    module.zero_grad()
    method.apply(module, "weight")
    assert module.weight_mask.bool().all(), "equal values: the PQ Index is zero and nothing goes"
    first, second = module(inputs), module(inputs)
    assert torch.equal(first, before)
    assert torch.equal(second, before)
    second.sum().backward()
    assert torch.equal(module.weight_orig.grad, gradients[0])
    assert torch.equal(module.bias.grad, gradients[1])


@each_method
@each_module
def test_pickle_and_torch_save(method, make):
    module = make()
    for name in ("weight",) if method is PQINeuron else ("weight", "bias"):
        method.apply(module, name, **ARGUMENTS)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for loaded in (pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)):
        assert type(loaded) is type(module)
        assert list(loaded.state_dict()) == list(module.state_dict())
        assert torch.equal(loaded.weight, module.weight)
        assert not torch.equal(loaded.weight, loaded.weight_orig)
        method.apply(loaded, "weight", **ARGUMENTS)
        assert int(loaded.weight_mask.sum()) < int(module.weight_mask.sum())


@each_method
def test_deepcopy_of_a_module_pruned_without_gradients(method):
    module = nn.Linear(5, 7)
    with torch.no_grad():
        method.apply(module, "weight", **ARGUMENTS)
    copied = copy.deepcopy(module)
    method.apply(copied, "weight", **ARGUMENTS)
    assert int(copied.weight_mask.sum()) < int(module.weight_mask.sum())
    assert len(next(iter(copied._forward_pre_hooks.values()))) == 2
    assert not isinstance(next(iter(module._forward_pre_hooks.values())), prune.PruningContainer)


@each_method_and_tensor
@each_module
def test_remove(method, make, name):
    module = make()
    method.apply(module, name, **ARGUMENTS)
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    assert name + "_orig" in parameters
    assert name not in parameters
    assert name + "_mask" in buffers
    assert prune.is_pruned(module)
    pruned = getattr(module, name).detach().clone()
    prune.remove(module, name)
    assert set(dict(module.named_parameters())) == {"weight", "bias"}
    assert not dict(module.named_buffers())
    assert not prune.is_pruned(module)
    assert torch.equal(getattr(module, name), pruned)
    with pytest.raises(ValueError, match="has to be pruned"):
        prune.remove(module, name)


@each_method
def test_state_dict_goes_into_another_pruned_model_and_after_remove_into_a_dense_one(method):
    def make():
        return nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 1))

    model, other, inputs = make(), make(), torch.randn(3, 10)
    assert "0.weight" in model.state_dict()
    for pruned in (model, other):
        method.apply(pruned[0], "weight", **ARGUMENTS)
    keys = set(model.state_dict())
    assert {"0.weight_orig", "0.weight_mask"} <= keys
    assert "0.weight" not in keys
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(inputs), model(inputs))
    output = model(inputs)
    prune.remove(model[0], "weight")
    dense = make()
    dense.load_state_dict(model.state_dict())
    assert torch.equal(dense(inputs), output)
    assert torch.count_nonzero(dense[0].weight) < dense[0].weight.numel()


@pytest.mark.parametrize("scope", CLASSES)
def test_prune_of_a_raw_tensor(scope):
    t = torch.tensor([[1.0, 2.0, -3.0, 4.0], [5.0, -6.0, 70.0, 8.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 1]])
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.5, -1.6, 1.7, 0.2]])
    method = CLASSES[scope](**ARGUMENTS)
    for default in (None, mask):
        expected = expected_mask(scope, t, default, **ARGUMENTS)
        assert torch.equal(method.prune(t, default), t * expected)
        assert torch.equal(method.prune(t, default, importance_scores=t), t * expected)
        expected = expected_mask(scope, scores, default, **ARGUMENTS)
        assert torch.equal(method.prune(t, default, importance_scores=scores), t * expected)
    with pytest.raises(AssertionError, match="same shape"):
        method.prune(t, mask, importance_scores=torch.ones(4, 2))


@each_method
def test_equal_magnitudes_go_in_order_of_position(method):
    t = 2.0 * torch.tensor([[1, -1, 0, 1, -1, 0, 1], [-1, 1, 0, 0, 1, 1, -1]])
    mask = method(eta_r=1.0, beta=0.5).compute_mask(t, default_mask=torch.ones_like(t))
    expected = expected_mask(SCOPE_OF[method], t, eta_r=1.0, beta=0.5)
    assert torch.equal(mask.bool(), expected)
    assert int(expected.sum()) in (7, 8)
    assert int((t[~expected] != 0).sum()) > 0


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@each_method
def test_recurrent_modules(method, kind):
    module = kind(8, 8)
    assert sum(isinstance(weight, nn.Parameter) for weight in module._flat_weights) == 4
    method.apply(module, "weight_ih_l0", **ARGUMENTS)
    assert sum(isinstance(weight, nn.Parameter) for weight in module._flat_weights) == 3
    output, inputs = module(torch.ones(2, 1, 8))[0], torch.ones(2, 1, 8)
    prune.remove(module, "weight_ih_l0")
    assert sum(isinstance(weight, nn.Parameter) for weight in module._flat_weights) == 4
    assert "weight_ih_l0" in module._parameters
    assert "weight_ih_l0_orig" not in module._parameters
    assert torch.equal(module(inputs)[0], output)


def test_types_and_constructors():
    assert [method.PRUNING_TYPE for method in CLASSES.values()] == ["unstructured", "global", "global"]
    for method in CLASSES.values():
        assert issubclass(method, prune.BasePruningMethod)
        names = inspect.signature(method).parameters
        assert "amount" not in names
        assert all(parameter.default is not inspect.Parameter.empty for parameter in names.values())
        defaults = {name: names[name].default for name in ("p", "q", "eta_r", "gamma", "beta")}
        assert defaults == {"p": 0.5, "q": 1.0, "eta_r": 0.0, "gamma": 1.0, "beta": 0.9}
        method()
    assert inspect.signature(PQINeuron).parameters["dim"].default == 0


@each_method
def test_channels_last_counts_positions_as_usual(method):
    module = nn.Conv2d(4, 3, 3).to(memory_format=torch.channels_last)
    with torch.no_grad():
        module.weight.copy_(module.weight.mul(8).round())
    mask = method(**ARGUMENTS).compute_mask(module.weight, torch.ones_like(module.weight))
    np.testing.assert_array_equal(
        mask.bool().numpy(), expected_mask(SCOPE_OF[method], module.weight, **ARGUMENTS).numpy()
    )


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
