"""The record of a run: JSON, tables, figures."""

import csv
import dataclasses
import gzip
import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from helpers import SCOPES, convnet, fit, mlp
from iterating import ARGUMENTS, assert_same_record, trainer

from torch_sap import SAP, History, LotteryTicket, iterative_sap

RESULTS = Path(__file__).parents[2] / "docs" / "results"


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


def test_json_round_trip(history, tmp_path):
    path = tmp_path / "history.json"
    history.to_json(path)
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    again = History.from_json(path)
    assert isinstance(again, History)
    assert_same_record(list(history), list(again))
    again.to_json(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_json_of_a_history_with_undefined_groups():
    model = mlp()
    with torch.no_grad():
        model[0].weight.zero_()
    history = iterative_sap(model, lambda _: None, iterations=1, **ARGUMENTS)
    assert math.isnan(history[0].groups["0.weight"].index[0])
    assert history[0].groups["0.weight"].c.tolist() == [0]
    plain = json.loads(json.dumps(history.to_dict(), allow_nan=False))
    assert_same_record(list(history), list(History.from_dict(plain)))


def test_metrics_that_are_not_finite_are_read_back():
    values = {"loss": math.nan, "top": math.inf, "bottom": -math.inf, "whole": 3}
    sap = SAP(mlp())
    sap.record(values)
    plain = json.loads(json.dumps(sap.history.to_dict(), allow_nan=False))
    assert plain["rounds"][0]["metrics"] == {"loss": None, "top": "inf", "bottom": "-inf", "whole": 3.0}
    assert_same_record(sap.history[0], History.from_dict(plain)[0])


def test_committed_histories_stay_readable():
    for path in RESULTS.glob("runs/*/history.json"):
        assert History.from_json(path)[-1].density < 1
    for path in RESULTS.glob("paper/*.json.gz"):
        for run in json.loads(gzip.decompress(path.read_bytes()))["runs"][:2]:
            assert History.from_dict(run["history"])[-1].density < 1 or run["config"]["rounds"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"number": "first"}, "expected int, got str"),
        ({"groups": []}, "expected mapping, got list"),
        ({"tensors": [{"name": "0.weight"}]}, "no 'shape'"),
        ({"retrained": None}, "expected mapping, got NoneType"),
        ({"groups": {"0.weight": {"d": ["x"], "index": [], "r": [], "c": []}}}, "invalid literal"),
        ({"metrics": {"loss": "low"}}, "could not convert string to float"),
    ],
)
def test_a_damaged_round_is_refused(change, message):
    sap = SAP(mlp())
    sap.record()
    values = sap.history.to_dict()
    values["rounds"][0].update(change)
    with pytest.raises(ValueError, match=f"round must be what Round.to_dict wrote, .* damaged: .*{message}"):
        History.from_dict(values)


