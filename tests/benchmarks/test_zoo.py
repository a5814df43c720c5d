"""benchmarks/zoo: the committed results are complete, free of failures, and shown on the page; broken models fail."""

import pytest
import torch
import torch.nn.functional as F
from helpers import import_transformers
from torch import nn

import torch_sap

pytest.importorskip("timm")
pytest.importorskip("rich")

import timm
from zoo import coverage, libraries, lifecycle, page, real, structure
from zoo import main as zoo

STRUCTURE, REAL = (zoo.read(zoo.RESULTS / f"zoo_{part}.csv") for part in ("structure", "real"))
COVERAGE, LIFECYCLE = (zoo.read(zoo.RESULTS / f"zoo_{part}.csv") for part in ("coverage", "lifecycle"))
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


# ---- other libraries


def test_of_transformers_nearly_everything_is_found_and_the_rest_is_warned_of():
    built = [row for row in COVERAGE if not row["failure"]]
    transformers = [row for row in built if row["library"] == "transformers"]
    found = [row for row in transformers if float(row["share"]) >= coverage.ENOUGH]
    assert len(transformers) > 600
    assert len(found) / len(transformers) > 0.98
    assert not [row["model"] for row in built if float(row["share"]) < coverage.ENOUGH and not row["warned"]]
    assert {row["library"] for row in COVERAGE} == set(libraries.LIBRARIES)
    assert all(int(row["found"]) <= int(row["entries"]) for row in COVERAGE)


def test_no_real_run_of_other_libraries_fails():
    ran = [row for row in LIFECYCLE if not row["not_run"]]
    assert sum(row["library"] == "transformers" for row in ran) >= 60
    assert {row["library"] for row in ran} == set(libraries.LIBRARIES)
    for row in ran:
        assert (row["failure"], float(row["zeros_received"])) == ("", 1), row["model"]
        assert max(float(row["reload_difference"]), float(row["saved_difference"] or 0)) < lifecycle.ROUNDING
        assert bool(row["saved_difference"]) == (row["library"] in ("transformers", "diffusers"))
    text = zoo.OTHERS.read_text("utf-8")
    assert page.filled_others(text, COVERAGE, LIFECYCLE) == text


def counted_again(row):
    found = coverage.coverage(f"{row['library']}/{row['model']}")
    same = {key: str(value) for key, value in vars(found).items()}
    return same == {**row, "made_with": same["made_with"]}


@pytest.mark.parametrize("path", ["torch/MultiheadAttention", "torch/TransformerDecoder"])
def test_a_module_of_torch_is_counted_again(path):
    (row,) = (row for row in COVERAGE if f"{row['library']}/{row['model']}" == path)
    assert counted_again(row)


@pytest.mark.parametrize("name", ["GPT2Config", "IBertConfig", "MixtralConfig", "XLNetConfig"])
def test_an_architecture_of_transformers_is_counted_again(name):
    import_transformers()
    (row,) = (row for row in COVERAGE if row["model"] == name)
    if row["made_with"].partition(",")[0] != libraries.LIBRARIES["transformers"].made_with().partition(",")[0]:
        pytest.skip("needs the package transformers in the version that the results were made with")
    assert counted_again(row)
    assert ("left out" in row["warned"]) == (name == "XLNetConfig")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["GPT2Config", "GptOssConfig", "T5Config"])
def test_a_real_run_of_transformers_passes(name):
    import_transformers()
    found = lifecycle.lifecycle(f"transformers/{name}")
    assert (found.failure, found.not_run, found.zeros_received, found.saved_difference) == ("", "", 1, 0)


class Unnamed(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel, self.table, self.head = nn.Parameter(torch.randn(8, 8)), nn.Embedding(50, 8), nn.Linear(8, 2)


def test_what_is_left_out_is_counted_and_named(monkeypatch):
    library = libraries.Library("torch", lambda: ["Unnamed"], lambda name: Unnamed())
    monkeypatch.setitem(libraries.LIBRARIES, "somebody", library)
    found = coverage.coverage("somebody/Unnamed")
    assert (found.entries, found.found, found.share, found.warned) == (80, 16, 0.2, "left out")
    assert found.left_out.startswith("table.weight (a lookup table), kernel (no ")
    assert page.counted(found.left_out) == "kernel (name)"
    assert page.counted("a (a vector), b (a part of a computed weight), c (a part of a computed weight)") == (
        "b, c (computed)"
    )
    assert coverage.coverage("torch/Nonsense").failure.startswith("AttributeError")


def test_a_real_run_of_another_library_finds_what_is_broken(monkeypatch):
    linear, remove = F.linear, torch_sap.remove
    assert lifecycle.lifecycle("torch/Linear").failure == ""
    assert lifecycle.lifecycle("torch/Embedding").not_run
    with monkeypatch.context() as patch:
        patch.setattr(F, "linear", lambda x, weight, bias=None: linear(x, weight + 1e-3, bias))
        assert "pruned entries are not zero where they are received" in lifecycle.lifecycle("torch/Linear").failure

    def doubled(model):
        for parameter in remove(model).parameters():
            parameter.data.mul_(2)
        return model

    monkeypatch.setattr(torch_sap, "remove", doubled)
    assert lifecycle.lifecycle("torch/Linear").failure == "the reloaded model computes something else"


@pytest.mark.slow
def test_the_command_line_of_other_libraries(tmp_path):
    assert zoo.main(["lifecycle", "--models", "torch/Linear", "--jobs", "1", "--out", str(tmp_path)]) == 0
    assert zoo.names_of("lifecycle", ["open_clip"])[0] == "open_clip/CLIP (ViT)"
    (row,) = zoo.read(tmp_path / "zoo_lifecycle.csv")
    assert (row["library"], row["model"], row["failure"]) == ("torch", "Linear", "")
    listed = {**row, "share": "1.0"}
    assert f"| {row['made_with']} | 1 | 1 | 1 (100.0%) | 1 | 0 |" in page.library_table([listed], [row])
    assert page.worst([row]).startswith("Pruned entries received as zeros, least share: 100%. ")
