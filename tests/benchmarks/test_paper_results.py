"""The numbers that the page takes from saved histories, by hand values, and that the page holds what `draw` makes."""

import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import torch_sap

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

pytest.importorskip("matplotlib")

import paper
import paper_anchors
import paper_draw
import paper_experiments
import paper_figures
import paper_results
import paper_runs
import paper_tables
from paper_results import Curve
from zoo_page import fill

CURVE = Curve(((1.0, 0.9, 10), (0.1, 0.7, 20), (0.01, 0.5, 30)))
# What the page shows: experiments with their budgets.
SHOWN = [
    ("anchors", paper_experiments.ANCHORS),
    ("differences", paper_experiments.ANCHORS),
    ("figure2", paper_experiments.REDUCED["mlp"]),
    ("figure3", paper_experiments.REDUCED["mlp"]),
    ("figure3", paper_experiments.REDUCED["cnn"]),
    ("figure4", paper_experiments.ABLATION),
    ("figure5", paper_experiments.ABLATION),
    ("audit", paper_experiments.REDUCED["mlp"]),
    ("audit", paper_experiments.REDUCED["cnn"]),
    ("audit", paper_experiments.REDUCED["test_resnet"]),
]


def pruned_history(scope="neuron", seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 5))
    sap = torch_sap.SAP(model, scope=scope, gini=True)
    scores = iter((0.8, 0.7, 0.3))

    def train(model):
        return {"accuracy": next(scores), "pqi_half_1": paper_runs.pq_index_of(model)}

    return torch_sap.iterative_sap(sap, train, iterations=2, eval_fn=lambda model: {"loss": math.pi})


def test_accuracy_between_rounds_lies_on_a_line_over_the_logarithm():
    assert CURVE.accuracy_at(1.0) == 0.9
    assert CURVE.accuracy_at(0.1) == pytest.approx(0.7)
    assert CURVE.accuracy_at(10**-0.5) == pytest.approx(0.8)
    assert CURVE.accuracy_at(10**-1.75) == pytest.approx(0.55)
    assert CURVE.accuracy_at(0.01) == pytest.approx(0.5)
    assert math.isnan(CURVE.accuracy_at(0.009))


def test_a_density_that_whole_entries_miss_by_a_hair_is_reached():
    curve = Curve(((1.0, 0.9, 10), (0.010001, 0.5, 20)))
    assert curve.accuracy_at(0.01) == pytest.approx(0.5)
    assert curve.epochs_to(0.01) == 20


def test_rounds_that_prune_nothing():
    assert Curve(((1.0, 0.9, 10), (0.5, 0.7, 20), (0.5, 0.6, 30))).accuracy_at(0.5) == pytest.approx(0.7)


def test_the_area_is_that_of_trapezoids():
    assert CURVE.mean_accuracy(0.1) == pytest.approx((0.9 + 0.7) / 2)
    assert CURVE.mean_accuracy(0.01) == pytest.approx(0.7)
    assert CURVE.mean_accuracy(10**-0.5) == pytest.approx(0.85)
    assert CURVE.mean_accuracy(10**-1.5) == pytest.approx((0.8 * 1 + 0.65 * 0.5) / 1.5)
    assert math.isnan(CURVE.mean_accuracy(0.001))


def test_epochs_until_a_density():
    assert [CURVE.epochs_to(density) for density in (1.0, 0.5, 0.1, 0.05, 0.001)] == [10, 20, 20, 30, math.inf]


def test_runs_that_prune_once_make_one_curve():
    once = [Curve(((1.0, 0.9, 10), (density, accuracy, 20))) for density, accuracy in ((0.1, 0.6), (0.5, 0.8))]
    assert paper_results.joined(once).points == ((1.0, 0.9, 10), (0.5, 0.8, 20), (0.1, 0.6, 20))


def test_mean_and_deviation():
    assert paper_results.mean_and_std([1.0, 2.0, 3.0]) == (2.0, 1.0)
    mean, deviation = paper_results.mean_and_std([5.0])
    assert mean == 5.0
    assert math.isnan(deviation)
    assert paper_tables.percent([0.5, 0.6]) == "55.00 ± 7.07"
    assert paper_tables.percent([0.5, math.nan]) == "-"


@pytest.mark.parametrize("scope", ["global", "layer", "neuron"])
def test_packed_histories_keep_what_the_page_needs(scope, tmp_path):
    history, run = pruned_history(scope), paper_runs.Run(data="digits", scope=scope)
    (tmp_path / run.name).mkdir()
    history.to_json(tmp_path / run.name / "history.json")
    paper_results.pack([run, replace(run, seed=9)], tmp_path, tmp_path / "packed")
    assert [path.name for path in (tmp_path / "packed").iterdir()] == ["mlp-digits.json.gz"]
    (found,) = paper_results.read(tmp_path / "packed").values()
    for small, whole in zip(found, history, strict=True):
        assert (small.density, small.pruned_count, small.scope) == (whole.density, whole.pruned_count, scope)
        assert small.metrics == pytest.approx(whole.metrics, rel=1e-5)
        assert small.pqi == pytest.approx(whole.pqi, rel=1e-5)
        for name, index in whole.retrained.pqi["layer"].items():
            assert small.retrained.pqi["layer"][name] == pytest.approx(index, rel=1e-5)
        assert small.retrained.gini["global"]["global"] == pytest.approx(
            whole.retrained.gini["global"]["global"], rel=1e-5
        )
    assert found.phases() == history.phases()