def test_a_baseline_shows_only_the_numbers_that_it_uses():
    found = LotteryTicket(mlp(), ratio=0.3).record()
    assert found.hyperparameters == {"p": 0.5, "q": 1.0, "ratio": 0.3}


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
    assert frame["remaining"].tolist() == [record.remaining for record in history]
    history.to_csv(tmp_path / "history.csv")
    with (tmp_path / "history.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert len(rows) == 5
    assert len({len(row) for row in rows}) == 1
    place = rows[0].index("pqi")
    assert [float(row[place]) for row in rows[1:]] == [record.pqi for record in history], "with all digits"


@pytest.mark.parametrize(
    ("metric", "expected"), [(None, None), ("loss", None), ("speed", "metric 'speed' must be recorded in every round")]
)
def test_figures(tmp_path, metric, expected):
    import matplotlib.pyplot as plt

    history = iterative_sap(mlp(), lambda model: {"loss": 1.0, "other": 2.0}, iterations=1)
    if expected:
        with pytest.raises(ValueError, match=expected):
            history.plot(tmp_path / "figure.png", metric=metric)
        assert not (tmp_path / "figure.png").exists()
    else:
        history.plot(tmp_path / "figure.png", metric=metric)
        assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert not plt.get_fignums(), "no figure is left open"
    without_metrics = iterative_sap(mlp(), trainer((6, 6)), iterations=1)
    without_metrics.plot(tmp_path / "figure.pdf")
    assert (tmp_path / "figure.pdf").read_bytes().startswith(b"%PDF")
    assert len(without_metrics.to_frame()) == 2


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


def test_a_notebook_shows_tables_of_histories_and_rounds():
    sap = SAP(mlp())
    first, last = sap.step({"accuracy": 0.98765}), sap.record({"accuracy": 0.5, "<loss>": 2})
    shown = sap.history._repr_html_()
    assert shown.startswith("<p>2 rounds</p>")
    assert shown.count("<tr>") == 3
    assert "<th>remaining %</th><th>PQ Index</th><th>accuracy</th><th>&lt;loss&gt;</th>" in shown
    row = f"<td>0</td><td>{first.total:,}</td><td>100.0</td><td>{first.pqi:.3f}</td><td>0.9877</td>"
    assert f"{row}<td>-</td><td>{first.pruned_count:,}</td>" in shown
    assert f"{row}<td>{first.pruned_count:,}</td>" in first._repr_html_()
    sap.history.returned = 0
    assert "2 rounds; the model is that of round 0" in sap.history._repr_html_()
    assert f"<td>{100 * last.density:.1f}</td>" in last._repr_html_()


def titles_of(figure):
    return [[axes.get_title() for axes in half.axes] for half in figure.subfigs]


def test_a_figure_comes_back_and_has_panels_only_for_what_was_measured(history):
    figure = history.plot()
    accuracy, index = ["accuracy", "accuracy, pruned - retrained"], ["PQ Index", "PQ Index, pruned - retrained"]
    assert titles_of(figure) == [["accuracy", "remaining weights (%)", "PQ Index", "Gini index"], accuracy + index]
    lines = {axes.get_title(): axes.lines[0].get_ydata().tolist() for axes in figure.subfigs[0].axes}
    assert pickle.loads(pickle.dumps(figure))._repr_png_().startswith(b"\x89PNG"), "a notebook shows it"
    assert lines["remaining weights (%)"] == [100 * record.density for record in history]
    sap = SAP(mlp())
    sap.step()
    assert titles_of(sap.history.plot()) == [["remaining weights (%)", "PQ Index"], index]
    alone = SAP(mlp())
    alone.record({"loss": 1.0})
    assert titles_of(alone.history.plot()) == [["loss", "remaining weights (%)", "PQ Index"]]


@pytest.mark.parametrize(
    ("accuracies", "span"), [([0.977, 0.974, 0.979], 0.095), ([98.0, 98.0], 9.5), ([0.9, 0.2], 0.7)]
)
def test_noise_does_not_fill_a_panel(accuracies, span):
    sap = SAP(mlp())
    for accuracy in accuracies:
        sap.record({"accuracy": accuracy})
    low, high = sap.history.plot().subfigs[0].axes[0].get_ylim()
    assert low <= min(accuracies) <= max(accuracies) <= high
    assert span <= high - low <= 1.2 * span


def test_noise_does_not_fill_a_panel_of_differences():
    accuracies = iter([0.98, 0.978, 0.979, 0.981, 0.98])
    history = iterative_sap(mlp(), lambda model: None, eval_fn=lambda model: next(accuracies), iterations=2)
    axes = history.plot().subfigs[1].axes[1]
    assert axes.get_title() == "metric, pruned - retrained"
    low, high = axes.get_ylim()
    assert 0.09 < high - low < 0.1


@pytest.mark.parametrize("losses", [[math.nan, math.nan], [0.5, math.inf], [math.nan, 0.5, 0.5]])
def test_a_metric_that_is_not_finite_is_drawn(losses, tmp_path):
    sap = SAP(mlp())
    for loss in losses:
        sap.record({"loss": loss})
    sap.history.plot(tmp_path / "history.png")
    assert (tmp_path / "history.png").stat().st_size > 0


def test_a_metric_with_the_name_of_a_column_hides_nothing():
    sap = SAP(mlp())
    found = sap.step(
        {"pqi": 9.0, "seconds": 8.0, "accuracy": 0.5, "pruned_loss": 7.0}, eval_fn=lambda model: {"loss": 6.0}
    )
    row = found.row()
    assert row["pqi"] == found.pqi
    assert row["seconds"] == found.seconds
    assert (row["metric_pqi"], row["metric_seconds"], row["accuracy"]) == (9.0, 8.0, 0.5)
    assert (row["pruned_loss"], row["metric_pruned_loss"]) == (7.0, 6.0)
