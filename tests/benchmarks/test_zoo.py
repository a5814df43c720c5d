"""benchmarks/zoo.py, and that its committed results are complete and are those of the page."""

import csv
import functools
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_sap

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

timm = pytest.importorskip("timm")
pytest.importorskip("rich")

import zoo  # noqa: E402
import zoo_page  # noqa: E402
import zoo_real  # noqa: E402
import zoo_structure  # noqa: E402

STRUCTURE, REAL = (zoo.read(zoo.RESULTS / f"zoo_{part}.csv") for part in ("structure", "real"))
committed_with = pytest.mark.skipif(
    {row["made_with"].partition(",")[0] for row in [*STRUCTURE, *REAL]} != {f"timm {timm.__version__}"},
    reason="needs the package timm in the version that the results were made with",
)


@committed_with
def test_every_architecture_has_a_structure_and_every_module_a_real_test():
    assert sorted(row["model"] for row in STRUCTURE) == sorted(timm.list_models())
    assert {row["module"] for row in REAL} == set(timm.list_modules())
    chosen = zoo_structure.choose(STRUCTURE)
    assert sorted(row["model"] for row in REAL) == sorted([*chosen, zoo.MULTIHEAD])
    assert {*zoo.PART} <= {row["model"] for row in REAL}


def test_the_committed_results_have_no_failure():
    assert not [row["model"] for row in [*STRUCTURE, *REAL] if row["failure"]]
    for row in STRUCTURE:
        assert 0 < int(row["weights"]) <= int(row["parameters"])
    for row in REAL:
        assert float(row["zeros_received"]) == 1
        assert max(float(row["loss_difference"]), float(row["reload_difference"])) < zoo_real.ROUNDING
        assert all(0.05 < float(row[f"remaining_{scope}"]) < 0.95 for scope in zoo_real.SCOPES)


def test_the_page_is_made_of_the_committed_results():
    page = zoo.PAGE.read_text("utf-8")
    assert zoo_page.filled(page, STRUCTURE, REAL) == page


@committed_with
@pytest.mark.parametrize("name", ["test_nfnet", "swinv2_tiny_window16_256", "xcit_nano_12_p8_224"])
def test_a_structure_is_counted_anew(name):
    (row,) = (row for row in STRUCTURE if row["model"] == name)
    model = timm.create_model(name)
    found = zoo_structure.structure(name)
    report = torch_sap.layer_unstructured(model)
    assert (found.tensors, found.weights) == (len(report.tensors), report.total)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert {key: str(value) for key, value in vars(found).items() if key != "made_with"} == {
        key: value for key, value in row.items() if key != "made_with"
    }


def test_a_structure_that_cannot_be_built_is_a_failure(monkeypatch):
    monkeypatch.setattr(zoo_structure, "on_meta", functools.partial(raising, "no such thing"))
    assert zoo_structure.structure("resnet18").failure == "ValueError: no such thing"
    monkeypatch.setattr(zoo_structure, "on_meta", lambda name: nn.BatchNorm1d(3))
    assert zoo_structure.structure("resnet18").failure == "nothing to prune"


def raising(text, *args, **kwargs):
    raise ValueError(text)


def test_the_smallest_of_each_kind_is_chosen():
    def row(model, module, parameters, standardised=0, uncalled=0, failure=""):
        keys = ("model", "module", "parameters", "standardised", "uncalled", "failure")
        return dict(zip(keys, map(str, (model, module, parameters, standardised, uncalled, failure)), strict=True))

    rows = [
        row("large", "a", 200),
        row("small", "a", 30),
        row("broken", "a", 1, failure="it is"),
        row("std", "a", 100, 3),
        row("std large", "a", 101, 2),
        row("reads", "a", 150, uncalled=2),
        row("uncalled", "b", 9, uncalled=4),
    ]
    assert zoo_structure.choose(rows) == ["uncalled", "small", "std", "reads"]


