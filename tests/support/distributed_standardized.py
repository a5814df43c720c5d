"""Masks behind weight standardization, of a model that several processes share."""

import copy

import torch
from distributed_models import full_state, step_alike
from fully_sharded import fully_shard
from torch import nn

import torch_sap


def standardized_convolutions(order):
    from timm.layers import ScaledStdConv2d, StdConv2d

    one = nn.Sequential(StdConv2d(3, 7, 3, padding=1), nn.ReLU(), ScaledStdConv2d(7, 5, 3))
    many = copy.deepcopy(one)
    if order == "shard, prune":
        fully_shard(many[0])
        fully_shard(many)
    for model in (one, many):
        torch_sap.neuron_unstructured(model, gamma=3.0)
    if order == "prune, shard":
        fully_shard(many[0])
        fully_shard(many)
    images = torch.randn(12, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (one, many)]
    for _ in range(3):
        step_alike(one, many, optimizers, images)
    expected = one(images)
    torch_sap.remove(many)
    torch.testing.assert_close(many(images), expected, rtol=1e-4, atol=1e-5)
    one.load_state_dict({**one.state_dict(), **renamed(full_state(many))})
    torch.testing.assert_close(torch_sap.remove(one)(images), expected, rtol=1e-4, atol=1e-5)


def renamed(state):
    return {name.replace("weight", "weight_orig"): value for name, value in state.items()}
