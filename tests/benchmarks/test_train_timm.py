"""The training script that is built as timm's train.py is: benchmarks/train_timm.py."""

import csv
import math
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

import torch_sap

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

timm = pytest.importorskip("timm")
pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("safetensors")

import data  # noqa: E402
import fashion_mnist  # noqa: E402
import train_timm  # noqa: E402
import training  # noqa: E402

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
    return {key: value for part in ("state_dict", "state_dict_ema") for key, value in state.get(part, {}).items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return train(out, "--model-ema"), out


def test_rounds_are_cycles_of_the_learning_rate(run):
    history, out = run
    assert rates(out) == pytest.approx(3 * half_cosine(0.1))
    assert [found.number for found in history] == [0, 1, 2]
    assert 1 == history[0].density > history[1].density > history[2].density
    with open(out / "sap.csv", newline="") as file:
        assert [int(row["remaining"]) for row in csv.DictReader(file)] == [found.remaining for found in history]


def test_the_model_of_each_round_is_written_as_it_was_evaluated(run):
    history, out = run
    for found in history:
        path = str(out / f"round-{found.number}.safetensors")
        model = timm.create_model("test_resnet", in_chans=1, num_classes=10, checkpoint_path=path)
        weights = [getattr(module, name) for module, name in torch_sap.prunable_parameters(model)]
        assert sum(int(weight.count_nonzero()) for weight in weights) == found.remaining
        assert training.evaluate(model, data.load("digits").resized(16).test) == found.metrics


@pytest.mark.parametrize("last_epoch", [EPOCHS - 1, EPOCHS])
def test_a_resumed_run_ends_as_one_without_interruption(run, tmp_path, monkeypatch, last_epoch):
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
    assert_same(tensors_of(tmp_path / "last.pth.tar"), tensors_of(out / "last.pth.tar"))
    assert [found.remaining for found in again] == [found.remaining for found in history]
    assert [found.metrics for found in again[1:]] == [found.metrics for found in history[1:]]
    assert rates(tmp_path) == rates(out)


def test_average_and_momentum_start_anew_with_each_round(tmp_path, monkeypatch):
    whole, alike, momenta = train_timm.Training.epoch, [], []

    def watched(self, epoch):
        pairs = zip(self.model.state_dict().values(), self.ema.module.state_dict().values(), strict=True)
        alike.append(all(torch.equal(value, average) for value, average in pairs))
        momenta.append(bool(self.optimizer.state))
        return whole(self, epoch)

    monkeypatch.setattr(train_timm.Training, "epoch", watched)
    train(tmp_path, "--model-ema", "--lr-cycle-limit", "2")
    assert alike == [True, False, True, False]
    assert momenta == [False, True, False, True]


def test_by_default_timm_would_halve_the_rate_and_only_warm_up_once(tmp_path):
    train(tmp_path, "--warmup-epochs", "1", "--warmup-lr", "0.001", "--lr-cycle-decay", "0.5", "--lr-cycle-limit", "2")
    first, second = half_cosine(0.1), half_cosine(0.05)
    assert rates(tmp_path) == pytest.approx([0.001, first[1], *second])


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [(["--epochs", "0"], "train_timm: "), (["--device", "nonsense"], "device must be one that PyTorch finds here")],
)
def test_a_mistake_ends_in_one_line(tmp_path, arguments, rule):
    with pytest.raises(SystemExit, match=rule):
        train(tmp_path, *arguments)


@pytest.mark.slow
@pytest.mark.skipif(fashion_mnist.find(Path("data")) is None, reason="needs the package dataset-fashion-mnist")
def test_the_commands_of_the_page_run_on_less_of_fashion_mnist(tmp_path):
    page = (ROOT / "docs" / "guide-timm.md").read_text()
    commands = re.findall(r"^python benchmarks/train_timm\.py(.*)$", page, re.MULTILINE)
    assert commands
    for number, command in enumerate(commands):
        few = ["--train-num-samples", "6000", "--epochs", "2", "--output", str(tmp_path / str(number))]
        history = train_timm.main([*shlex.split(command, comments=True), *few])
        assert history[-1].density < 1
        assert history[-1].metrics["accuracy"] > 0.4