@pytest.mark.parametrize("name", ["test_resnet", "test_nfnet", zoo.MULTIHEAD])
def test_a_real_test_passes(name):
    found = zoo_real.real(name)
    assert found.failure == ""
    assert found.image == 32
    assert found.zeros_received == 1
    assert found.unused == (1 if name == zoo.MULTIHEAD else 0)


BREAKS = {
    "losses are not those of the model masked by hand": lambda patch: patch.setattr(
        torch_sap.masks.gradients.GradientMask, "_mask_accumulated", halve
    ),
    "pruned entries are not zero where the computation receives them": lambda patch: patch.setattr(
        F, "linear", functools.partial(shifted, F.linear)
    ),
    "has pruned entries that are not zero": lambda patch: patch.setattr(
        torch_sap, "remove", functools.partial(written, torch_sap.remove)
    ),
    "the reloaded model computes something else": lambda patch: patch.setattr(
        torch_sap, "remove", functools.partial(doubled, torch_sap.remove)
    ),
    "RuntimeError: Error(s) in loading state_dict": lambda patch: patch.setattr(
        torch_sap, "remove", functools.partial(enlarged, torch_sap.remove)
    ),
}


def halve(self, weight):
    weight.grad.mul_(0.5)


def enlarged(remove, model):
    remove(model).register_buffer("more", torch.ones(1))
    return model


def shifted(real, x, weight, bias=None):
    return real(x, weight + 1e-3, bias)


def written(remove, model):
    model = remove(model)
    with torch.no_grad():
        for module, name in torch_sap.prunable_parameters(model):
            getattr(module, name).add_(1e-3)
    return model


def doubled(remove, model):
    model = remove(model)
    with torch.no_grad():
        for module, name in torch_sap.prunable_parameters(model):
            getattr(module, name).mul_(2)
    return model


@pytest.mark.parametrize("failure", BREAKS)
def test_a_real_test_finds_what_is_broken(failure, monkeypatch):
    BREAKS[failure](monkeypatch)
    assert failure in zoo_real.real("test_resnet").failure


@pytest.mark.slow
def test_lines_are_added_and_known_ones_left_out(tmp_path, capsys):
    arguments = ["structure", "--jobs", "1", "--out", str(tmp_path), "--models"]
    assert zoo.main([*arguments, "test_vit", "test_resnet"]) == 0
    path = tmp_path / "zoo_structure.csv"
    first = path.read_text()
    assert zoo.main([*arguments, "test_vit", "test_resnet", "test_convnext"]) == 0
    assert path.read_text().startswith(first)
    with open(path, newline="") as file:
        assert [row["model"] for row in csv.DictReader(file)] == ["test_vit", "test_resnet", "test_convnext"]
    assert "failures" in capsys.readouterr().out


@pytest.mark.slow
def test_nothing_is_begun_after_the_time(tmp_path):
    names = ["test_vit", "test_resnet", "test_convnext"]
    zoo.main(["structure", "--jobs", "2", "--minutes", "0", "--out", str(tmp_path), "--models", *names])
    found = {row["model"] for row in zoo.read(tmp_path / "zoo_structure.csv")}
    assert found == set(names[:2])


def test_failures_are_counted_and_named(tmp_path):
    failed = zoo_structure.Structure("test_vit", "vision_transformer", failure="TypeError: no")
    zoo.append(tmp_path / "zoo_structure.csv", vars(failed))
    assert zoo.main(["structure", "--models", "test_vit", "--out", str(tmp_path)]) == 1
    row = {"model": "a", "module": "b", "failure": "TypeError: no", "made_with": "timm 0"}
    assert zoo_page.summary([row])["failures"] == "1"
    assert "| a | b | TypeError: no |" in zoo_page.failure_table([row])
    with pytest.raises(ValueError, match="<!-- begin structure summary -->"):
        zoo_page.filled("", [], [])


@pytest.mark.slow
def test_the_part(tmp_path):
    assert zoo.main(["real", "--part", "--jobs", "2", "--out", str(tmp_path)]) == 0
    assert {row["model"] for row in zoo.read(tmp_path / "zoo_real.csv")} == set(zoo.PART)
