"""A model for several processes, and its comparison with the same model on one."""

import torch
import torch.distributed as dist
from fully_sharded import fully_shard
from torch import nn
from torch.distributed.tensor import DTensor


def mlp():
    """Row numbers that neither 2 nor 3 processes share evenly; with 3 one has nothing of the last weight."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 11), nn.ReLU(), nn.Linear(11, 5), nn.ReLU(), nn.Linear(5, 1))


def shard(model):
    fully_shard(model[2])
    return fully_shard(model)


def data():
    return torch.randn(12, 7, generator=torch.Generator().manual_seed(3))


def mine(batch):
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def full_state(model):
    return {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in model.state_dict().items()}


def assert_same_model(model, expected):
    """The same masks to the bit, the same values to rounding, zeros where the masks say so."""
    state = full_state(model)
    assert list(state) == list(expected.state_dict())
    for key, value in expected.state_dict().items():
        if key.endswith("_mask"):
            assert torch.equal(state[key], value), key
            assert torch.count_nonzero(state[key.replace("_mask", "_orig")][~value]) == 0, key
        else:
            torch.testing.assert_close(state[key], value)


def step_alike(one, many, optimizers, batch):
    """A training step of the model on one process, and of that on many, each with its share of the batch."""
    losses = []
    for model, optimizer, inputs in zip((one, many), optimizers, (batch, mine(batch)), strict=True):
        optimizer.zero_grad()
        losses.append(model(inputs).square().mean())
        losses[-1].backward()
        optimizer.step()
    dist.all_reduce(losses[1].detach())
    torch.testing.assert_close(losses[1] / dist.get_world_size(), losses[0])
    assert_same_model(many, one)


def assert_same_report(report, expected, rounding=1e-12):
    assert report.tensors == expected.tensors
    assert list(report.groups) == list(expected.groups)
    for name, group in expected.groups.items():
        torch.testing.assert_close(report.groups[name].index, group.index, rtol=0, atol=rounding, equal_nan=True)
        assert (report.groups[name].c == group.c).all()
        assert (report.groups[name].d == group.d).all()
