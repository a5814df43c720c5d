"""prune_timm.py, end to end on small images."""

import csv

import pytest

import torch_sap

pytest.importorskip("sklearn")
pytest.importorskip("timm")
pytest.importorskip("rich")
pytest.importorskip("safetensors")

import data
import prune_timm
import timm
import training

SMALL = ["--epochs", "1", "--batch-size", "256", "--image-size", "8", "--iterations"]


def test_a_run_writes_all_files_and_repeats_itself(tmp_path, capsys):
    out = tmp_path / "out"
    history = prune_timm.main([*SMALL, "1", "--out", str(out)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split("  ") == [
        "round", "remaining %", "PQ Index", "trained, accuracy %", "pruned, before rewinding %", "seconds"
    ]  # fmt: skip
    assert lines[2].split()[:2] == ["0", "100.00"]
    assert {"history.csv", "history.json", "history.png", "last.safetensors"} <= {path.name for path in out.iterdir()}
    assert [found.number for found in torch_sap.History.from_json(out / "history.json")] == [0, 1]
    with open(out / "history.csv", newline="") as file:
        rows = [float(row["accuracy"]) for row in csv.DictReader(file)]
    assert rows == [found.metrics["accuracy"] for found in history]
    model = timm.create_model("test_resnet", in_chans=1, num_classes=10, checkpoint_path=str(out / "last.safetensors"))
    weights = [getattr(module, name) for module, name in torch_sap.prunable_parameters(model)]
    assert sum(int(weight.count_nonzero()) for weight in weights) == history[-1].remaining < history[-1].total
    found = training.evaluate(model, data.load("digits").resized(8).test)
    assert found["accuracy"] == history[-1].metrics["accuracy"]
    again = prune_timm.main([*SMALL, "1", "--out", str(tmp_path)])
    assert [found.metrics for found in again] == [found.metrics for found in history]


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["--model", "test_resnett"], r"model must be one of timm's, got 'test_resnett'; similar: .*test_resnet"),
        (["--p", "2"], "p must be smaller than q"),
        (["--device", "nonsense"], "device must be one that PyTorch finds here, got 'nonsense'"),
        (["--exclude", "nothing"], "nothing"),
        (["--model", "inception_v3", "--image-size", "8"], "try --image-size"),
    ],
)
def test_a_mistake_ends_in_one_line(tmp_path, arguments, rule):
    with pytest.raises(SystemExit, match=rule):
        prune_timm.main([*arguments, "--out", str(tmp_path)])
