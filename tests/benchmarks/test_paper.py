"""benchmarks/paper: the paper's models, runs that resume, and a page that shows the committed histories."""

import csv
import itertools
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import torch_sap

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("timm")

from matplotlib.figure import Figure
from pages import fill
from paper import adaptive, authors, draw, experiments, figures, models, published, results, tables
from paper import main as main_module
from paper import runs as paper_runs
from paper.main import IMAGES, NAMES, PAGE, RESULTS, main, page_of, table_path
from paper.runs import Run, complete
from style import WIDTH, percent_log

PAPER = str(Path(__file__).parents[2] / "benchmarks" / "paper")
FASHION = {"in_chans": 1, "image_size": 28, "num_classes": 10}
CIFAR = {"in_chans": 3, "image_size": 32, "num_classes": 10}
TINY = Run(data="digits", rounds=2, epochs=1)
CURVE = results.Curve(((1.0, 0.9, 10), (0.1, 0.7, 20), (0.01, 0.5, 30)))
SHOWN = [
    ("anchors", experiments.ANCHORS),
    ("differences", experiments.ANCHORS),
    ("figure2", experiments.REDUCED["mlp", "fashion-mnist"]),
    ("figure3", experiments.REDUCED["mlp", "fashion-mnist"]),
    ("figure3", experiments.REDUCED["cnn", "fashion-mnist"]),
    ("figure4", experiments.ABLATION),
    ("figure5", experiments.ABLATION),
    ("audit", experiments.REDUCED["mlp", "fashion-mnist"]),
    ("audit", experiments.REDUCED["cnn", "fashion-mnist"]),
    ("audit", experiments.REDUCED["test_resnet", "fashion-mnist"]),
    ("cifar10", experiments.CIFAR10),
    ("adaptive", experiments.ADAPTIVE),
    ("settings", experiments.ADAPTIVE),
]


def shapes_of(model):
    return [tuple(getattr(module, name).shape) for module, name in torch_sap.prunable_parameters(model)]


def size_of(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_linear_and_mlp():
    assert shapes_of(models.build("linear", **FASHION)) == [(10, 784)]
    model = models.build("mlp", **FASHION)
    assert shapes_of(model) == [(128, 784), (256, 128), (10, 256)]
    assert sum(rows * columns for rows, columns in shapes_of(model)) == 135_680  # as the authors' runs count


@pytest.mark.parametrize(("width", "channels"), [(None, (64, 128, 256, 512)), (16, (16, 32, 64, 128))])
def test_cnn(width, channels):
    model = models.build("cnn", width=width, **CIFAR)
    convolutions = [(b, a, 3, 3) for a, b in zip((3, *channels[:-1]), channels, strict=True)]
    assert shapes_of(model) == [*convolutions, (10, channels[-1])]
    assert [type(module) for module in model][:16] == 4 * [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d]
    assert all(not module.bias.any() for module in model if isinstance(module, nn.Conv2d | nn.Linear))
    deviation = (2 / (9 * channels[2])) ** 0.5  # He's, with fan_out
    assert float(model[8].weight.detach().std()) == pytest.approx(deviation, rel=0.05)


@pytest.mark.parametrize(
    ("name", "layers", "parameters"),
    [
        # 11.17 million is what others count for the pre-activation ResNet18 of CIFAR-10.
        ("resnet18", 1 + 2 * 8 + 3 + 1, 11_172_170),
        # Zagoruyko and Komodakis count 23.4 million for WRN-28-8: 28 layers with three shortcuts and the head.
        ("wresnet28x8", 1 + 2 * 12 + 3 + 1, 23_354_842),
    ],
)
def test_residual_networks(name, layers, parameters):
    model, seen = models.build(name, **CIFAR), []
    assert (len(shapes_of(model)), size_of(model)) == (layers, parameters)
    model.norm.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape[2:])))
    for path, module in model.blocks[1].named_children():
        module.register_forward_hook(lambda *_, path=path: seen.append(path))
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    size = 32 // 2 ** (3 if name == "resnet18" else 2)
    assert seen == ["norm1", "conv1", "norm2", "conv2", (size, size)]  # norm and ReLU before each convolution


