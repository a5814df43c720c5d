"""The page of versions shows the table that .ci/versions.py wrote, and setup.cfg allows what is tested."""

import configparser
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / ".ci"))

import versions  # noqa: E402

REPORT = """<testsuites><testsuite errors="1" failures="2" skipped="2" tests="9">
<testcase><skipped message="needs a GPU">tests/a.py:1: needs a GPU</skipped></testcase>
<testcase><skipped message="could not import 'onnxruntime': No module named 'onnxruntime'"></skipped></testcase>
<testcase><skipped message="needs a GPU"></skipped></testcase>
</testsuite></testsuites>"""


def test_the_page_shows_the_table():
    rows = versions.read(versions.TABLE)
    page = versions.PAGE.read_text(encoding="utf-8")
    assert versions.filled(page, rows) == page
    assert versions.merged(rows) == rows


def test_every_version_of_the_matrix_is_on_the_page():
    page = versions.PAGE.read_text(encoding="utf-8")
    for version in versions.MATRIX:
        assert f"| {version.python} | {version.torch}" in page


def test_setup_allows_what_is_tested():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    oldest = min((version.torch for version in versions.MATRIX), key=lambda text: [int(n) for n in text.split(".")])
    assert f"torch>={oldest.rpartition('.')[0]}" in setup["options"]["install_requires"].split()
    kinds = setup["metadata"]["classifiers"].splitlines()
    found = {kind.rpartition(" ")[2] for kind in kinds if "Python :: 3." in kind}
    assert found == {version.python for version in versions.MATRIX}


def test_counts_and_needs(tmp_path):
    (tmp_path / "a.xml").write_text(REPORT)
    found = versions.counts(tmp_path / "a.xml")
    assert found == {"passed": 4, "failed": 3, "skipped": 2, "needs": "a GPU; onnxruntime"}


def test_a_new_run_takes_the_place_of_the_old_one():
    rows = [
        {"torch": torch, "part": "fast", "passed": passed}
        for torch, passed in (("2.9.1", 1), ("2.5.1", 2), ("2.9.1", 3))
    ]
    assert [(row["torch"], row["passed"]) for row in versions.merged(rows)] == [("2.5.1", "2"), ("2.9.1", "3")]


def test_an_environment_that_is_ready_is_used(tmp_path, monkeypatch, capsys):
    version = versions.Version("9.9", "1.0", None)
    assert versions.environment(version, tmp_path) is None
    assert "no Python 9.9" in capsys.readouterr().out
    (tmp_path / "9.9-1.0").mkdir()
    (tmp_path / "9.9-1.0" / "ready").touch()
    assert versions.environment(version, tmp_path) == tmp_path / "9.9-1.0" / "bin" / "python"


@pytest.mark.parametrize("vision", [None, "0.1"])
def test_timm_comes_with_torchvision_only(vision):
    assert ("timm" in versions.Version("3.10", "2.5.1", vision).packages()) is (vision is not None)
