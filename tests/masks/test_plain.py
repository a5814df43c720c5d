"""dense_state_dict is what remove would leave, and the model stays pruned; plain states can be loaded."""

import copy
import threading
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import FUNCTIONS, assert_held, assert_unchanged, bits, convnet, mask_of, mlp, snapshot
from torch import nn
from torch.nn.utils import prune

import torch_sap
from torch_sap import dense_state_dict


class Tied(nn.Module):
    """A weight that two modules have, and weights under other names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.embedding, self.body, self.head = nn.Embedding(9, 8), nn.LSTM(8, 8), nn.Linear(8, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.body(self.embedding(x))[0])


MODELS = {"mlp": mlp, "bfloat16": lambda: mlp(torch.bfloat16), "convnet": convnet, "tied": Tied}
MODELS["channels_last"] = lambda: convnet().to(memory_format=torch.channels_last)
each_model = pytest.mark.parametrize("kind", MODELS)


def pruned_by_pytorch(model):
    for module, name in torch_sap.prunable_parameters(model):
        if not prune.is_pruned(module):
            prune.l1_unstructured(module, name, 0.5)
    return model


def assert_is_what_remove_leaves(make, order=list):
    model = make()
    before = snapshot(model)
    state = dense_state_dict(model)
    assert_unchanged(model, before)
    expected = torch_sap.remove(make()).state_dict()
    assert order(state) == order(expected)
    assert state._metadata == expected._metadata
    for key, value in expected.items():
        assert torch.equal(state[key], value), key
        assert state[key].dtype is value.dtype
        assert not state[key].requires_grad
    return state


@each_model
@pytest.mark.parametrize("scope", FUNCTIONS)
def test_it_is_what_remove_leaves(kind, scope):
    def pruned():
        model = MODELS[kind]()
        FUNCTIONS[scope](model, gamma=2.0)
        return model

    state = assert_is_what_remove_leaves(pruned)
    assert list(state) == list(MODELS[kind]().state_dict())


@pytest.mark.parametrize("kind", ["mlp", "convnet", "bfloat16"])
def test_masks_of_pytorch(kind):
    def on_top_of_ours():
        model = MODELS[kind]()
        torch_sap.layer_unstructured(model)
        prune.ln_structured(torch_sap.prunable_parameters(model)[0][0], "weight", 0.3, n=2, dim=0)
        return model

    assert_is_what_remove_leaves(lambda: pruned_by_pytorch(MODELS[kind]()))
    assert_is_what_remove_leaves(on_top_of_ours, order=set)  # prune.remove moves a weight behind its bias


@pytest.mark.parametrize("how", ["ours", "PyTorch's"])
@pytest.mark.parametrize("written", [7.0, -0.0, float("nan")])
def test_pruned_entries_are_zeros_whatever_was_written(how, written):
    model = mlp()
    if how == "ours":
        torch_sap.layer_unstructured(model)
    else:
        pruned_by_pytorch(model)
    masks = {}
    for name, module in model.named_modules():
        if hasattr(module, "weight_mask"):
            masks[f"{name}.weight"] = module.weight_mask.bool()
            module.weight_orig.data[~masks[f"{name}.weight"]] = written
    state = dense_state_dict(model)
    for name, mask in masks.items():
        assert not bits(state[name][~mask]).any()
        assert state[name][mask].all()


def test_nothing_is_copied_and_shared_tensors_stay_shared():
    class WithState(Tied):
        def get_extra_state(self):
            return {"step": 3}

    model = WithState()
    torch_sap.layer_unstructured(model)
    model.register_state_dict_post_hook(lambda module, state, prefix, _: state.update({prefix + "custom": 7}))
    state = dense_state_dict(model)
    assert state["head.weight"].data_ptr() == state["embedding.weight"].data_ptr()
    own = {tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    assert {value.data_ptr() for value in state.values() if isinstance(value, torch.Tensor)} <= own
    assert state["_extra_state"] == {"step": 3}
    assert state["custom"] == 7


def test_pytorchs_masks_of_a_shared_weight():
    model = Tied()
    prune.l1_unstructured(model.head, "weight", 0.5)  # the embedding stays dense
    with pytest.warns(UserWarning, match=r"embedding\.weight and head\.weight_orig are one parameter, but"):
        state = dense_state_dict(model)
    assert state["head.weight"].data_ptr() == state["embedding.weight"].data_ptr()
    assert torch.equal(state["head.weight"], model.head.weight)
    prune.custom_from_mask(model.embedding, "weight", model.head.weight_mask)
    assert torch.equal(dense_state_dict(model)["embedding.weight"], model.head.weight)  # alike: no warning


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, lambda m: torch.compile(nn.DataParallel(m))])
def test_wrappers_leave_no_trace_in_the_names(wrap):
    model = mlp()
    torch_sap.layer_unstructured(model)
    assert list(dense_state_dict(wrap(model))) == list(mlp().state_dict())


def test_a_dense_model_and_no_model():
    assert list(dense_state_dict(mlp())) == list(mlp().state_dict())
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        dense_state_dict({})


def test_other_threads_and_later_calls_see_the_pruned_keys():
    model = mlp()
    torch_sap.layer_unstructured(model)
    pruned, found = list(model.state_dict()), []

    def ask(*_):
        thread = threading.Thread(target=lambda: found.append(list(model.state_dict())))
        thread.start()
        thread.join()

    both = nn.ModuleList([mlp(), model])
    both[0].register_state_dict_post_hook(ask)
    assert list(dense_state_dict(both)) == [f"{i}.{key}" for i in range(2) for key in mlp().state_dict()]
    assert found == [pruned]
    assert list(model.state_dict()) == pruned
    assert not any("_save_to_state_dict" in vars(module) for module in model.modules())


def test_an_error_leaves_the_model_as_it_was():
    model = mlp()
    torch_sap.layer_unstructured(model)
    before = snapshot(model)
    handle = model.register_state_dict_post_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        dense_state_dict(model)
    handle.remove()
    assert_unchanged(model, before)


def test_torch_save_and_distributed_checkpoint(tmp_path):
    model = convnet()
    torch_sap.layer_unstructured(model)
    images = torch.randn(2, 2, 6, 6)
    expected = model.eval()(images)
    torch.save(dense_state_dict(model), tmp_path / "a.pt")
    fresh = convnet().eval()
    fresh.load_state_dict(torch.load(tmp_path / "a.pt", weights_only=True))
    assert torch.equal(fresh(images), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dcp: one process, no process group
        dcp.save({"model": dense_state_dict(model)}, checkpoint_id=tmp_path / "dcp")
        other = convnet().eval()
        state = {"model": other.state_dict()}
        dcp.load(state, checkpoint_id=tmp_path / "dcp")
    other.load_state_dict(state["model"])
    assert torch.equal(other(images), expected)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", ["mlp", "convnet", "tied"])
def test_a_plain_state_is_loaded_into_the_pruned_model(kind, assign):
    model = MODELS[kind]()
    torch_sap.layer_unstructured(model)
    other, state = copy.deepcopy(model), copy.deepcopy(dense_state_dict(model))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(7.0)
    given = list(state)
    missing, unexpected = other.load_state_dict(state, strict=False, assign=assign)
    assert missing == [key for key in model.state_dict() if key.endswith("_mask")]
    assert not unexpected
    assert list(state) == given
    assert_held(other)
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: ".*_mask"'):
        other.load_state_dict(state, assign=assign)


class SavesItself(nn.Linear):
    """Writes its state with code of its own, as PyTorch Geometric's Linear does."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()
        destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()


