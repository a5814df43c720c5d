"""benchmarks/paper_runs.py and paper_jobs.py: what each method does, and that a killed run goes on without loss."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import torch_sap

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

pytest.importorskip("sklearn")

import data  # noqa: E402
import paper_authors  # noqa: E402
import paper_models  # noqa: E402
import paper_runs  # noqa: E402
import training  # noqa: E402

TINY = paper_runs.Run(data="digits", rounds=2, epochs=1)


def histories_are_equal(first, second):
    def timeless(history):
        return [{**item, "seconds": 0} for item in history.to_dict()["rounds"]]

    return timeless(first) == timeless(second)


@pytest.mark.parametrize("method", ["lottery-ticket", "one-shot", "random"])
def test_the_baselines_prune_their_share_a_round(method, tmp_path):
    history = paper_runs.complete(replace(TINY, method=method), tmp_path)
    assert [found.density for found in history] == pytest.approx([1, 0.8, 0.64], abs=1e-4)


@pytest.mark.parametrize("scope", ["global", "layer", "neuron"])
def test_sap_prunes_what_its_settings_say(scope, tmp_path):
    run = replace(TINY, scope=scope, p=1.0, q=2.0, gamma=0.5, eta_r=0.1)
    history = paper_runs.complete(run, tmp_path)
    assert history[0].hyperparameters == {"p": 1.0, "q": 2.0, "eta_r": 0.1, "gamma": 0.5, "beta": 0.9}
    assert history[0].scope == scope
    assert history[2].density < history[1].density < 1
    assert history[0].retrained.gini is not None
    index = torch_sap.pq_index(torch.tensor([1.0, 2.0]), 0.5, 1.0)
    assert 0 < index < 1
    assert all(found.metrics["pqi_half_1"] != found.pqi for found in history)


def test_random_pruning_does_not_look_at_the_weights_and_repeats_itself():
    masks = []
    for seed, scale in ((0, 1.0), (0, 5.0), (1, 1.0)):
        torch.manual_seed(int(scale))
        model = torch.nn.Linear(40, 40)
        pruner = paper_runs.RandomPruning(model, seed=seed, ratio=0.5)
        torch.rand(3)
        pruner.step()
        masks.append(model.weight_mask.clone())
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_a_plain_pruning_trains_on_from_the_trained_weights(tmp_path):
    run = replace(TINY, method="plain", rounds=1, ratio=0.9)
    model = paper_models.build("mlp", in_chans=1, image_size=24, num_classes=10)
    pruner = paper_runs.make_pruner(run, model)
    torch.nn.init.normal_(model[1].weight)
    trained = model[1].weight.detach().clone()
    pruner.step()
    kept = model[1].weight_mask
    assert 0 < kept.sum() < kept.numel()
    assert torch.equal(model[1].weight[kept], trained[kept])
    assert paper_runs.complete(run, tmp_path)[1].density == pytest.approx(0.1, abs=1e-4)


def test_the_name_of_a_run_holds_all_its_settings():
    changes = {"model": "cnn", "data": "cifar10", "seed": 5, "rounds": 3, "epochs": 4, "scope": "layer", "p": 0.1}
    changes |= {"q": 3.0, "eta_r": 0.3, "gamma": 2.0, "beta": 0.8, "width": 8, "images": 50, "test_images": 60}
    changes |= {"batch_size": 10, "authors": "clip", "method": "random"}
    names = {replace(TINY, **{key: value}).name for key, value in changes.items()} | {TINY.name}
    assert len(names) == len(changes) + 1
    assert replace(TINY, method="random", ratio=0.1).name != replace(TINY, method="random").name


@pytest.mark.slow
def test_a_killed_run_goes_on_bitwise_as_if_it_had_not_been(tmp_path):
    run = replace(TINY, model="cnn", width=4, rounds=3, epochs=2, scope="neuron")
    whole = paper_runs.complete(run, tmp_path / "whole")
    script = f"""
import sys; sys.path.insert(0, {str(BENCHMARKS)!r})
import pathlib, torch, paper_runs
torch.set_num_threads({torch.get_num_threads()})
def slowly(epoch, loss):
    print(epoch, flush=True)
    import time; time.sleep(0.2)
