"""The reference has every public name, docstrings have the form that Sphinx reads, the home page the README's code."""

import inspect
import re
from pathlib import Path

import pytest

import torch_sap

ROOT = Path(__file__).parents[1]
REFERENCE = (ROOT / "docs" / "api.md").read_text("utf-8")
SECTION = re.compile(r"^Raises:\n((?:    .*\n|\n)*)", re.MULTILINE)
PUBLIC = [(name, getattr(torch_sap, name)) for name in torch_sap.__all__ if callable(getattr(torch_sap, name))]
DOCUMENTED = [
    (f"{name}.{key}" if key else name, inspect.getdoc(member))
    for name, found in PUBLIC
    for key, member in [("", found), *(inspect.getmembers(found) if inspect.isclass(found) else ())]
    if not key.startswith("_")
    and inspect.getdoc(member)
    and str(getattr(member, "__module__", "")).startswith("torch_sap")
]


@pytest.mark.parametrize("name", [name for name, _ in PUBLIC])
def test_every_public_name_is_in_the_reference(name):
    assert re.search(rf":: (torch_sap\.)?{name}\b", REFERENCE)


@pytest.mark.parametrize(("name", "text"), DOCUMENTED, ids=[name for name, _ in DOCUMENTED])
def test_what_is_raised_begins_with_its_type(name, text):
    for section in SECTION.findall(text + "\n"):
        items = [line for line in section.splitlines() if re.match(r"    \S", line)]
        assert items
        assert [line for line in items if not re.match(r"    \w+(, \w+)*: ", line)] == []


def test_the_home_page_begins_as_the_readme():
    home, readme = ((ROOT / name).read_text("utf-8") for name in ("docs/index.md", "README.md"))
    for part in (r"^\*\*torch_sap .*$", r"^!\[.*\]", r"^```python\n(?:.*\n)*?```$"):
        assert re.search(part, home, re.MULTILINE).group() == re.search(part, readme, re.MULTILINE).group()


def test_every_page_is_in_the_sidebar():
    home = (ROOT / "docs" / "index.md").read_text("utf-8")
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"} <= set(home.split())
