"""The hypothesis as a rule, on numbers and on recorded histories."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from torch_sap import History, iterative_sap
from torch_sap.records.phases import label_phases
from torch_sap.records.plots import PHASE_COLORS, shade_phases

REGULARIZATION, COMPRESSION, COLLAPSE = "regularization", "compression", "collapse"

# PQ Index and accuracy of the retrained models, recorded: One Shot of an MLP on FashionMNIST by the code of the paper's
# authors, seed 0 (remaining weights 100, 80, 64, ... %).
ONE_SHOT_PQI = [0.1786, 0.1484, 0.1233, 0.1049, 0.0914, 0.0812, 0.0749, 0.0750, 0.0812, 0.0851, 0.0948]
ONE_SHOT_ACCURACY = [0.888, 0.887, 0.889, 0.892, 0.893, 0.890, 0.888, 0.888, 0.887, 0.884, 0.881]


def test_the_table_of_the_rule():
    pqi = [0.5, 0.4, 0.4, 0.5, 0.6, 0.5, 0.6, 0.5]
    accuracy = [0.90, 0.92, 0.916, 0.91, 0.92, 0.86, 0.86, 0.90]
    assert label_phases(pqi, accuracy) == [
        None,  # nothing to compare with
        REGULARIZATION,  # falls, better
        REGULARIZATION,  # equal, within noise of the best
        COMPRESSION,  # rises, a little is lost
        COMPRESSION,  # rises, nothing is lost
        COLLAPSE,  # falls, 0.06 is lost
        None,  # rises while much is lost
        None,  # falls while a little is lost
    ]


@pytest.mark.parametrize(
    ("settings", "label"),
    [({}, COLLAPSE), ({"significant": 0.2}, None), ({"noise": 0.07, "significant": 0.2}, REGULARIZATION)],
)
def test_noise_and_significance_count_from_the_best_round(settings, label):
    assert label_phases([0.5, 0.4, 0.3], [0.80, 0.90, 0.84], **settings)[2] == label


def test_a_loss_is_better_small():
    assert label_phases([0.5, 0.4, 0.3], [1.0, 0.9, 1.5], mode="min") == [None, REGULARIZATION, COLLAPSE]
    assert label_phases([0.5, 0.4, 0.3], [1.0, 0.9, 1.5], mode="max") == [None, COLLAPSE, REGULARIZATION]


@pytest.mark.parametrize("nan_at", ["pqi", "metric"])
def test_nan_has_no_label_and_does_not_affect_later_rounds(nan_at):
    pqi, accuracy = [0.5, 0.4, 0.3, 0.2], [0.9, 0.9, 0.9, 0.9]
    (pqi if nan_at == "pqi" else accuracy)[1] = float("nan")
    labels = label_phases(pqi, accuracy)
    assert labels[1] is None
    assert labels[3] == REGULARIZATION


def test_one_shot_of_the_authors_regularizes_and_then_compresses():
    labels = label_phases(ONE_SHOT_PQI, ONE_SHOT_ACCURACY, noise=0.0061)
    assert labels == [None, *[REGULARIZATION] * 6, *[COMPRESSION] * 4]


@pytest.fixture
def history():
    torch.manual_seed(0)
    accuracies = iter([0.90, 0.91, 0.50])
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 5))
    return iterative_sap(model, lambda model: {"loss": 1.0, "accuracy": next(accuracies)}, iterations=2)


def test_a_history_labels_its_rounds(history):
    falling = [history[1].pqi < history[0].pqi, history[2].pqi < history[1].pqi]
    assert falling == [True, True]
    assert history.phases() == [None, REGULARIZATION, COLLAPSE]
    assert history.phases(metric="loss", mode="min") == [None, REGULARIZATION, REGULARIZATION]
    assert History.from_dict(json.loads(json.dumps(history.to_dict()))).phases() == history.phases()


def test_a_metric_that_is_not_recorded_is_named(history):
    with pytest.raises(ValueError, match=r"metric 'f1' must be recorded in every round, but round 0 lacks it"):
        history.phases(metric="f1")
    later = History([history[0], replace(history[1], metrics={})])
    with pytest.raises(ValueError, match="metric 'accuracy' must be recorded in every round, but round 1 lacks it"):
        later.phases()


def test_bands_in_the_plot(history, tmp_path):
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure

    history.plot(tmp_path / "bands.svg", phases=history.phases())
    assert REGULARIZATION in (tmp_path / "bands.svg").read_text()
    with pytest.raises(ValueError, match="phases must have a label for each of the 3 rounds, got 1"):
        history.plot(tmp_path / "no.svg", phases=["collapse"])
    assert not (tmp_path / "no.svg").exists()
    axes = Figure().subplots()
    shade_phases(axes, history.phases())
    found = [(band.get_x(), to_rgb(band.get_facecolor())) for band in axes.patches]
    assert found == [(0.5, to_rgb(PHASE_COLORS[REGULARIZATION])), (1.5, to_rgb(PHASE_COLORS[COLLAPSE]))]