paper_runs.complete(paper_runs.Run(**{run.__dict__!r}), pathlib.Path({str(tmp_path)!r}), on_epoch=slowly)
"""
    folder = tmp_path / run.name
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    for _ in range(2 + 2 + 1):  # in the middle of the third training
        assert process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert (folder / "state.pt").exists()
    assert not (folder / "history.json").exists()
    epochs = []
    resumed = paper_runs.complete(run, tmp_path, on_epoch=lambda epoch, loss: epochs.append(epoch))
    assert len(epochs) == 4  # of eight: two trainings were done before
    assert histories_are_equal(resumed, whole)
    assert {path.name for path in folder.iterdir()} == {"config.json", "history.json"}


@pytest.mark.parametrize(
    "settings", [{"method": "one-shot"}, {"method": "random"}, {"authors": "clip+count"}, {"method": "sap"}]
)
def test_every_method_goes_on_where_it_was_interrupted(settings, tmp_path):
    run = replace(TINY, rounds=3, **settings)
    whole = paper_runs.complete(run, tmp_path / "whole")
    trained = []

    def interrupt(epoch, loss):
        trained.append(epoch)
        if len(trained) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        paper_runs.complete(run, tmp_path, on_epoch=interrupt)
    torch.manual_seed(99)
    left = []
    resumed = paper_runs.complete(run, tmp_path, on_epoch=lambda epoch, loss: left.append(epoch))
    assert len(left) == 2  # of four
    assert histories_are_equal(resumed, whole)


def test_a_run_killed_while_it_saves_keeps_the_state_before(tmp_path):
    path = tmp_path / "state.pt"
    paper_runs.write_whole(path, lambda part: part.write_text("first"))

    def killed(part):
        part.write_text("sec")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        paper_runs.write_whole(path, killed)
    assert path.read_text() == "first"


def test_a_finished_run_is_read_and_not_done_again(tmp_path):
    first = paper_runs.complete(TINY, tmp_path)
    assert json.loads((tmp_path / TINY.name / "config.json").read_text())["data"] == "digits"
    began = time.perf_counter()
    again = paper_runs.complete(TINY, tmp_path, on_epoch=lambda *_: pytest.fail("trained again"))
    assert time.perf_counter() - began < 1
    assert histories_are_equal(first, again)


def test_clipping_as_the_authors_do_changes_nothing_where_nothing_is_clipped(monkeypatch, tmp_path):
    recipe = training.Recipe
    monkeypatch.setattr(paper_runs, "Recipe", lambda *a, **k: recipe(*a, **k, clip=1e9))
    plain = paper_runs.complete(TINY, tmp_path)
    twin = paper_runs.complete(replace(TINY, authors="clip"), tmp_path)
    assert histories_are_equal(plain, twin)


def test_clipping_as_the_authors_do_counts_the_gradient_of_pruned_weights(tmp_path):
    plain = paper_runs.complete(TINY, tmp_path)
    twin = paper_runs.complete(replace(TINY, authors="clip"), tmp_path)
    assert twin[0].metrics == plain[0].metrics
    assert twin[2].metrics != plain[2].metrics


def test_the_authors_count_is_at_most_one_lower():
    import numpy as np

    d = np.arange(2, 5000)
    index = np.linspace(0.01, 0.5, len(d))
    rule = torch_sap.decide.bounds.Hyperparameters()
    lost = rule.count(index, d) - paper_authors.AuthorsCount().count(index, d)
    assert set(lost) == {0, 1}
    assert 0.05 < lost.mean() < 0.5


def test_the_first_images_only():
    train = data.load("digits").train
    assert len(data.first(train, 100)) == 100
    assert torch.equal(data.first(train, 100).images, train.images[:100])
    assert data.first(train, None) is train
    with pytest.raises(ValueError, match=r"images must be at most 1437, .* got images=2000"):
        data.first(train, 2000)


@pytest.mark.slow
def test_parallel_runs_give_what_single_ones_give(tmp_path):
    pytest.importorskip("rich")
    import paper_jobs

    runs = [replace(TINY, seed=seed) for seed in (0, 1)] + [replace(TINY, model="mlq")]
    failures = paper_jobs.complete_all(runs, paper_jobs.Machine(tmp_path / "jobs", jobs=2))
    assert len(failures) == 1
    assert "mlq" in failures[0]
    for run in runs[:2]:
        saved = torch_sap.History.from_json(tmp_path / "jobs" / run.name / "history.json")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        assert histories_are_equal(saved, paper_runs.complete(run, tmp_path / "one"))
        torch.set_num_threads(threads)


def rounds_in(state):
    return len(torch.load(state, weights_only=True)["sap"]["history"]["rounds"])


@pytest.mark.slow
def test_after_the_command_line_is_killed_its_processes_end_and_it_goes_on(tmp_path):
    pytest.importorskip("rich")
    budget = ["--data", "digits", "--rounds", "400", "--epochs", "2", "--seeds", "0", "--threads", "1"]
    command = [sys.executable, str(BENCHMARKS / "paper.py"), "anchors", "run", *budget, "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    states = []
    while not states or not rounds_in(states[0]):
        states = list(tmp_path.glob("*/state.pt"))
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    time.sleep(3)
    (state,) = states
    written = state.stat().st_mtime_ns
    time.sleep(3)
    assert state.stat().st_mtime_ns == written
    assert 0 < rounds_in(state) < 400
    run = paper_runs.Run(data="digits", rounds=400, epochs=2)
    assert state.parent.name == run.name
