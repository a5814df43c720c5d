"""The main job: benchmarks/prune_timm.py."""

import csv
import sys
from pathlib import Path

import pytest

import torch_sap

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

pytest.importorskip("sklearn")
timm = pytest.importorskip("timm")
pytest.importorskip("rich")
pytest.importorskip("safetensors")

import data  # noqa: E402
import prune_timm  # noqa: E402
import training  # noqa: E402


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    arguments = ["--iterations", "1", "--epochs", "1", "--batch-size", "256", "--image-size", "8", "--out", str(out)]
    return prune_timm.main(arguments), out


def test_all_files_are_written(small_run):
    history, out = small_run
    assert {"history.csv", "history.json", "history.png", "last.safetensors"} <= {path.name for path in out.iterdir()}
    assert [found.number for found in torch_sap.History.from_json(out / "history.json")] == [0, 1]
    with open(out / "history.csv", newline="") as file:
        assert [float(row["accuracy"]) for row in csv.DictReader(file)] == [
            found.metrics["accuracy"] for found in history
        ]


def test_the_weights_load_into_a_plain_model_and_are_pruned(small_run):
    history, out = small_run
    model = timm.create_model("test_resnet", in_chans=1, num_classes=10, checkpoint_path=str(out / "last.safetensors"))
    weights = [getattr(module, name) for module, name in torch_sap.prunable_parameters(model)]
    assert sum(int(weight.count_nonzero()) for weight in weights) == history[-1].remaining < history[-1].total
    found = training.evaluate(model, data.load("digits").resized(8).test)
    assert found["accuracy"] == history[-1].metrics["accuracy"]


def test_a_seed_repeats_a_run(small_run, tmp_path):
    arguments = [
        "--iterations",
        "1",
        "--epochs",
        "1",
        "--batch-size",
        "256",
        "--image-size",
        "8",
        "--out",
        str(tmp_path),
    ]
    again = prune_timm.main(arguments)
    assert [found.metrics for found in again] == [found.metrics for found in small_run[0]]


def test_the_table_has_a_line_a_round(tmp_path, capsys):
    prune_timm.main(
        ["--iterations", "0", "--epochs", "1", "--batch-size", "256", "--image-size", "8", "--out", str(tmp_path)]
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split("  ") == [
        "round", "remaining %", "PQ Index", "trained, accuracy %", "pruned, before rewinding %", "seconds"
    ]  # fmt: skip
    assert lines[2].split()[:2] == ["0", "100.00"]
    assert "nothing was pruned" in lines[3]


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["--model", "test_resnett"], r"model must be one of timm's, got 'test_resnett'; similar: .*test_resnet"),
        (["--p", "2"], "p must be smaller than q"),
        (["--data", "imagefolder"], "needs a data_dir"),
        (["--device", "nonsense"], "device must be one that PyTorch finds here, got 'nonsense'"),
        (["--exclude", "nothing"], "nothing"),
        (["--model", "inception_v3", "--image-size", "8"], "try --image-size"),
    ],
)
def test_a_mistake_ends_in_one_line(tmp_path, arguments, rule):
    with pytest.raises(SystemExit, match=rule):
        prune_timm.main([*arguments, "--out", str(tmp_path)])


def test_a_model_with_a_fixed_size_gets_images_of_that_size():
    model, dataset = prune_timm.build("test_vit", data.load("digits"))
    assert dataset.image_size == 160
    model, dataset = prune_timm.build("test_vit", data.load("digits"), image_size=32)
    assert model(next(dataset.test.batches(2))[0]).shape == (2, 10)