def test_packing_again_keeps_the_other_runs_and_gives_the_same_bytes(tmp_path):
    for seed in (0, 1):
        run = paper_runs.Run(data="digits", seed=seed)
        (tmp_path / run.name).mkdir()
        pruned_history("layer", seed).to_json(tmp_path / run.name / "history.json")
        paper_results.pack([run], tmp_path, tmp_path / "packed")
    assert {run.seed for run in paper_results.read(tmp_path / "packed")} == {0, 1}
    before = (tmp_path / "packed" / "mlp-digits.json.gz").read_bytes()
    paper_results.pack([run], tmp_path, tmp_path / "packed")
    assert (tmp_path / "packed" / "mlp-digits.json.gz").read_bytes() == before
    assert before[4:8] == bytes(4)  # gzip's time of writing, which would differ from one second to the next


def test_only_seeds_are_averaged():
    run, history = paper_runs.Run(), pruned_history()
    groups = paper_figures.grouped({run: history, replace(run, seed=1): history, replace(run, p=0.3): history})
    assert [len(members) for members in groups.values()] == [2, 1]
    with pytest.raises(ValueError, match="runs must differ by their seeds only to be averaged"):
        paper_figures.grouped({run: history, replace(run, epochs=99): history})


def test_means_and_deviations_over_seeds():
    histories = {paper_runs.Run(seed=seed): pruned_history(seed=seed) for seed in (0, 1)}
    values = paper_figures.over_seeds(histories, lambda found: found.metrics["accuracy"])
    assert values == pytest.approx(np.array([[0.8, 0.7, 0.3]] * 2))


def test_the_comparison_with_the_authors_by_hand():
    mine = [np.array([[100.0, 81.0, 60.0], [100, 81, 62]]), np.array([[80.0, 81, 82], [80, 83, 84]]), np.ones((2, 3))]
    theirs = [np.array([[100.0, 80.0, 63.0], [100, 80, 63]]), np.array([[80.0, 80, 81], [80, 80, 81]]), np.ones((2, 3))]
    found = paper_anchors.compare(mine, theirs)
    assert (found["remaining"], found["remaining_round"]) == (-2, 2)
    assert (found["accuracy"], found["accuracy_largest"]) == (2, 2)
    assert found["noise"] == pytest.approx(1.0)  # variance 2 of two seeds, halved by the mean; theirs has none
    assert found["outside"] == 0


def test_every_experiment_needs_each_run_once_and_shares_them():
    base = paper_runs.Run()
    for name in paper.NAMES:
        runs = getattr(paper_experiments, name)(base)
        assert len(set(runs)) == len(runs) > 0
    audited = set(paper_experiments.audit(base))
    assert {*paper_experiments.figure2(base), *paper_experiments.figure3(base)} <= audited
    assert paper_experiments.paper_budget("resnet18").rounds == 15
    assert paper_experiments.paper_budget("mlp").rounds == 30


@pytest.fixture(scope="module")
def committed():
    return paper_results.read(paper.RESULTS)


@pytest.mark.parametrize(("name", "base"), SHOWN, ids=lambda value: getattr(value, "model", value))
def test_the_page_is_made_of_the_committed_histories(name, base, committed):
    tables, figures = getattr(paper_draw, name)(committed, base, paper.RESULTS)
    page = paper.PAGE.read_text("utf-8")
    assert fill(page, tables) == page
    for figure in figures:
        assert f"](images/{figure})" in page
        assert (paper.IMAGES / figure).stat().st_size > 10_000


def test_every_number_in_the_text_is_in_a_table():
    page = paper.PAGE.read_text("utf-8")
    tables = "".join(re.findall(r"<!-- begin .*?<!-- end ", page, re.DOTALL))
    text = re.sub(r"<!-- begin .*?<!-- end .*?-->|```.*?```|`[^`]*`|\(p=[^)]*\)", "", page, flags=re.DOTALL)
    numbers = set(re.findall(r"\d+\.\d\d+", text))
    assert {"89.13", "1.22"} <= numbers
    assert numbers <= set(re.findall(r"\d+\.\d\d+", tables))


def test_drawing_writes_figures_and_fills_a_page(committed, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- begin anchors -->\nold\n<!-- end anchors -->\n")
    paper.draw("anchors", paper_experiments.ANCHORS, paper.RESULTS, tmp_path, page)
    assert (tmp_path / "paper_anchors.png").stat().st_size > 10_000
    assert "old" not in page.read_text()
    assert "Lottery Ticket" in page.read_text()
    assert "Lottery Ticket" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("name", "base"), SHOWN[2:], ids=lambda value: getattr(value, "model", value))
def test_all_figures_are_drawn(name, base, committed, tmp_path):
    _, figures = getattr(paper_draw, name)(committed, base, paper.RESULTS)
    for figure, save in figures.items():
        save(tmp_path / figure)
        assert (tmp_path / figure).stat().st_size > 10_000


def test_missing_histories_are_named(tmp_path):
    arguments = ["figure4", "draw", "--results", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"18 of 18 runs have no saved history: mlp-fashion-mnist-20000-12x3-sap"):
        paper.main(arguments)
