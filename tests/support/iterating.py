"""Small iterative prunings: settings, a training, and states to compare."""

import dataclasses
import io
import math

import numpy as np
import torch
from helpers import fit

ARGUMENTS = {"p": 0.5, "q": 1.0, "eta_r": 0.05, "gamma": 1.0, "beta": 0.6}


def trainer(shape, steps=4):
    """Make a train_fn with its own optimizer and new data per call."""

    def train(model):
        train.rounds += 1
        fit(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), shape, steps=steps, seed=train.rounds)

    train.rounds = 0
    return train


def assert_rewound(model, start, masks):
    """Check that the model has the state, with zeros where the masks are False."""
    for key, value in state_without_masks(model).items():
        expected = torch.where(masks[key], start[key], 0) if key in masks else start[key]
        assert torch.equal(value, expected), key


def state_without_masks(model):
    return {key.removesuffix("_orig"): value.clone() for key, value in model.state_dict().items() if "_mask" not in key}


def saved(thing):
    """Return the thing after torch.save and torch.load."""
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same_record(first, second):
    """Check that records are equal field by field, with arrays and NaN."""
    assert type(first) is type(second) or isinstance(first, int | float)
    if dataclasses.is_dataclass(first):
        for field in dataclasses.fields(first):
            assert_same_record(getattr(first, field.name), getattr(second, field.name))
    elif isinstance(first, dict):
        assert list(first) == list(second)
        for key in first:
            assert_same_record(first[key], second[key])
    elif isinstance(first, np.ndarray):
        assert first.dtype == second.dtype
        np.testing.assert_array_equal(first, second)
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same_record(one, other)
    else:
        assert first == second or (math.isnan(first) and math.isnan(second))
