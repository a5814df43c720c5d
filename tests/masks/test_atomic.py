"""A pruning step is whole or not at all, whatever is raised in the middle of it.

The modes below see the operations of their own thread only; conftest.py lets PyTorch have no other.
"""

import copy

import pytest
import torch
from helpers import FUNCTIONS
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import torch_sap


class RaiseAt(TorchDispatchMode):
    """Raises an error in place of the n-th operation of PyTorch's, once; counts them all."""

    def __init__(self, number, error):
        super().__init__()
        self.number, self.error, self.count = number, error, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.number:
            raise self.error
        return function(*args, **(kwargs or {}))


def make_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 5))
    model(torch.randn(3, 2, 6, 6))
    return model


def state_of(model):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    return state, [module.training for module in model.modules()]


def same(one, other):
    (values, modes), (others, other_modes) = one, other
    return (
        modes == other_modes
        and values.keys() == others.keys()
        and all(torch.equal(values[key], others[key]) for key in values)
    )


def all_points(start, act, error):
    """What is left when an error comes at each operation: the state before, after, and that of each failure."""
    counting = RaiseAt(0, error)
    thing = start()
    before = thing.look()
    with counting:
        act(thing)
    after, found = thing.look(), []
    for number in range(1, counting.count + 1):
        thing = start()
        with RaiseAt(number, error), pytest.raises(type(error)):
            act(thing)
        found.append(thing.look())
    assert len(found) > 10
    return before, after, found


class Model:
    def __init__(self, again):
        self.model = make_model()
        if again:
            torch_sap.layer_unstructured(self.model, gamma=0.5)

    def look(self):
        return state_of(self.model)


ERRORS = [torch.OutOfMemoryError("no memory"), MemoryError(), KeyboardInterrupt()]


@pytest.mark.parametrize("again", [False, True], ids=["first", "again"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("scope", FUNCTIONS)
def test_a_whole_model_function_is_whole_or_not_at_all(scope, error, again):
    before, after, found = all_points(lambda: Model(again), lambda thing: FUNCTIONS[scope](thing.model), error)
    assert not same(before, after)
    left = ["before" if same(state, before) else "after" if same(state, after) else "between" for state in found]
    assert "between" not in left
    assert "before" in left
    assert "after" in left or again  # the last operations put values in their places


def test_a_copy_of_the_model_is_not_touched_by_a_failure():
    model = Model(again=True).model
    twin = copy.deepcopy(model)
    expected = state_of(twin)
    with RaiseAt(20, MemoryError()), pytest.raises(MemoryError):
        torch_sap.global_unstructured(model)
    assert same(state_of(twin), expected)
