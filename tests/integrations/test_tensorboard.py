"""TensorBoard reads back the values of the history, written live or afterwards."""

import importlib
import math
import sys

import numpy as np
import pytest
import torch
from helpers import mlp
from torch import nn

import torch_sap

pytest.importorskip("tensorboard")
EventAccumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
SummaryWriter = pytest.importorskip("torch.utils.tensorboard").SummaryWriter

from torch_sap.integrations.tensorboard import TensorBoardCallback  # noqa: E402


def made(callback=None, **settings):
    scores = iter([0.5, 0.75, math.nan, 0.25, 0.125])
    return torch_sap.iterative_sap(
        mlp(),
        lambda model: {"loss": 0.5},
        iterations=2,
        eval_fn=lambda model: {"accuracy": next(scores)},
        callback=callback,
        **settings,
    )


def read(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    return events


def scalars(events):
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in sorted(events.Tags()["scalars"])
    }


def assert_series(found, tag, expected):
    expected = [(step, value) for step, value in enumerate(expected) if value is not None]
    assert [step for step, _ in found[tag]] == [step for step, _ in expected]
    np.testing.assert_allclose([value for _, value in found[tag]], [value for _, value in expected], rtol=1e-6)


def test_scalars_of_each_round(tmp_path):
    with TensorBoardCallback(tmp_path) as tensorboard:
        history = made(tensorboard, gini=True)
    found = scalars(read(tmp_path))
    rows = history.rows()
    columns = {
        "sap/pruned": "pruned",
        "sap/seconds": "seconds",
        "pqi/global": "pqi",
        "pqi/layer_mean": "pqi_layer_mean",
        "pqi/neuron_mean": "pqi_neuron_mean",
        "pruned_pqi/global": "pruned_pqi",
        "gini/global": "gini",
        "metrics/accuracy": "accuracy",
        "metrics/loss": "loss",
        "pruned_metrics/accuracy": "pruned_accuracy",
    }
    assert_series(found, "sap/density", [row["remaining_pct"] / 100 for row in rows])
    for tag, column in columns.items():
        assert_series(found, tag, [row.get(column) for row in rows])


def test_each_tensor(tmp_path):
    with TensorBoardCallback(tmp_path) as tensorboard:
        history = made(tensorboard)
    events = read(tmp_path)
    found = scalars(events)
    for i, name in enumerate(["0.weight", "3.weight"]):
        assert_series(found, f"layer_density/{name}", [round.tensors[i].density for round in history])
        assert_series(found, f"layer_pqi/{name}", [round.retrained.pqi["layer"][name][0] for round in history])
        for event, round in zip(events.Histograms(f"neuron_pqi/{name}"), history, strict=True):
            index = round.retrained.pqi["neuron"][name]
            assert event.histogram_value.num == len(index)
            assert event.histogram_value.sum == pytest.approx(index.sum())


def test_afterwards_as_live(tmp_path):
    with TensorBoardCallback(tmp_path / "live") as tensorboard:
        history = made(tensorboard)
    history.to_json(tmp_path / "history.json")
    with TensorBoardCallback(tmp_path / "after") as tensorboard:
        for round in torch_sap.History.from_json(tmp_path / "history.json"):
            tensorboard(round)
    live, after = (scalars(read(tmp_path / name)) for name in ("live", "after"))
    assert list(live) == list(after)
    for tag, values in live.items():
        np.testing.assert_array_equal(values, after[tag])


def test_rounds_are_on_disk_when_they_are_complete(tmp_path):
    seen = []
    tensorboard = TensorBoardCallback(tmp_path)

    def callback(round):
        tensorboard(round)
        seen.append(len(read(tmp_path).Histograms("neuron_pqi/3.weight")))  # what is written last

    made(callback)
    tensorboard.close()
    assert seen == [1, 2, 3]


def test_your_writer_stays_open_and_layers_can_be_left_out(tmp_path):
    writer = SummaryWriter(str(tmp_path))
    with TensorBoardCallback(writer, layers=False) as tensorboard:
        made(tensorboard)
    writer.add_scalar("mine", 1.0)
    writer.close()
    assert len(list(tmp_path.iterdir())) == 1  # a closed writer would begin another file
    events = read(tmp_path)
    assert "mine" in events.Tags()["scalars"]
    assert events.Tags()["histograms"] == []
    assert not any(tag.startswith("layer_") for tag in events.Tags()["scalars"])


def test_undefined_indices_are_left_out(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[1].weight.zero_()
    with TensorBoardCallback(tmp_path) as tensorboard:
        torch_sap.iterative_sap(model, lambda model: None, iterations=1, callback=tensorboard)
    events = read(tmp_path)
    assert "layer_pqi/0.weight" in events.Tags()["scalars"]
    assert "layer_pqi/1.weight" not in events.Tags()["scalars"]
    assert events.Tags()["histograms"] == ["neuron_pqi/0.weight"]


def test_without_tensorboard_the_extra_is_named(monkeypatch):
    for module in [name for name in sys.modules if "tensorboard" in name.split(".") and "torch_sap" not in name]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "torch_sap.integrations.tensorboard")
    with pytest.raises(ImportError, match=r"pip install 'torch_sap\[tensorboard\]'"):
        importlib.import_module("torch_sap.integrations.tensorboard")
