"""Records as HTML tables, as notebooks show them."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch_sap.records.round import Measured


def table(head: str, titles: Sequence[str], rows: Iterable[Sequence[object]], foot: str = "") -> str:
    """Lay out rows below a line of text and titles, above a last line."""
    lines = [f"<p>{html.escape(head)}</p>", "<table>", _row("th", titles)]
    lines += [_row("td", row) for row in rows]
    return "\n".join([*lines, "</table>", *([f"<p>{html.escape(foot)}</p>"] if foot else [])])


def rounds_table(rounds: Sequence[Measured], head: str) -> str:
    """Lay out one row per round: what remains, the PQ Index, and the metrics, with those of the pruned model."""
    prefixes = {"metrics": "", "pruned_metrics": "pruned "}
    found = [
        {prefix + name: v for part, prefix in prefixes.items() for name, v in getattr(round, part, {}).items()}
        for round in rounds
    ]
    names = list(dict.fromkeys(name for values in found for name in values))
    rows = []
    for round, values in zip(rounds, found, strict=True):
        metrics = [f"{values[name]:.4g}" if name in values else "-" for name in names]
        counts = [round.number, f"{round.remaining:,}", f"{100 * round.density:.1f}", f"{round.pqi:.3f}"]
        rows.append([*counts, *metrics, f"{round.pruned_count:,}"])
    return table(head, ["round", "remaining", "remaining %", "PQ Index", *names, "pruned"], rows)


def _row(tag: str, cells: Sequence[object]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"
