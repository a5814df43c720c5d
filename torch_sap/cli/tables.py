"""Print rows as a table that fits the terminal, or as JSON, and write them as a CSV file."""

from __future__ import annotations

import csv
import json
import shutil
import sys
import textwrap
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch_sap.records.codec import to_plain

Row = Mapping[str, Any]

GAP = "  "
"""Between columns."""
SHORTEST = 21
"""Characters that the names of layers and runs keep, before columns are left out."""


@dataclass(frozen=True)
class Table:
    """Rows, and how to print them.

    Attributes:
        rows: Values by column.
        titles: The columns to print, with their titles. Shares below a title with a "%" are printed in percent.
        heading: A line above the table.
        notes: Lines below it.
        total: Whether the last row is a total, and set apart.
        spare: Columns that a narrow terminal leaves out, the first one first.
    """

    rows: Sequence[Row]
    titles: Mapping[str, str]
    heading: str = ""
    notes: Sequence[str] = ()
    total: bool = False
    spare: Sequence[str] = ()


def give(arguments: Namespace, content: Any, table: Table, plot: Callable[[Path], object] | None = None) -> None:
    """Print the content as JSON or as a table, and then write the files that are asked for: CSV, and a figure.

    Each is done even if another one fails; the first error is raised at the end.
    """

    def print_it() -> None:
        if arguments.json:
            json.dump(to_plain(content), sys.stdout, indent=2, allow_nan=False)
            print()
        else:
            print("\n".join(lines_of(table, shutil.get_terminal_size().columns if sys.stdout.isatty() else None)))

    works: list[Callable[[], object]] = [print_it]
    if arguments.csv is not None:
        works.append(lambda: _write_csv(arguments.csv, table.rows))
    if plot is not None and arguments.plot is not None:
        works.append(lambda: plot(arguments.plot))
    errors = []
    for work in works:
        try:
            work()
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    columns = dict.fromkeys(name for row in rows for name in row)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(to_plain, rows))


def lines_of(table: Table, width: int | None) -> Iterator[str]:
    """The lines of a table that is at most ``width`` wide, or as wide as its contents for None.

    A narrow table has its titles on several lines, shorter names in its first column, and fewer columns, in this order.
    Numbers are never cut: if they do not fit without the spare columns, the table is wider.
    """
    if table.heading:
        yield from _filled(table.heading, width)
    spare = [column for column in table.spare if column in table.titles]
    rows = [to_plain(row) for row in table.rows]
    cells = {column: [_cell(row.get(column), title) for row in rows] for column, title in table.titles.items()}
    shown, heads, widths = _layout(table.titles, cells, spare, width)
    is_text = {c: all(isinstance(row.get(c), (str, type(None))) for row in rows) for c in shown}
    first, count = shown[0], len(rows) - table.total
    cells[first] = all_shortened(cells[first][:count], widths[first]) + cells[first][count:]
    widths[first] = max(map(len, (*heads[first], *cells[first])))

    def line(values: Mapping[str, str]) -> str:
        texts = [values[c].ljust(widths[c]) if is_text[c] else values[c].rjust(widths[c]) for c in shown]
        return GAP.join(texts).rstrip()

    for number in range(max(map(len, heads.values()))):
        yield line({c: head[number] for c, head in heads.items()})
    yield "─" * (sum(widths.values()) + len(GAP) * (len(shown) - 1))
    for number in range(len(table.rows)):
        if table.total and number == len(table.rows) - 1:
            yield ""
        yield line({c: cells[c][number] for c in shown})
    left_out = [title for column, title in table.titles.items() if column not in shown]
    notes = [*table.notes, *([f"Too narrow for: {', '.join(left_out)}"] if left_out else [])]
    for note in notes:
        yield ""
        yield from _filled(note, width)


def _layout(
    titles: Mapping[str, str], cells: Mapping[str, Sequence[str]], spare: Sequence[str], width: int | None
) -> tuple[list[str], dict[str, list[str]], dict[str, int]]:
    """The columns to show, the lines of their titles, all equally many, and their widths."""
    for gone in range(len(spare) + 1):
        shown = [column for column in titles if column not in spare[:gone]]
        for wrapped in (False, True):
            heads = {column: titles[column].split() if wrapped else [titles[column]] for column in shown}
            height = max(map(len, heads.values()))
            heads = {column: [""] * (height - len(head)) + head for column, head in heads.items()}
            widths = {column: max(map(len, (*heads[column], *cells[column]))) for column in shown}
            first, *others = shown
            room = (width or 10**9) - sum(len(GAP) + widths[column] for column in others)
            if room >= min(widths[first], SHORTEST) or (wrapped and gone == len(spare)):
                widths[first] = min(widths[first], max(room, 8))
                return shown, heads, widths
    raise AssertionError("the last layout is always taken")


def shortened(text: str, width: int, left: int | None = None) -> str:
    """Leave out the middle of a text that is too long, and keep ``left`` characters before it, by default the half."""
    if len(text) <= width:
        return text
    left = (width - 1) // 2 if left is None else left
    return f"{text[:left]}…{text[len(text) - (width - 1 - left) :]}"


def all_shortened(names: Sequence[str], width: int) -> list[str]:
    """Shorten dotted names so that they can be told apart: by the parts that all share, then in the middle."""
    parts = [name.split(".") for name in names]
    begin = end = False
    while max(map(len, names), default=0) > width and min(map(len, parts)) > 1 and len(set(names)) > 1:
        if len({part[-1] for part in parts}) == 1 and not (end and len({part[0] for part in parts}) == 1):
            parts, end = [part[:-1] for part in parts], True  # most often "weight"
        elif len({part[0] for part in parts}) == 1:
            parts, begin = [part[1:] for part in parts], True
        else:
            break
        names = [f"{'…' * begin}{'.'.join(part)}{'…' * end}" for part in parts]
    nearest = sorted(range(width), key=lambda left: abs(left - (width - 1) // 2))
    return max(([shortened(name, width, left) for name in names] for left in nearest), key=lambda cut: len(set(cut)))


def _filled(text: str, width: int | None) -> list[str]:
    return [text] if width is None else textwrap.wrap(text, width, break_on_hyphens=False)


def _cell(value: Any, title: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{100 * value:.1f}" if "%" in title else f"{value:.4g}" if abs(value) >= 1 else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def shape_text(shape: Sequence[int]) -> str:
    """Write a shape as in "64x3x7x7"."""
    return "x".join(map(str, shape))