def test_models_of_timm():
    assert models.build("test_resnet", **FASHION).eval()(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    with torch.device("meta"):
        resnet50 = models.build("resnet50", in_chans=3, image_size=64, num_classes=200)
    assert size_of(resnet50) == 25_557_032 - (1000 - 200) * 2049  # 25.6 million with the 1000 classes of ImageNet
    with pytest.raises(ValueError, match=r"model must be one of linear, .* or a model of timm, got 'mlq'"):
        models.build("mlq", **FASHION)
    with pytest.raises(ValueError, match="width must be left out but for the model cnn, got width=8 for mlp"):
        models.build("mlp", width=8, **FASHION)


def histories_are_equal(first, second):
    def timeless(history):
        return [{**item, "seconds": 0} for item in history.to_dict()["rounds"]]

    return timeless(first) == timeless(second)


@pytest.mark.parametrize("method", ["lottery-ticket", "one-shot", "random", "plain"])
def test_the_baselines_prune_their_share_per_round(method, tmp_path):
    history = complete(replace(TINY, method=method), tmp_path)
    assert [found.density for found in history] == pytest.approx([1, 0.8, 0.64], abs=1e-4)


def test_sap_prunes_what_its_settings_say_and_a_finished_run_is_not_repeated(tmp_path):
    run = replace(TINY, scope="neuron", p=1.0, q=2.0, gamma=0.5, eta_r=0.1)
    history = complete(run, tmp_path)
    assert history[0].hyperparameters == {"p": 1.0, "q": 2.0, "eta_r": 0.1, "gamma": 0.5, "beta": 0.9}
    assert history[0].scope == "neuron"
    assert history[2].density < history[1].density < 1
    assert all(found.metrics["pqi_half_1"] != found.pqi for found in history)
    again = complete(run, tmp_path, on_epoch=lambda *_: pytest.fail("trained again"))
    assert histories_are_equal(history, again)


def test_the_name_of_a_run_holds_all_its_settings():
    changes = {"model": "cnn", "data": "cifar10", "seed": 5, "rounds": 3, "epochs": 4, "scope": "layer", "p": 0.1}
    changes |= {"q": 3.0, "eta_r": 0.3, "gamma": 2.0, "beta": 0.8, "width": 8, "images": 50, "test_images": 60}
    changes |= {"batch_size": 10, "authors": "clip", "method": "random", "rewind": "late", "weight_decay": 0.0}
    changes |= {"source": 4}
    names = {replace(TINY, **{key: value}).name for key, value in changes.items()} | {TINY.name}
    assert len(names) == len(changes) + 1
    assert replace(TINY, method="random", ratio=0.1).name != replace(TINY, method="random").name


RESUMED = ["one-shot", "random", "clip+count", "late", "replay", "sap"]
RESUMED_SETTINGS = [
    {"method": "one-shot"},
    {"method": "random"},
    {"authors": "clip+count"},
    {"rewind": "late", "epochs": 2},
]
RESUMED_SETTINGS += [{"method": "replay", "source": 1}, {}]


@pytest.mark.parametrize("settings", RESUMED_SETTINGS, ids=RESUMED)
def test_every_method_resumes_where_it_was_interrupted(settings, tmp_path):
    run = replace(TINY, rounds=3, **settings)
    whole = complete(run, tmp_path / "whole")
    trained, left = [], []
    if run.source is not None:
        complete(run.followed, tmp_path)

    def interrupt(epoch, loss):
        trained.append(epoch)
        if len(trained) == 3 * run.epochs:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        complete(run, tmp_path, on_epoch=interrupt)
    finished = torch_sap.History.from_json(tmp_path / run.name / "rounds.json")
    torch.manual_seed(99)
    resumed = complete(run, tmp_path, on_epoch=lambda epoch, loss: left.append(epoch))
    assert len(left) == 2 * run.epochs  # of four trainings
    assert histories_are_equal(resumed, whole)
    assert histories_are_equal(finished, whole[:2])
    assert {path.name for path in (tmp_path / run.name).iterdir()} == {"config.json", "history.json"}


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_controls_prune_what_sap_did_without_measuring(scope, tmp_path):
    sap = replace(TINY, p=1.0, q=2.0, scope=scope)
    followed = complete(sap, tmp_path)
    replayed = complete(replace(sap, method="replay", source=0, seed=1), tmp_path)
    own = complete(replace(sap, seed=1), tmp_path)
    for one, other, measured in zip(replayed[:-1], followed[:-1], own[:-1], strict=True):
        counts = [{name: group.c.tolist() for name, group in found.groups.items()} for found in (one, other, measured)]
        assert counts[0] == counts[1] != counts[2]
    fixed = complete(replace(sap, method="mean-share", source=0), tmp_path)
    shares = [1 - after.density / before.density for before, after in itertools.pairwise(fixed)]
    assert shares[0] == pytest.approx(shares[1], abs=1e-3)
    assert fixed[-1].density == pytest.approx(followed[-1].density, abs=1e-3)
    with pytest.raises(ValueError, match="source must be a seed for the method replay, got None"):
        complete(replace(sap, method="replay"), tmp_path)


def test_rewinding(tmp_path):
    runs = {rewind: replace(TINY, rounds=1, epochs=2, rewind=rewind) for rewind in ("init", "late", "none")}
    found = {rewind: complete(run, tmp_path) for rewind, run in runs.items()}
    assert len({history[0].metrics["loss"] for history in found.values()}) == 1
    assert len({history[1].metrics["loss"] for history in found.values()}) == 3
    # The weights that a training starts from are those after the pruning: kept, or set back to an earlier moment.
    norms = {}
    for rewind, run in runs.items():
        starts = []

        def fit(model, split, recipe, on_epoch, before_step=None, starts=starts):
            starts.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
            for epoch in range(recipe.epochs):
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_(1.0)
                on_epoch(epoch + 1, 0.0)
            return {}

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(paper_runs, "fit", fit)
            complete(run, tmp_path / "moved")
        kept = starts[1] != 0
        norms[rewind] = float((starts[1] - starts[0])[kept].mean())
    assert norms == pytest.approx({"init": 0.0, "late": 1.0, "none": 2.0}, abs=1e-5)


def test_a_run_without_prunings_records_sparsity_by_epoch(tmp_path):
    found = complete(replace(TINY, method="plain", rounds=0, epochs=2), tmp_path)
    (only,) = found
    indices = {name: value for name, value in only.metrics.items() if name.startswith("epoch")}
    assert len(indices) == 2 * 2 * 4  # epochs, norms, the whole and three tensors
    assert indices["epoch 2 (0.5, 1) global"] == pytest.approx(only.pqi)
    assert indices["epoch 1 (0.5, 1) global"] != indices["epoch 2 (0.5, 1) global"]
    assert indices["epoch 2 (0.5, 1) 1.weight"] == pytest.approx(float(only.retrained.pqi["layer"]["1.weight"][0]))


def base_of(*arguments):
    return main_module.base_of(main_module._parser().parse_args([arguments[0], "run", *arguments[1:]]))


def test_without_further_arguments_an_experiment_has_the_budget_of_its_page():
    bases = {name: base_of(name) for name in NAMES}
    assert bases == {**dict.fromkeys(NAMES, experiments.REDUCED["mlp", "fashion-mnist"]), **experiments.BASES}
    assert base_of("audit", "--model", "cnn").images == 2000
    assert base_of("figure4", "--model", "cnn") == experiments.REDUCED["cnn", "fashion-mnist"]


def test_the_budget_of_cifar10_is_not_that_of_the_small_cnn():
    cifar10 = base_of("figure2", "--data", "cifar10", "--model", "cnn", "--epochs", "4")
    assert cifar10 == replace(experiments.CIFAR10, epochs=4)
    assert (cifar10.batch_size, cifar10.images, cifar10.ratio) == (250, None, 0.2)
    resnet = base_of("figure2", "--data", "cifar10", "--model", "resnet18")
    assert resnet == Run(model="resnet18", data="cifar10", rounds=15, epochs=200)


@pytest.fixture(scope="module")
def adaptive_runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("adaptive")
    base = replace(TINY, rounds=3)
    runs = [*experiments.controls(base, 0, (0, 1)), *experiments.controls(base, 1, (0, 1))]
    runs += [replace(base, method="lottery-ticket", ratio=0.5), *experiments.dense(replace(base, epochs=12), (0,))]
    return {run: complete(run, out) for run in runs}


def rows_of(text):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]


