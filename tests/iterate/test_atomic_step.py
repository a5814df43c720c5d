"""A step is complete or has not happened, even if an error interrupts it.

The mode below sees the operations of its own thread only; conftest.py lets PyTorch have no other.
"""

import math

import pytest
import torch
from helpers import RaiseAt, tiny_convnet

from torch_sap import SAP, iterative_sap


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}, [m.training for m in model.modules()]


def same(one, other):
    return (
        one[1] == other[1]
        and one[0].keys() == other[0].keys()
        and all(map(torch.equal, one[0].values(), other[0].values()))
    )


class Trained:
    """A pruner after its first training."""

    def __init__(self, **settings):
        self.model = tiny_convnet()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.sap = SAP(self.model, optimizer=self.optimizer, **settings)
        self.train()

    def train(self):
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.arange(parameter.numel()).view(parameter.shape).remainder(7) * 0.1)
                parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()

    def look(self):
        return state_of(self.model), len(self.sap.history), len(self.optimizer.state)


NO_MEMORY = torch.OutOfMemoryError("no memory")


@pytest.mark.parametrize(
    ("error", "evaluated", "rewind"),
    [(NO_MEMORY, False, "init"), (KeyboardInterrupt(), True, "init"), (NO_MEMORY, False, "none")],
)
def test_a_step_prunes_rewinds_and_records_or_does_nothing(error, evaluated, rewind):
    def step(thing):
        thing.sap.step({"accuracy": 0.9}, eval_fn=(lambda model: 0.5) if evaluated else None)

    thing, counting = Trained(rewind=rewind), RaiseAt(0, error)
    before = thing.look()
    with counting:
        step(thing)
    after = thing.look()
    assert (before[1:], after[1:]) == ((0, 6), (1, 0 if rewind == "init" else 6))
    assert counting.count > 10
    found = set()
    for number in range(1, counting.count + 1):
        thing = Trained(rewind=rewind)
        with RaiseAt(number, error), pytest.raises(type(error)):
            step(thing)
        state, *rest = thing.look()
        expected = after if thing.sap.history else before
        assert same(state, expected[0])
        assert tuple(rest) == expected[1:]
        found.add(rest[0])
    assert found == {0, 1}


def test_a_failed_pruner_leaves_no_mask():
    model, counting = tiny_convnet(), RaiseAt(0, NO_MEMORY)
    with counting:
        SAP(model)
    for number in range(1, counting.count + 1):
        model = tiny_convnet()
        before = state_of(model)
        with RaiseAt(number, NO_MEMORY), pytest.raises(torch.OutOfMemoryError):
            SAP(model)
        assert same(state_of(model), before), number


def test_without_an_evaluation_zeros_are_restored_once(monkeypatch):
    import torch_sap.iterate.rewinding as rewinding

    thing, real, calls = Trained(), rewinding.hold_masks, []
    monkeypatch.setattr(rewinding, "hold_masks", lambda *arguments: (calls.append(1), real(*arguments)))
    thing.sap.step()
    assert len(calls) == 1
    thing.sap.record()
    assert len(calls) == 1


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("where", ["train", "eval", "eval after pruning"])
def test_an_error_in_a_user_function(where, error):
    """In the second round, after which the model is as after the first one, or as after the second pruning."""
    thing, calls, after_first = Trained(), [], []

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

    def callback(found):
        after_first.append(state_of(thing.model))

    with pytest.raises(type(error)):
        iterative_sap(thing.sap, train_fn, iterations=3, eval_fn=eval_fn, callback=callback)
    assert all(module.training for module in thing.model.modules())
    for module in (thing.model[0], thing.model[3]):
        assert not module.weight_orig[~module.weight_mask].any()
    if where == "eval after pruning":
        assert len(thing.sap.history) == 2  # pruned, rewound and recorded, but for the metrics
        assert thing.sap.history[1].pruned_metrics == {}
        assert not same(state_of(thing.model), after_first[0])
    else:
        assert len(thing.sap.history) == 1
        assert same(state_of(thing.model), after_first[0])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_training_that_diverges_leaves_model_and_history_as_before_it(value, tmp_path):
    model = tiny_convnet()
    start, rounds = state_of(model)[0], []

    def train_fn(model):
        if len(rounds) == 1:
            with torch.no_grad():
                model[3].weight[0, 0] = value
        return {"loss": value if rounds else 1.0}

    settings = {"iterations": 3, "callback": rounds.append, "checkpoint": tmp_path / "run.ckpt"}
    with pytest.raises(ValueError, match=r"weights must be finite, but 3.weight"):
        iterative_sap(model, train_fn, **settings)
    assert len(rounds) == 1
    mask = model[3].weight_mask
    assert 0 < mask.sum() < mask.numel()
    assert torch.equal(model[3].weight_orig, start["3.weight"] * mask)
    assert len(iterative_sap(tiny_convnet(), lambda model: None, **settings)) == 4, "the file holds the state before it"
