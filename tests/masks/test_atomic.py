"""A pruning step is whole or not at all, whatever is raised in the middle of it.

The modes below see the operations of their own thread only; conftest.py lets PyTorch have no other.
"""

import copy
import math
import os
import signal

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


class Sap:
    """A stepper after its first training."""

    def __init__(self):
        self.model = make_model()
        self.sap = torch_sap.SAP(self.model)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.arange(parameter.numel()).view(parameter.shape).remainder(7) * 0.1)

    def look(self):
        return state_of(self.model), len(self.sap.history)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_step_prunes_rewinds_and_records_or_does_nothing(error):
    before, after, found = all_points(Sap, lambda thing: thing.sap.step({"accuracy": 0.9}), error)
    assert (before[1], after[1]) == (0, 1)
    for state, rounds in found:
        assert same(state, before[0] if rounds == 0 else after[0])
    assert {rounds for _, rounds in found} == {0, 1}


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("where", ["train", "eval", "eval after pruning"])
def test_a_function_of_the_users_that_raises(where, error):
    """In the second round: the first one is in the history, and the model is as after it, or after this pruning."""
    thing, calls = Sap(), []

    def train_fn(model):
        calls.append("train")
        with torch.no_grad():
            model[0].weight.add_(1)
        if where == "train" and calls.count("train") == 2:
            raise error

    def eval_fn(model):
        model.eval()
        calls.append("eval")
        if calls.count("eval") == {"eval": 3, "eval after pruning": 4}.get(where):
            raise error
        return 0.5

    rounds = torch_sap.sap_rounds(thing.sap, train_fn, iterations=3, eval_fn=eval_fn)
    next(rounds)
    after_first = state_of(thing.model)
    with pytest.raises(type(error)):
        next(rounds)
    assert all(module.training for module in thing.model.modules())
    for module in (thing.model[0], thing.model[3]):
        assert not module.weight_orig[~module.weight_mask].any()
    if where == "eval after pruning":
        assert len(thing.sap.history) == 2  # pruned, rewound and recorded, but for the metrics
        assert thing.sap.history[1].pruned_metrics == {}
        assert not same(state_of(thing.model), after_first)
    else:
        assert len(thing.sap.history) == 1
        assert same(state_of(thing.model), after_first)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_training_that_diverges_leaves_model_and_history_as_before_it(value):
    model = make_model()
    start = state_of(model)[0]
    rounds = []

    def train_fn(model):
        if len(rounds) == 1:
            with torch.no_grad():
                model[3].weight[0, 0] = value
        return {"loss": value if rounds else 1.0}

    with pytest.raises(ValueError, match=r"weights must be finite, but 3.weight"):
        torch_sap.iterative_sap(model, train_fn, iterations=3, callback=rounds.append)
    assert len(rounds) == 1
    mask = model[3].weight_mask
    assert 0 < mask.sum() < mask.numel()
    assert torch.equal(model[3].weight_orig, start["3.weight"] * mask)


def test_a_loss_that_is_nan_is_recorded_and_nothing_more():
    model = make_model()
    history = torch_sap.iterative_sap(model, lambda model: {"loss": math.nan}, iterations=1)
    assert math.isnan(history[0].metrics["loss"])
    assert history[1].density < 1


def test_ctrl_c_during_a_step_waits_until_it_is_whole(monkeypatch, request):
    thing, whole = Sap(), Sap()
    whole.sap.step()
    real, sent = torch_sap.iterate.pruner.hold_masks, []

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)  # as a terminal sends it, before the masks are there
        sent.append(True)
        real(*arguments)

    monkeypatch.setattr(torch_sap.iterate.pruner, "hold_masks", interrupted)
    own = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, own))
    with pytest.raises(KeyboardInterrupt):
        thing.sap.step()
    assert sent
    assert len(thing.sap.history) == 1
    assert same(state_of(thing.model), state_of(whole.model))


def test_a_copy_of_the_model_is_not_touched_by_a_failure():
    model = Model(again=True).model
    twin = copy.deepcopy(model)
    expected = state_of(twin)
    with RaiseAt(20, MemoryError()), pytest.raises(MemoryError):
        torch_sap.global_unstructured(model)
    assert same(state_of(twin), expected)
