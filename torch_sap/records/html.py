"""Records as HTML tables, as notebooks show them."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


def table(head: str, titles: Sequence[str], rows: Iterable[Sequence[object]], foot: str = "") -> str:
    """Lay out rows below a line of text and titles, above a last line."""
    lines = [f"<p>{html.escape(head)}</p>", "<table>", _row("th", titles)]
    lines += [_row("td", row) for row in rows]
    return "\n".join([*lines, "</table>", *([f"<p>{html.escape(foot)}</p>"] if foot else [])])


def _row(tag: str, cells: Sequence[object]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"
