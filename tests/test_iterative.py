"""iterative_sap: results of the functions, failures, and whole runs."""

import functools
import itertools
import sys

import numpy as np
import pytest
import torch
from helpers import SCOPES, assert_held, assert_unchanged, convnet, fit, masks_of, mlp, snapshot, value_of, weight_names
from iterating import ARGUMENTS, assert_rewound, state_without_masks, trainer

from torch_sap import SAP, iterative_sap

MODELS = {"mlp": (mlp, (6, 6)), "convnet": (convnet, (6, 2, 6, 6))}
each_scope = pytest.mark.parametrize("scope", SCOPES)
each_model = pytest.mark.parametrize("kind", MODELS)
SHAPE = (6, 6)


@pytest.mark.parametrize(
    ("returned", "metrics"),
    [
        (None, {}),
        (0.5, {"metric": 0.5}),
        (3, {"metric": 3}),
        (np.float32(0.25), {"metric": 0.25}),
        (torch.tensor(0.75), {"metric": 0.75}),
        ({"accuracy": 0.9, "loss": 1}, {"accuracy": 0.9, "loss": 1}),
    ],
)
def test_results_of_train_fn_and_eval_fn(returned, metrics):
    history = iterative_sap(mlp(), lambda _: returned, iterations=1, **ARGUMENTS)
    assert [record.metrics for record in history] == [metrics, metrics]
    if returned is not None:
        history = iterative_sap(mlp(), lambda _: None, iterations=1, eval_fn=lambda _: returned, **ARGUMENTS)
        assert history[0].metrics == metrics
        assert history[0].pruned_metrics == metrics


def accuracy(model):
    return 0.5


class Judge:
    def __call__(self, model):
        return 0.25


@pytest.mark.parametrize(
    ("eval_fn", "metrics"),
    [
        (accuracy, {"accuracy": 0.5}),
        (lambda model: 0.5, {"metric": 0.5}),
        (functools.partial(accuracy), {"metric": 0.5}),
        (Judge(), {"metric": 0.25}),
        (lambda model: {"loss": 2}, {"loss": 2}),
    ],
    ids=["function", "lambda", "partial", "object", "mapping"],
)
def test_a_number_of_eval_fn_is_named_after_it(eval_fn, metrics):
    history = iterative_sap(mlp(), lambda model: 0.75, iterations=1, eval_fn=eval_fn, **ARGUMENTS)
    assert history[0].metrics == {"metric": 0.75} | metrics
    assert history[0].pruned_metrics == metrics


def test_an_eval_fn_that_returns_nothing_warns():
    with pytest.warns(UserWarning, match="eval_fn returned None, so nothing is recorded; return a number or a dict"):
        history = iterative_sap(mlp(), lambda _: None, iterations=1, eval_fn=lambda _: None, **ARGUMENTS)
    assert history[0].metrics == history[0].pruned_metrics == {}


def test_a_bar_shows_the_round_what_remains_and_the_metric(capsys):
    pytest.importorskip("tqdm")
    found = iterative_sap(mlp(), trainer(SHAPE), iterations=2, eval_fn=accuracy, progress=True, **ARGUMENTS)
    told = capsys.readouterr()
    assert told.out == ""
    last = told.err.split("\r")[-1]
    assert "round 2: 100%" in last
    assert "3/3" in last
    assert f"remaining={found[-1].density:.1%}, accuracy=0.5" in last
    assert "round 0:   0%" in told.err
    sap = SAP(mlp(), **ARGUMENTS)
    sap.step()
    iterative_sap(sap, trainer(SHAPE), iterations=2, progress=True)
    assert "round 1:  33%" in capsys.readouterr().err
    iterative_sap(mlp(), trainer(SHAPE), iterations=1, **ARGUMENTS)
    assert capsys.readouterr().err == ""


def test_a_bar_needs_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    model = mlp()
    before = snapshot(model)
    with pytest.raises(ImportError, match=r"progress=True needs tqdm: pip install 'torch_sap\[progress\]'"):
        iterative_sap(model, pytest.fail, progress=True)
    assert_unchanged(model, before)


def test_eval_fn_sees_the_retrained_and_then_the_pruned_model_before_rewinding():
    model, train, trained, seen = mlp(), trainer(SHAPE), [], []

    def train_fn(given):
        train(given)
        trained.append(state_without_masks(given))

    def eval_fn(given):
        assert given is model
        zeros = sum(int((value_of(given, name) == 0).sum()) for name in weight_names(given))
        for name in weight_names(given):
            value = value_of(given, name)
            assert torch.equal(value, torch.where(value != 0, trained[-1][name], 0)), "trained weights, not rewound"
        seen.append(zeros)
        return {"zeros": zeros}

    history = iterative_sap(model, train_fn, iterations=3, eval_fn=eval_fn, **ARGUMENTS)
    for record in history:
        assert record.metrics["zeros"] == record.total - record.remaining
    for record in history[:3]:
        assert record.pruned_metrics["zeros"] == record.total - record.remaining + record.pruned_count
    assert max(seen) > 0


def test_a_pruner_continues_after_its_history():
    history = iterative_sap(mlp(), trainer(SHAPE), iterations=2, **ARGUMENTS)
    sap, train = SAP(mlp(), **ARGUMENTS), trainer(SHAPE)
    train(sap.model)
    first = sap.step()
    assert first.groups["0.weight"].c.tolist() == history[0].groups["0.weight"].c.tolist()
    assert iterative_sap(sap, train, iterations=2) is sap.history
    assert [found.remaining for found in sap.history] == [found.remaining for found in history]


