"""The page of versions shows the table of .ci/versions.py, and setup.cfg allows what is tested."""

import configparser
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / ".ci"))

import versions  # noqa: E402


def test_the_page_shows_the_table_and_every_version():
    rows = versions.read(versions.TABLE)
    page = versions.PAGE.read_text(encoding="utf-8")
    assert versions.filled(page, rows) == page
    assert versions.merged(rows) == rows
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