def test_tables_of_how_adaptive_sap_is(adaptive_runs):
    pruned = {run: history for run, history in adaptive_runs.items() if run.rounds}
    head, _, *lines = rows_of(adaptive.share_table(pruned))
    assert [line[0] for line in lines] == ["SAP global (p=1, q=2)", "SAP layer (p=0.5, q=1)"]
    mine = [history for run, history in pruned.items() if (run.method, run.scope) == ("sap", "global")]
    first = np.mean([1 - history[1].density for history in mine])
    assert lines[0][head.index("1")] == f"{100 * first:.0f} %"
    assert head.index("3") == 4
    spans = [line[head.index("tensors: first round")] for line in lines]
    assert all(re.fullmatch(r"\d+ to \d+ %", span) for span in spans)

    controls = draw._controls(pruned, "global")
    head, _, *lines = rows_of(adaptive.control_table(controls))
    assert [line[0].split(" of ")[0] for line in lines] == [
        "SAP global (p=1, q=2)",
        "fixed at the mean share",
        "shares",
    ]
    assert lines[0][-1] == "0"
    gaps = []
    for seed in (0, 1):
        ends = {run.method: history[-1].metrics["accuracy"] for run, history in controls.items() if run.seed == seed}
        gaps.append(100 * (ends["replay"] - ends["sap"]))
    assert lines[2][-1] == f"{np.mean(gaps):+.2f} ± {np.std(gaps, ddof=1):.2f}"
    ends = [line[head.index("which is at")] for line in lines]
    assert ends[0] == ends[1]

    tuned = {run: history for run, history in pruned.items() if run.source is None and run.scope == "global"}
    names = [line[0] for line in rows_of(adaptive.tuned_table(tuned))[2:]]
    assert names == ["SAP global (p=1, q=2)", "Lottery Ticket 50 %"]