def test_no_iterations_trains_and_measures_once():
    model = mlp()
    history = iterative_sap(model, trainer(SHAPE), iterations=0, **ARGUMENTS)
    assert len(history) == 1
    assert history[0].pruned_count == 0
    assert_held(model, pruned=False)


def train(model):
    fit(model, torch.optim.SGD(model.parameters(), lr=0.1), SHAPE)
    return 0.5


RUBBISH = ["high", [1, 2], {"accuracy": "high"}, {1: 2.0}, object(), torch.ones(3), 1j, {"accuracy": None}]


@pytest.mark.parametrize("bad_round", [0, 2])
@pytest.mark.parametrize("kind", ["raises", *range(len(RUBBISH))])
@pytest.mark.parametrize("function", ["train_fn", "eval_fn"])
def test_a_function_that_fails_leaves_model_and_history_as_before_its_round(bad_round, kind, function):
    model, train, before = mlp(), trainer(SHAPE), []
    sap = SAP(model, **ARGUMENTS)

    def train_fn(given):
        before[:] = [snapshot(given)]
        train(given)
        return fail() if function == "train_fn" and train.rounds == bad_round + 1 else 0.5

    def eval_fn(given):
        return fail() if function == "eval_fn" and train.rounds == bad_round + 1 else 0.5

    def fail():
        if kind == "raises":
            raise RuntimeError("out of data")
        return RUBBISH[kind]

    error, text = (RuntimeError, "out of data") if kind == "raises" else ((TypeError, ValueError), function)
    with pytest.raises(error, match=text):
        iterative_sap(sap, train_fn, iterations=3, eval_fn=eval_fn)
    assert_unchanged(model, before[0])
    assert len(sap.history) == bad_round
    history = iterative_sap(sap, trainer(SHAPE), iterations=bad_round + 1)
    assert [record.number for record in history] == list(range(bad_round + 2))


@each_scope
@each_model
def test_every_round_starts_bitwise_from_the_start(scope, kind):
    (make, shape), seen = MODELS[kind], []
    model, start, train = make(), state_without_masks(make()), trainer(shape)

    def checked(given):
        assert given is model
        masks = masks_of(model)
        assert_rewound(model, start, masks)
        seen.append((masks, list(model.state_dict()), [id(value) for value in model.parameters()]))
        train(model)
        assert_held(model, pruned=len(seen) > 1)

    history = iterative_sap(model, checked, iterations=5, scope=scope, **ARGUMENTS)
    assert len(history) == len(seen) == 6
    for (before, keys, identities), (after, later_keys, later_identities) in itertools.pairwise(seen):
        assert keys == later_keys
        assert identities == later_identities
        assert not any((after[name] & ~before[name]).any() for name in before), "masks are nested"
        assert sum(int(mask.sum()) for mask in after.values()) < sum(int(mask.sum()) for mask in before.values())
    assert [id(value) for value in model.parameters()] == seen[0][2]
    assert all(torch.equal(mask, seen[-1][0][name]) for name, mask in masks_of(model).items())
    assert not torch.equal(value_of(model, weight_names(model)[0]), start[weight_names(model)[0]]), "left trained"
    assert_held(model)


@each_scope
def test_two_runs_with_one_seed_are_identical(scope):
    def run():
        torch.manual_seed(11)
        model = convnet()
        history = iterative_sap(model, trainer((6, 2, 6, 6)), iterations=3, scope=scope, **ARGUMENTS)
        return model, history

    (first, history), (second, other) = run(), run()
    for (key, value), again in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(value, again), key
    for record, again in zip(history, other, strict=True):
        assert record.retrained.pqi["layer"] == again.retrained.pqi["layer"]
        assert all(group.c.tolist() == again.groups[name].c.tolist() for name, group in record.groups.items())


def test_the_last_round_is_measured_and_not_pruned():
    model, masks = mlp(), []
    history = iterative_sap(
        model, trainer((6, 6)), iterations=2, callback=lambda _: masks.append(masks_of(model)), **ARGUMENTS
    )
    assert [record.number for record in history] == [0, 1, 2]
    assert [record.pruned_count > 0 for record in history] == [True, True, False]
    assert all((group.c == 0).all() for group in history[-1].groups.values())
    assert all(torch.equal(masks[1][name], mask) for name, mask in masks[2].items())
    for before, after in itertools.pairwise(history):
        assert after.remaining == before.remaining - before.pruned_count
        assert after.tensors == before.tensors_after


def test_a_first_training_that_fails_leaves_no_trace():
    model = mlp()
    before = snapshot(model)

    def train_and_fail(model):
        train(model)
        raise RuntimeError("out of data")

    with pytest.raises(RuntimeError, match="out of data"):
        iterative_sap(model, train_and_fail)
    assert_unchanged(model, before)


def test_callback_gets_every_round_and_its_error_passes():
    seen = []
    history = iterative_sap(mlp(), train, iterations=2, callback=seen.append)
    assert seen == list(history)

    def stop(sap_round):
        raise StopIteration

    with pytest.raises(StopIteration):
        iterative_sap(mlp(), train, iterations=2, callback=stop)
