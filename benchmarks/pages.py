"""Fill the generated parts of the pages in docs/."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Make a Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def fill(page: str, parts: Mapping[str, str]) -> str:
    """Replace the parts of a page between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``."""
    for name, text in parts.items():
        before, begin, rest = page.partition(f"<!-- begin {name} -->\n")
        _, end, after = rest.partition(f"<!-- end {name} -->")
        if not (begin and end):
            raise ValueError(f"the page must have the comments <!-- begin {name} --> and <!-- end {name} -->")
        page = before + begin + text + "\n" + end + after
    return page
