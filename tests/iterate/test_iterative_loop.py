"""iterative_sap and sap_rounds: metrics, functions that fail, the history as a record, and resuming."""

import csv
import dataclasses
import io
import json
import math

import numpy as np
import pytest
import torch
from helpers import SCOPES, assert_held, assert_unchanged, convnet, fit, mlp, snapshot, value_of, weight_names
from test_iterative import ARGUMENTS, state_without_masks, trainer

from torch_sap import SAP, History, iterative_sap, sap_rounds

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
def test_what_train_fn_and_eval_fn_may_return(returned, metrics):
    history = iterative_sap(mlp(), lambda _: returned, iterations=1, **ARGUMENTS)
    assert [record.metrics for record in history] == [metrics, metrics]
    history = iterative_sap(mlp(), lambda _: None, iterations=1, eval_fn=lambda _: returned, **ARGUMENTS)
    assert history[0].metrics == metrics
    assert history[0].pruned_metrics == metrics


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


def test_callback_and_rounds_one_by_one():
    called = []
    history = iterative_sap(mlp(), trainer(SHAPE), iterations=2, callback=called.append, **ARGUMENTS)
    assert called == list(history)
    sap = SAP(mlp(), **ARGUMENTS)
    rounds = sap_rounds(sap, trainer(SHAPE), iterations=2)
    assert len(sap.history) == 0
    first = next(rounds)
    assert len(sap.history) == 1
    assert first.groups["0.weight"].c.tolist() == history[0].groups["0.weight"].c.tolist()
    assert [first, *rounds] == list(sap.history)
    assert len(sap.history) == 3


def test_no_iterations_trains_and_measures_once():
    model = mlp()
    history = iterative_sap(model, trainer(SHAPE), iterations=0, **ARGUMENTS)
    assert len(history) == 1
    assert history[0].pruned_count == 0
    assert_held(model, pruned=False)


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
        list(sap_rounds(sap, train_fn, iterations=3, eval_fn=eval_fn))
    assert_unchanged(model, before[0])
    assert len(sap.history) == bad_round
    rest = list(sap_rounds(sap, trainer(SHAPE), iterations=bad_round + 1))
    assert [record.number for record in rest] == [bad_round, bad_round + 1]


@pytest.fixture(params=SCOPES)
def history(request):
    return iterative_sap(
        convnet(),
        lambda model: fit(model, torch.optim.SGD(model.parameters(), lr=0.1), (6, 2, 6, 6))[-1],
        iterations=3,
        eval_fn=lambda model: {"accuracy": 0.5},
        scope=request.param,
        gini=True,
        **ARGUMENTS,
    )


def assert_same(first, second):
    """Equal records, field by field, with arrays and NaN."""
    assert type(first) is type(second) or isinstance(first, int | float)
    if dataclasses.is_dataclass(first):
        for field in dataclasses.fields(first):
            assert_same(getattr(first, field.name), getattr(second, field.name))
    elif isinstance(first, dict):
        assert list(first) == list(second)
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, np.ndarray):
        assert first.dtype == second.dtype
        np.testing.assert_array_equal(first, second)
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert first == second or (math.isnan(first) and math.isnan(second))


