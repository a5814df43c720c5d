"""prune_timm.py, end to end on small images."""

import pytest

import torch_sap

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("timm")
pytest.importorskip("tqdm")
pytest.importorskip("safetensors")

import data
import prune_timm
import timm
import training

SMALL = ["--epochs", "1", "--batch-size", "256", "--lr", "0.1", "--image-size", "8", "--iterations", "1"]


def test_a_run_writes_all_files_and_repeats_itself(tmp_path, capsys):
    out = tmp_path / "out"
    histories = prune_timm.main([*SMALL, "--seeds", "2", "--out", str(out)])
    printed = capsys.readouterr()
    assert "898 training and 899 test images of 8 x 8 pixels" in printed.out
    assert printed.err == "", "no bar without a terminal"
    runs = {"sap-0", "sap-1", "lottery-ticket-0", "lottery-ticket-1"}
    assert {path.name for path in out.iterdir()} == {"rounds.png", *runs}
    sap = histories["SAP"]
    lines = printed.out.splitlines()
    last = next(line for line in lines if line.startswith("    1 ")).split()
    ends = [sum(history[-1].density for history in both) / 2 for both in histories.values()]
    rights = [sum(history[-1].metrics["accuracy"] for history in both) / 2 for both in histories.values()]
    assert last == ["1", *(f"{value:.1%}" for pair in zip(ends, rights, strict=True) for value in pair)]
    points = 100 * (sap[1][1].metrics["accuracy"] - sap[1][0].metrics["accuracy"])
    assert f"SAP ends with {ends[0]:.1%} of the weights" in printed.out
    assert f", {points:+.1f})" in printed.out
    assert f"torch-sap report {out / 'sap-0'}" in printed.out

    saved = torch_sap.History.from_json(out / "sap-1" / "history.json")
    assert [found.metrics for found in saved] == [found.metrics for found in sap[1]]
    model = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    torch_sap.load_sparse(model, out / "sap-1" / "model.safetensors")
    found = training.evaluate(model, data.load("digits").resized(8).test)
    assert found["accuracy"] == saved[1].metrics["accuracy"]

    again = prune_timm.main([*SMALL, "--seeds", "1", "--out", str(tmp_path)])
    assert [found.metrics for found in again["SAP"][0]] == [found.metrics for found in sap[0]]


def test_sap_prunes_to_the_effective_number_that_the_picture_shows():
    settings = prune_timm._parser().parse_args(SMALL)
    dataset = data.load("digits").resized(8)
    _, history = prune_timm.prune("SAP", 0, dataset, settings, on_epoch=lambda *_: None)
    count = history[0].total
    assert prune_timm.effective(history[0]) == pytest.approx(prune_timm.remaining(history[1]), abs=1 / count)
    _, other = prune_timm.prune("Lottery Ticket", 0, dataset, settings, on_epoch=lambda *_: None)
    assert prune_timm.effective(other[0]) == prune_timm.effective(history[0]), "the same dense model"
    assert prune_timm.remaining(other[1]) == pytest.approx(1 - settings.ratio, abs=1 / count)


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["--model", "test_resnett"], r"model must be one of timm's, got 'test_resnett'; similar: .*test_resnet"),
        (["--p", "2"], "p must be smaller than q"),
        (["--device", "nonsense"], "device must be one that PyTorch finds here, got 'nonsense'"),
        (["--ratio", "2"], "ratio must lie in"),
        (["--model", "inception_v3", "--image-size", "8"], "try --image-size"),
    ],
)
def test_a_mistake_ends_in_one_line(tmp_path, arguments, rule):
    with pytest.raises(SystemExit, match=rule):
        prune_timm.main([*arguments, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())