def test_the_table_of_dense_networks(adaptive_runs):
    dense = {run: history for run, history in adaptive_runs.items() if not run.rounds}
    head, _, *lines = rows_of(adaptive.dense_table(dense))
    assert [line[:3] for line in lines] == [
        ["mlp, digits", decay, norms] for decay in ("0", "0.0005") for norms in ("0.5, 1", "1, 2")
    ]
    index = float(lines[0][head.index("after 12")])
    share = lines[0][head.index("share after 12")]
    assert share.startswith(f"{100 * index:.0f} % (")  # with p=0.5 and q=1 the share is the index
    index = float(lines[1][head.index("after 12")])
    assert abs(float(lines[1][head.index("share after 12")].split(" %")[0]) - 100 * (1 - (1 - index) ** 2)) < 1


def test_the_first_round_of_each_network(adaptive_runs):
    sap = {run: history for run, history in adaptive_runs.items() if run.method == "sap"}
    curves = published.read_published(RESULTS / draw.PUBLISHED)
    _, _, ours, theirs = rows_of(adaptive.first_table(sap, curves))
    assert ours[:2] == ["mlp, digits", "1"]
    for column, norms in ((3, (0.5, 1.0)), (5, (1.0, 2.0))):
        first = [history[0] for run, history in sap.items() if (run.p, run.q) == norms]
        index = np.mean([found.retrained.pqi["global"]["global"][0] for found in first])
        share = index if norms == (0.5, 1.0) else 1 - (1 - index) ** 2
        assert ours[column] == f"{100 * share:.0f} %"
    assert theirs == ["cnn64, cifar10, as published", "200", "90.3", "31 %", "-", "77 %", "-"]


def test_remaining_weights_after_prunings(adaptive_runs):
    sap = {run: history for run, history in adaptive_runs.items() if run.method == "sap"}
    head, _, *lines = rows_of(adaptive.remaining_table(sap))
    assert [line[:2] for line in lines] == [
        ["global (p=1, q=2)", "mlp, digits, 1"],
        ["layer (p=0.5, q=1)", "mlp, digits, 1"],
    ]
    members = [history for run, history in sap.items() if run.scope == "global"]
    density, accuracy = (np.mean([value(history[1]) for history in members]) for value in (density_of, accuracy_of))
    assert lines[0][head.index("1")] == f"{100 * density:.3g}, {100 * accuracy:.1f}"
    assert lines[0][head.index("7")] == "-"


def density_of(found):
    return found.density


def accuracy_of(found):
    return found.metrics["accuracy"]