@pytest.mark.parametrize("keep_vars", [False, True])
def test_a_layer_that_saves_a_plain_weight_is_saved_with_its_mask(keep_vars):
    def make():
        return nn.Sequential(SavesItself(6, 5), nn.ReLU(), SavesItself(5, 2))

    model, other = make(), make()
    torch_sap.layer_unstructured(model, eta_r=0.5)
    torch_sap.layer_unstructured(other, gamma=0)
    state = copy.deepcopy(model).state_dict(prefix="net.", keep_vars=keep_vars)
    assert sorted(state) == sorted(
        f"net.{layer}.{key}" for layer in (0, 2) for key in ("weight_orig", "weight_mask", "bias")
    )
    assert isinstance(state["net.0.weight_orig"], nn.Parameter) is keep_vars
    other.load_state_dict(model.state_dict())
    for layer in (0, 2):
        assert torch.equal(other[layer].weight_mask, model[layer].weight_mask)
        assert not model[layer].weight_mask.all()
    assert_held(other)
    assert list(dense_state_dict(model)) == list(make().state_dict())
    assert_plain_again(torch_sap.remove(model), make())


def assert_plain_again(model, fresh):
    assert list(model.state_dict()) == list(fresh.state_dict())
    assert not any(module._state_dict_hooks for module in model.modules())


def test_a_plain_state_that_does_not_fit_the_masks_is_pruned_with_a_warning():
    model = mlp()
    torch_sap.layer_unstructured(model)
    mask = mask_of(model, "0.weight").clone()
    torch.manual_seed(1)
    dense = {key: torch.ones_like(value) for key, value in mlp().state_dict().items()}
    with pytest.warns(UserWarning, match="not zero where the model is pruned"):
        model.load_state_dict(dense, strict=False)
    assert torch.equal(model[0].weight, dense["0.weight"] * mask)
    assert torch.equal(model[0].weight_mask, mask)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(dense_state_dict(model) | {"0.weight": torch.zeros(2, 2)})