def test_json_round_trip(history, tmp_path):
    path = tmp_path / "history.json"
    history.to_json(path)
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    again = History.from_json(path)
    assert isinstance(again, History)
    for record, other in zip(history, again, strict=True):
        assert_same(record, other)
    again.to_json(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_json_of_a_history_with_undefined_groups(tmp_path):
    model = mlp()
    with torch.no_grad():
        model[0].weight.zero_()
    history = iterative_sap(model, lambda _: None, iterations=1, **ARGUMENTS)
    assert math.isnan(history[0].groups["0.weight"].index[0])
    assert history[0].groups["0.weight"].c.tolist() == [0]
    history.to_json(tmp_path / "history.json")
    json.loads((tmp_path / "history.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    for record, other in zip(history, History.from_json(tmp_path / "history.json"), strict=True):
        assert_same(record, other)


def test_sequence_frozen_rounds_and_tables(history, tmp_path):
    assert len(history) == len(list(history)) == 4
    assert history[-1] is list(history)[3]
    assert [record.number for record in history[1:3]] == [1, 2]
    with pytest.raises(IndexError):
        history[4]
    with pytest.raises(dataclasses.FrozenInstanceError):
        history[0].number = 7
    assert all(record.seconds >= 0 for record in history)
    frame = history.to_frame()
    assert len(frame) == 4
    assert any(frame[column].tolist() == [record.remaining for record in history] for column in frame.columns)
    history.to_csv(tmp_path / "history.csv")
    with (tmp_path / "history.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert len(rows) == 5
    assert len({len(row) for row in rows}) == 1
    assert any(
        [float(row[place]) for row in rows[1:]] == [record.pqi for record in history]
        for place in range(len(rows[0]))
        if all(row[place].replace(".", "").isdigit() for row in rows[1:])
    ), "PQI with all its digits"


def test_plot(history, tmp_path):
    history.plot(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "figure.png").stat().st_size > 5000
    import matplotlib.pyplot as plt

    assert not plt.get_fignums(), "no figure is left open"


def test_the_history_of_a_run_without_gini_or_metrics_can_be_plotted_and_written(tmp_path):
    history = iterative_sap(mlp(), trainer(SHAPE), iterations=1, **ARGUMENTS)
    history.plot(tmp_path / "figure.pdf")
    assert (tmp_path / "figure.pdf").read_bytes().startswith(b"%PDF")
    history.to_csv(tmp_path / "history.csv")
    assert len(history.to_frame()) == 2


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("late", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one(scope, late):
    def rounds(model, sap, numbers):
        for number in numbers:
            fit(model, torch.optim.AdamW(model.parameters(), lr=0.03), SHAPE, seed=number)
            if late and number == 1:
                sap.set_rewind_point()
            sap.step({"number": number})

    model = mlp()
    sap = SAP(model, scope=scope, **ARGUMENTS)
    rounds(model, sap, range(2))
    states = saved(model.state_dict()), saved(sap.state_dict())
    rounds(model, sap, range(2, 5))
    torch.manual_seed(99)
    resumed = mlp()
    for parameter in resumed.parameters():
        torch.nn.init.normal_(parameter)
    again = SAP(resumed, scope=scope, **ARGUMENTS)
    resumed.load_state_dict(states[0])
    again.load_state_dict(states[1])
    assert len(again.history) == 2
    rounds(resumed, again, range(2, 5))
    for (key, value), other in zip(model.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(value, other), key
    for record, other in zip(sap.history, again.history, strict=True):
        assert_same(*(dataclasses.replace(each, seconds=0.0) for each in (record, other)))


@pytest.mark.parametrize("change", ["scope", "rubbish"])
def test_load_state_dict_refuses_what_does_not_fit(change):
    sap = SAP(mlp(), **ARGUMENTS)
    trainer(SHAPE)(sap_model := mlp())
    other = SAP(convnet() if change == "scope" else sap_model, **ARGUMENTS)
    state = other.state_dict() if change == "scope" else {"nothing": 1}
    with pytest.raises((ValueError, TypeError, KeyError)):
        sap.load_state_dict(state)
    assert len(sap.history) == 0


def test_a_history_is_read_at_a_glance():
    sap = SAP(mlp())
    assert repr(sap.history) == "<History without rounds>"
    found = sap.step({"accuracy": 0.98765})
    assert repr(found).startswith("<Round 0: ")
    assert "accuracy 0.9877" in repr(found)
    assert f"{found.total:,} of {found.total:,} weights (100.0%)" in repr(found)
    assert f"{found.pruned_count:,} pruned" in repr(found)
    assert len(repr(found)) < 200
    sap.record()
    assert repr(sap.history).splitlines() == [repr(sap.history[0]), repr(sap.history[1])]
