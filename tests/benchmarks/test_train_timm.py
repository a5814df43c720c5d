"""train_timm.py, a training script in the style of timm's train.py."""

import csv
import math
import re
import shlex
from pathlib import Path

import pytest
import torch

import torch_sap

pytest.importorskip("timm")
pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("safetensors")

import data
import fashion_mnist
import timm
import train_timm
import training
from timm.scheduler import create_scheduler_v2

EPOCHS = 2
SMALL = ["--data", "digits", "--img-size", "16", "--train-num-samples", "256", "--epochs", str(EPOCHS)]


def train(out, *arguments):
    return train_timm.main([*SMALL, "--output", str(out), *arguments])


def rates(out):
    with open(out / "summary.csv", newline="") as file:
        return [float(row["lr"]) for row in csv.DictReader(file)]


def half_cosine(rate):
    return [rate * (1 + math.cos(math.pi * epoch / EPOCHS)) / 2 for epoch in range(EPOCHS)]


def tensors_of(path):
    state = torch.load(path, weights_only=False)
    return {(part, key): value for part in ("state_dict", "state_dict_ema") for key, value in state[part].items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return train(out, "--model-ema"), out


def test_rounds_are_cycles_of_the_learning_rate_and_are_written_as_they_were_evaluated(run):
    history, out = run
    assert rates(out) == pytest.approx(3 * half_cosine(0.1))
    assert 1 == history[0].density > history[1].density > history[2].density
    with open(out / "sap.csv", newline="") as file:
        assert [int(row["remaining"]) for row in csv.DictReader(file)] == [found.remaining for found in history]
    for found in history:
        path = str(out / f"round-{found.number}.safetensors")
        model = timm.create_model("test_resnet", in_chans=1, num_classes=10, checkpoint_path=path)
        weights = [getattr(module, name) for module, name in torch_sap.prunable_parameters(model)]
        assert sum(int(weight.count_nonzero()) for weight in weights) == found.remaining
        assert training.evaluate(model, data.load("digits").resized(16).test) == found.metrics


@pytest.mark.parametrize("last_epoch", [EPOCHS - 1, EPOCHS])
def test_a_resumed_run_ends_like_one_without_interruption(run, tmp_path, monkeypatch, last_epoch):
    history, out = run
    whole = train_timm.Training.epoch

    def interrupted(self, epoch):
        if epoch > last_epoch:
            raise KeyboardInterrupt
        return whole(self, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(train_timm.Training, "epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, "--model-ema")
    again = train(tmp_path, "--model-ema", "--resume", str(tmp_path / "last.pth.tar"))
    expected, found = tensors_of(out / "last.pth.tar"), tensors_of(tmp_path / "last.pth.tar")
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
    assert [found.remaining for found in again] == [found.remaining for found in history]
    assert [found.metrics for found in again[1:]] == [found.metrics for found in history[1:]]
    assert rates(tmp_path) == rates(out)


def test_the_cycles_of_timm_are_what_the_guide_says():
    def rates_of_cycles(**settings):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=4, cycle_limit=3, **settings)
        found = []
        for epoch in range(epochs):
            found.append(round(optimizer.param_groups[0]["lr"], 3))
            scheduler.step(epoch + 1)
        return [found[start : start + 4] for start in range(0, epochs, 4)]

    cycle = [1.0, 0.854, 0.5, 0.146]
    assert rates_of_cycles(cycle_decay=1.0) == [cycle] * 3
    assert rates_of_cycles(cycle_decay=0.5) == [cycle, [0.5, 0.427, 0.25, 0.073], [0.25, 0.213, 0.125, 0.037]]
    warm = rates_of_cycles(cycle_decay=1.0, warmup_epochs=2, warmup_lr=0.0)
    assert warm == [[0.0, 0.5, 0.5, 0.146], cycle, cycle]


@pytest.mark.slow
@pytest.mark.skipif(fashion_mnist.find(Path("data")) is None, reason="needs the package dataset-fashion-mnist")
def test_the_commands_of_the_page_run_on_less_of_fashion_mnist(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "guide-timm.md").read_text()
    commands = re.findall(r"^python benchmarks/train_timm\.py(.*)$", page, re.MULTILINE)
    assert commands
    for number, command in enumerate(commands):
        few = ["--train-num-samples", "6000", "--epochs", "2", "--output", str(tmp_path / str(number))]
        history = train_timm.main([*shlex.split(command, comments=True), *few])
        assert history[-1].density < 1
        assert history[-1].metrics["accuracy"] > 0.4
