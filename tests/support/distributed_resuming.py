"""Runs in DistributedDataParallel that are interrupted and continue from the file that the first process writes."""

import os

import pytest
import torch
import torch.distributed as dist
from helpers import mlp
from torch.nn.parallel import DistributedDataParallel

from torch_sap import iterative_sap


def train(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 6)).square().sum().backward()  # other numbers on each process, which the file has to hold
        optimizer.step()


def interrupted(found):
    raise KeyboardInterrupt


def run(path, seed, **settings):
    torch.manual_seed(10 * seed + dist.get_rank())
    model = DistributedDataParallel(mlp())
    return model, iterative_sap(model, train, iterations=3, checkpoint=path, **settings)


def a_run_resumes(folder):
    expected, history = run(os.path.join(folder, "whole"), 0)
    path = os.path.join(folder, "interrupted")
    with pytest.raises(KeyboardInterrupt):
        run(path, 0, callback=interrupted)
    model, resumed = run(path, 1)
    assert [found.remaining for found in resumed] == [found.remaining for found in history]
    for (key, value), other in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(value, other), key
    assert len(os.listdir(folder)) == 2, "one file per run, whole"
    with pytest.raises(ValueError, match=r"gamma: 0\.5 here, 1\.0 in the file"):
        run(path, 0, gamma=0.5)
    with pytest.raises(ValueError, match="checkpoint must be None among several processes"):
        iterative_sap(mlp(), train, checkpoint=path)


def damaged_for_one_process(folder):
    path = os.path.join(folder, f"damaged-{dist.get_rank()}")  # only the second process finds a file
    if dist.get_rank() == 1:
        with open(path, "wb") as file:
            file.write(b"rubbish")
    with pytest.raises((ValueError, RuntimeError, FileNotFoundError)):
        run(path, 0)