def test_published_curves_beside_ours(adaptive_runs, tmp_path):
    curves = published.read_published(RESULTS / draw.PUBLISHED)
    assert list(curves) == [name for name in published.METHODS if name != "random"]
    rounds, remaining, accuracy = curves["SAP global (p=1, q=2)"]
    assert [values[3] for values in (rounds, remaining, accuracy)] == [3, 2.7, 88.2]
    pruned = {run: history for run, history in adaptive_runs.items() if run.rounds and run.source is None}
    mine = published.ours(pruned)
    assert {name: len(curve[0]) for name, curve in mine.items()} == {"SAP global (p=1, q=2)": 4, "Lottery Ticket": 4}
    head, _, *lines = rows_of(published.published_table(pruned, curves))
    assert [line[:2] for line in lines] == [["SAP global (p=1, q=2)", where] for where in ("here", "published")]
    remaining = [line[head.index("remaining after 3")] for line in lines]
    assert remaining == [f"{mine['SAP global (p=1, q=2)'][1, 3]:.1f} %", "2.7 %"]
    assert lines[0][head.index("remaining after 8")] == "-"
    published.draw_published(pruned, curves, tmp_path / "a.png")
    adaptive.draw_adaptive({"digits": draw._controls(adaptive_runs, "global")}, tmp_path / "b.png")
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("a.png", "b.png"))


def test_the_clipping_of_the_authors_counts_the_gradient_of_pruned_weights(monkeypatch, tmp_path):
    recipe = paper_runs.Recipe

    def both(clip):
        monkeypatch.setattr(paper_runs, "Recipe", lambda *a, **k: recipe(*a, **k, clip=clip))
        return [complete(replace(TINY, authors=authors), tmp_path / str(clip)) for authors in ("", "clip")]

    plain, twin = both(0.01)  # less than the norm of any gradient
    assert twin[0].metrics == plain[0].metrics
    assert twin[2].metrics != plain[2].metrics
    assert histories_are_equal(*both(1e9))


def test_the_count_of_the_authors_is_at_most_one_lower():
    d, index = np.arange(2, 5000), np.linspace(0.01, 0.5, 4998)
    lost = torch_sap.decide.bounds.Hyperparameters().count(index, d) - authors.AuthorsCount().count(index, d)
    assert set(lost) == {0, 1}
    assert 0.05 < lost.mean() < 0.5


@pytest.mark.slow
def test_a_killed_command_ends_its_processes_and_resumes(tmp_path):
    run = replace(TINY, rounds=30, epochs=2)
    budget = ["--data", "digits", "--rounds", "30", "--epochs", "2", "--seeds", "0"]
    folders = ["--out", str(tmp_path), "--results", str(tmp_path / "packed")]
    command = [sys.executable, PAPER, "figure2", "run", *budget, *folders]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    state, saved = tmp_path / run.name / "state.pt", set()
    while len(saved) < 3:  # some trainings are done
        saved |= {state.stat().st_mtime_ns} if state.exists() else set()
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(2)
    written = state.stat().st_mtime_ns
    time.sleep(2)
    assert state.stat().st_mtime_ns == written
    left = []
    resumed = complete(run, tmp_path, on_epoch=lambda epoch, loss: left.append(epoch))
    assert 0 < len(left) < 62
    whole = complete(run, tmp_path / "whole")
    kept = [[(found.remaining, found.metrics["accuracy"]) for found in history] for history in (resumed, whole)]
    assert kept[0] == kept[1]  # sums may differ in the last bit: numpy's order depends on where an array lies


def test_a_curve_is_linear_over_the_logarithm_of_the_density():
    reached = {1.0: 0.9, 0.1: 0.7, 10**-0.5: 0.8, 10**-1.75: 0.55, 0.01: 0.5, 0.009: math.nan}
    assert {density: CURVE.accuracy_at(density) for density in reached} == pytest.approx(reached, nan_ok=True)
    areas = {0.1: 0.8, 0.01: 0.7, 10**-0.5: 0.85, 10**-1.5: (0.8 * 1 + 0.65 * 0.5) / 1.5, 0.001: math.nan}
    assert {density: CURVE.mean_accuracy(density) for density in areas} == pytest.approx(areas, nan_ok=True)
    assert [CURVE.epochs_to(density) for density in (1.0, 0.5, 0.1, 0.05, 0.001)] == [10, 20, 20, 30, math.inf]
    missed_by_a_hair = results.Curve(((1.0, 0.9, 10), (0.010001, 0.5, 20)))
    assert missed_by_a_hair.accuracy_at(0.01) == pytest.approx(0.5)
    assert missed_by_a_hair.epochs_to(0.01) == 20
    assert results.mean_and_std([1.0, 2.0, 3.0]) == (2.0, 1.0)


