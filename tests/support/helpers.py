"""Small models, training by hand, and exact comparison of model states: shared by the tests."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

import torch_sap

FUNCTIONS = {
    "global": torch_sap.global_unstructured,
    "layer": torch_sap.layer_unstructured,
    "neuron": torch_sap.neuron_unstructured,
}
SCOPES = list(FUNCTIONS)


def import_transformers():
    """transformers; the test or module is skipped without it, or with a PyTorch that is too old for it."""
    transformers = pytest.importorskip("transformers")
    if not transformers.utils.is_torch_available():
        pytest.skip("needs PyTorch 2.6 or newer, which transformers asks for", allow_module_level=True)
    return transformers


def mlp(dtype=torch.float32):
    """A trainable model with batch-norm buffers."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 4)).to(dtype)


def convnet():
    """A trainable convolutional model for inputs (N, 2, 6, 6)."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 4)
    )


def zoo(dtype=torch.float32):
    """Every kind of weight with a channel rule; not meant to be called."""
    torch.manual_seed(2)
    return nn.ModuleDict(
        {
            "linear": nn.Linear(7, 5),
            "conv": nn.Conv2d(3, 4, 3),
            "grouped": nn.Conv2d(6, 4, 2, groups=2),
            "transposed": nn.ConvTranspose2d(6, 4, 2, groups=2),
            "plain_transposed": nn.ConvTranspose1d(3, 5, 2),
            "embedding": nn.Embedding(6, 4),
            "norm": nn.BatchNorm2d(4),
        }
    ).to(dtype)


def of_package(package, name, **attributes):
    """An empty module of a class that seems to come from a package; tensors become Parameters."""
    made = type(name, (nn.Module,), {"__module__": f"{package}.models.fake"})()
    for key, value in attributes.items():
        setattr(made, key, nn.Parameter(value) if isinstance(value, torch.Tensor) else value)
    return made


class Mixed(nn.Module):
    """Weights by the paper's rule beside parameters that stay dense."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.recurrent = nn.LSTM(8, 4)
        self.norm = nn.LayerNorm((2, 8))
        self.bilinear = nn.Bilinear(3, 4, 5)
        self.position = nn.Parameter(torch.randn(1, 4, 8))
        self.class_token = nn.Parameter(torch.randn(1, 1, 8))
        self.scale = nn.LayerNorm(8)
        self.custom_weights = nn.Parameter(torch.randn(2, 3))


ZOO_TRANSPOSED = {"transposed.weight": 2, "plain_transposed.weight": 1}


TRAINABLE = {"mlp": (mlp, (5, 6)), "convnet": (convnet, (5, 2, 6, 6))}
"""How to make a model, and the shape of its inputs."""


def half_pruned(kind="mlp"):
    """A pruned model and the shape of its inputs."""
    make, shape = TRAINABLE[kind]
    model = make()
    torch_sap.layer_unstructured(model, eta_r=0.5)
    assert_held(model)
    return model, shape


def weight_names(model):
    """Dotted names, as before pruning, by the paper's rule; shared weights once, without tables and norm scales."""
    names, seen = {}, set()
    for path, parameter in model.named_parameters(remove_duplicate=False):
        holder, _, own = path.rpartition(".")
        names.setdefault(parameter, path.removesuffix("_orig"))
        dense = isinstance(model.get_submodule(holder), (nn.Embedding, nn.LayerNorm))
        if "weight" in own and parameter.dim() > 1 and not dense:
            seen.add(parameter)
    return [name for parameter, name in names.items() if parameter in seen]


def lookup(model, name):
    """The module and the attribute name of a dotted parameter name."""
    path, _, own = name.rpartition(".")
    return model.get_submodule(path), own


def value_of(model, name):
    """The stored tensor, whether pruned or not."""
    module, own = lookup(model, name)
    parameters = dict(module.named_parameters(recurse=False))
    return parameters.get(own + "_orig", parameters.get(own)).detach()


def mask_of(model, name):
    """The mask as bool; ones where there is none."""
    module, own = lookup(model, name)
    mask = dict(module.named_buffers(recurse=False)).get(own + "_mask")
    return torch.ones_like(value_of(model, name), dtype=torch.bool) if mask is None else mask.bool()


def masks_of(model):
    return {name: mask_of(model, name).clone() for name in weight_names(model)}


def arrays(model):
    """Weights as float64 arrays and masks as bool arrays, for the reference."""
    names = weight_names(model)
    weights = {name: value_of(model, name).double().numpy().copy() for name in names}
    return weights, {name: mask_of(model, name).numpy().copy() for name in names}


def bits(tensor):
    """The bytes of a tensor, so that NaN equals itself and -0.0 differs from 0.0."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).clone()


def hooks(model):
    """Every hook of the model by identity, with the length of containers."""
    kinds = (
        "_forward_pre_hooks",
        "_forward_hooks",
        "_backward_hooks",
        "_state_dict_hooks",
        "_load_state_dict_pre_hooks",
    )
    return [
        (path, kind, key, id(hook), len(hook) if isinstance(hook, prune.PruningContainer) else 1)
        for path, module in model.named_modules()
        for kind in kinds
        for key, hook in getattr(module, kind, {}).items()
    ]


def snapshot(model):
    """Everything that a refused call must leave as before."""
    return {
        "keys": list(model.state_dict()),
        "values": {key: bits(value) for key, value in model.state_dict().items()},
        "parameters": [(name, id(parameter)) for name, parameter in model.named_parameters()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "hooks": hooks(model),
        "training": [module.training for module in model.modules()],
    }


def assert_unchanged(model, before):
    after = snapshot(model)
    for part in ("keys", "parameters", "requires_grad", "hooks", "training"):
        assert after[part] == before[part], part
    for key, value in before["values"].items():
        assert torch.equal(after["values"][key], value), key


def assert_held(model, pruned=True):
    """Check that weights are live references with zeros at pruned entries, and that something is pruned."""
    count = 0
    for name in weight_names(model):
        module, own = lookup(model, name)
        assert getattr(module, own) is getattr(module, own + "_orig"), name
        mask = mask_of(model, name)
        assert torch.count_nonzero(value_of(model, name)[~mask]) == 0, name
        count += int((~mask).sum())
    assert bool(count) == pruned


def fit(model, optimizer, shape, steps=4, masks=None, seed=3):
    """Train on random batches; with masks, by hand on a dense model. Returns the losses."""
    generator = torch.Generator().manual_seed(seed)
    named = {name: value for name, value in model.named_parameters() if name in (masks or {})}
    losses = []
    for _ in range(steps):
        dtype = next(model.parameters()).dtype
        inputs = torch.randn(shape, generator=generator).to(dtype)
        output = model(inputs)
        loss = ((output[0] if isinstance(output, tuple) else output) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in named.items():
            parameter.grad.mul_(masks[name])
        optimizer.step()
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.mul_(masks[name])
        losses.append(loss.item())
    return losses


def masked_by_hand(dense, masks):
    """Multiply the weights of a model by masks, in place, and return it."""
    with torch.no_grad():
        for name, mask in masks.items():
            value_of(dense, name).mul_(mask)
    return dense


class RaiseAt(TorchDispatchMode):
    """Raise an error in place of this thread's n-th operation of PyTorch, once; count them all."""

    def __init__(self, number, error):
        super().__init__()
        self.number, self.error, self.count = number, error, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.number:
            raise self.error
        return function(*args, **(kwargs or {}))


def tiny_convnet():
    """A model of few operations, with statistics of a batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 5))
    model(torch.randn(3, 2, 6, 6))
    return model
