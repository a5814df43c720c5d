"""benchmarks/zoo: the committed results are complete, free of failures, and shown on the page; broken models fail."""

import pytest
import torch.nn.functional as F
from torch import nn

import torch_sap

pytest.importorskip("timm")
pytest.importorskip("rich")

import timm
from zoo import main as zoo
from zoo import page, real, structure

STRUCTURE, REAL = (zoo.read(zoo.RESULTS / f"zoo_{part}.csv") for part in ("structure", "real"))
committed_with = pytest.mark.skipif(
    {row["made_with"].partition(",")[0] for row in [*STRUCTURE, *REAL]} != {f"timm {timm.__version__}"},
    reason="needs the package timm in the version that the results were made with",
)


@committed_with
def test_every_architecture_has_a_structure_and_every_module_a_real_test():
    assert sorted(row["model"] for row in STRUCTURE) == sorted(timm.list_models())
    assert {row["module"] for row in REAL} == set(timm.list_modules())
    assert sorted(row["model"] for row in REAL) == sorted([*structure.choose(STRUCTURE), zoo.MULTIHEAD])
    assert {*zoo.PART} <= {row["model"] for row in REAL}


def test_the_committed_results_have_no_failure_and_are_on_the_page():
    assert not [row["model"] for row in [*STRUCTURE, *REAL] if row["failure"]]
    assert all(0 < int(row["weights"]) <= int(row["parameters"]) for row in STRUCTURE)
    for row in REAL:
        assert float(row["zeros_received"]) == 1
        assert max(float(row["loss_difference"]), float(row["reload_difference"])) < real.ROUNDING
        assert all(0.05 < float(row[f"remaining_{scope}"]) < 0.95 for scope in real.SCOPES)
    text = zoo.PAGE.read_text("utf-8")
    assert page.filled(text, STRUCTURE, REAL) == text


@committed_with
@pytest.mark.parametrize("name", ["test_nfnet", "xcit_nano_12_p8_224"])
def test_a_structure_is_counted_again(name):
    (row,) = (row for row in STRUCTURE if row["model"] == name)
    found = structure.structure(name)
    report = torch_sap.layer_unstructured(timm.create_model(name))
    assert (found.tensors, found.weights) == (len(report.tensors), report.total)
    assert {**{key: str(value) for key, value in vars(found).items()}, "made_with": row["made_with"]} == row


@pytest.mark.parametrize("name", ["test_nfnet", zoo.MULTIHEAD])
def test_a_real_test_passes(name):
    found = real.real(name)
    assert (found.failure, found.image, found.zeros_received) == ("", 32, 1)
    assert found.unused == (1 if name == zoo.MULTIHEAD else 0)


def test_a_real_test_finds_what_is_broken(monkeypatch):
    linear, remove = F.linear, torch_sap.remove
    with monkeypatch.context() as patch:
        patch.setattr(F, "linear", lambda x, weight, bias=None: linear(x, weight + 1e-3, bias))
        assert "pruned entries are not zero where the computation receives them" in real.real("test_resnet").failure
    for scale, shift, failure in ((2, 0, "the reloaded model computes something else"), (1, 1e-3, "that are not zero")):

        def broken(model, scale=scale, shift=shift):
            model = remove(model)
            for module, name in torch_sap.prunable_parameters(model):
                getattr(module, name).data.mul_(scale).add_(shift)
            return model

        monkeypatch.setattr(torch_sap, "remove", broken)
        assert failure in real.real("test_resnet").failure


def test_failures_are_counted_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(structure, "on_meta", lambda name: nn.BatchNorm1d(3))
    failed = structure.structure("resnet18")
    assert failed.failure == "nothing to prune"
    zoo.append(tmp_path / "zoo_structure.csv", vars(failed))
    assert zoo.main(["structure", "--models", "resnet18", "--out", str(tmp_path)]) == 1
    row = {"model": "a", "module": "b", "failure": "TypeError: no", "made_with": "timm 0"}
    assert page.summary([row])["failures"] == "1"
    assert "| a | b | TypeError: no |" in page.failure_table([row])


@pytest.mark.slow
def test_the_part(tmp_path):
    assert zoo.main(["real", "--part", "--jobs", "2", "--out", str(tmp_path)]) == 0
    assert {row["model"] for row in zoo.read(tmp_path / "zoo_real.csv")} == set(zoo.PART)