def test_packed_histories_keep_what_the_page_needs(tmp_path):
    run = replace(TINY, scope="neuron")
    history = complete(run, tmp_path)
    results.pack([run, replace(run, seed=9)], tmp_path, tmp_path / "packed")
    (path,) = (tmp_path / "packed").iterdir()
    ((found_run, found),) = results.read(tmp_path / "packed").items()
    assert (path.name, found_run) == ("mlp-digits.json.gz", run)
    for small, whole in zip(found, history, strict=True):
        assert (small.density, small.pruned_count, small.scope) == (whole.density, whole.pruned_count, "neuron")
        assert small.metrics == pytest.approx(whole.metrics, rel=1e-5)
        for kind, scope in (("pqi", "layer"), ("gini", "global")):
            kept, measured = (getattr(found.retrained, kind)[scope] for found in (small, whole))
            for name, values in measured.items():
                assert kept[name] == pytest.approx(values, rel=1e-5)
    before = path.read_bytes()
    results.pack([run], tmp_path, tmp_path / "packed")
    assert path.read_bytes() == before
    assert before[4:8] == bytes(4)  # gzip's time of writing, which would differ from one second to the next
    other = replace(run, seed=1)
    complete(other, tmp_path)
    results.pack([other], tmp_path, tmp_path / "packed")
    assert set(results.read(tmp_path / "packed")) == {run, other}
    unfinished = replace(run, seed=2)
    (tmp_path / unfinished.name).mkdir()
    history[:2].to_json(tmp_path / unfinished.name / "rounds.json")
    results.pack([unfinished], tmp_path, tmp_path / "packed")
    assert len(results.read(tmp_path / "packed")[unfinished]) == 2
    history[:1].to_json(tmp_path / unfinished.name / "rounds.json")
    results.pack([unfinished], tmp_path, tmp_path / "packed")
    assert len(results.read(tmp_path / "packed")[unfinished]) == 2  # what is packed and longer stays
    groups = figures.grouped({run: history, other: history, replace(run, p=0.3): history})
    assert [len(members) for members in groups.values()] == [2, 1]
    with pytest.raises(ValueError, match="runs must differ by their seeds only to be averaged"):
        figures.grouped({run: history, replace(run, epochs=99): history})


def test_a_page_shows_runs_before_all_are_finished(adaptive_runs, tmp_path):
    sap = [run for run in adaptive_runs if (run.method, run.scope, run.seed) == ("sap", "global", 0)]
    followed = [run for run in adaptive_runs if run.source is not None and (run.scope, run.seed) == ("global", 0)]
    wanted = [*sap, replace(sap[0], seed=1), replace(sap[0], seed=7), *followed]
    begun = {**adaptive_runs, replace(sap[0], seed=1): adaptive_runs[replace(sap[0], seed=1)][:2]}
    found = tables.finished(begun, wanted)
    assert list(found) == [*sap, *followed]  # a seed is not begun, and one has fewer rounds
    stopped = {**found, **{run: found[run][:3] for run in followed}}
    gaps = [[line[-1] for line in rows_of(adaptive.control_table(of))[2:]] for of in (found, stopped)]
    assert gaps[1] == ["0", "-", "-"]
    assert "-" not in gaps[0]
    whole = [run for run in experiments.cifar10() if run.source is None]
    assert {run.method for run in whole} == {"sap", "lottery-ticket", "one-shot", "random", "plain"}
    assert "cnn16-cifar10-all-8x3-replay-1-2-0-1-global-of0-seed1" in {run.name for run in experiments.cifar10()}


def test_every_experiment_needs_each_run_once_and_shares_them():
    for name in NAMES:
        chosen = getattr(experiments, name)(Run())
        assert len(set(chosen)) == len(chosen) > 0
    assert {*experiments.figure2(Run()), *experiments.figure3(Run())} <= {*experiments.audit(Run())}
    assert [experiments.paper_budget(name).rounds for name in ("resnet18", "mlp")] == [15, 30]


@pytest.fixture(scope="module")
def committed():
    return results.read(RESULTS)


@pytest.mark.parametrize(("name", "base"), SHOWN, ids=lambda value: getattr(value, "model", value))
def test_the_page_shows_the_committed_histories(name, base, committed):
    of_page, images = getattr(draw, name)(committed, base, RESULTS)
    page = page_of(name).read_text("utf-8")
    assert fill(page, {key: text for key, text in of_page.items() if f"<!-- begin {key} -->" in page}) == page
    for key, text in of_page.items():
        saved = table_path(RESULTS, key)
        with saved.open(newline="", encoding="utf-8") as file:
            head, *lines = csv.reader(file)
        assert [head, *lines] == [line for line in rows_of(text) if set(line) != {"---"}]
    for image in images:
        assert f"](images/{image})" in page
        assert (IMAGES / image).stat().st_size > 10_000


@pytest.mark.parametrize(("name", "base"), SHOWN, ids=lambda value: getattr(value, "model", value))
def test_figures_can_be_read_on_a_phone_and_without_colors(name, base, committed, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
    for image, save in getattr(draw, name)(committed, base, RESULTS)[1].items():
        save(tmp_path / image)
    for figure in drawn:
        assert figure.get_figwidth() <= WIDTH
        for axes in figure.axes:
            looks = {}
            for line in axes.get_lines():
                if not line.get_label().startswith("_"):
                    looks[line.get_label()] = (line.get_linestyle(), line.get_marker())
            assert len(looks) <= 5
            assert len(set(looks.values())) == len(looks)
            texts = [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels(), *axes.get_yticklabels()]
            legends = [one for one in (axes.get_legend(), *figure.legends) if one is not None]
            texts += [text for one in legends for text in one.get_texts()]
            assert min(text.get_fontsize() for text in texts) >= 8
            for axis, scale in ((axes.xaxis, axes.get_xscale()), (axes.yaxis, axes.get_yscale())):
                if scale == "log":
                    assert str(axis.get_major_formatter()(10.0, 0)).endswith(" %")


def test_a_logarithmic_axis_has_percent_ticks():
    axes = Figure().subplots()
    for lowest, labels in ((0.2, ["1 %", "10 %", "100 %"]), (8, ["10 %", "20 %", "50 %", "100 %"])):
        axes.set_xscale("log")
        percent_log(axes.xaxis, [lowest, 100.0])
        ticks = axes.xaxis.get_majorticklocs()
        assert [axes.xaxis.get_major_formatter()(tick, 0) for tick in ticks] == labels


def test_every_number_in_the_text_is_in_a_table():
    page = PAGE.read_text("utf-8")
    shown = "".join(path.read_text("utf-8") for path in (RESULTS / "tables").iterdir())
    text = re.sub(r"<!-- begin .*?<!-- end .*?-->|```.*?```|`[^`]*`|\(p=[^)]*\)|\]\([^)]*\)", "", page, flags=re.DOTALL)
    numbers = set(re.findall(r"\d+\.\d\d+", text))
    assert {"89.13", "1.22"} <= numbers
    assert numbers <= set(re.findall(r"\d+\.\d\d+", shown))


def test_drawing_writes_figures_and_fills_a_page(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- begin anchors -->\nold\n<!-- end anchors -->\n")
    packed = shutil.copytree(RESULTS, tmp_path / "packed", ignore=shutil.ignore_patterns("tables"))
    main(["anchors", "draw", "--images-dir", str(tmp_path), "--page", str(page), "--results", str(packed)])
    assert [path.name for path in (packed / "tables").iterdir()] == ["anchors.csv"]
    assert (tmp_path / "paper_anchors.png").stat().st_size > 10_000
    assert "old" not in page.read_text()
    assert "Lottery Ticket" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"18 of 18 runs have no saved history: mlp-fashion-mnist-20000-12x3-sap"):
        main(["figure4", "draw", "--results", str(tmp_path)])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "base"), SHOWN[2:], ids=lambda value: getattr(value, "model", value))
def test_all_figures_are_drawn(name, base, committed, tmp_path):
    for image, save in getattr(draw, name)(committed, base, RESULTS)[1].items():
        save(tmp_path / image)
        assert (tmp_path / image).stat().st_size > 10_000
