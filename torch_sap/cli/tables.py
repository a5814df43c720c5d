"""Print rows as a table or as JSON, and write them as a CSV file."""

from __future__ import annotations

import csv
import json
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from torch_sap.records.codec import to_plain

Row = Mapping[str, Any]


def give(arguments: Namespace, content: Any, rows: Sequence[Row], titles: Mapping[str, str], *, total: bool) -> None:
    """Write the rows to a CSV file if one is asked for, and print the content as JSON, or a table of the rows.

    The table has the columns in ``titles``, in percent below a title that ends in "%", and sets a total apart.
    """
    rows = [to_plain(row) for row in rows]
    if arguments.csv is not None:
        columns = dict.fromkeys(name for row in rows for name in row)
        with open(arguments.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(columns), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    if arguments.json:
        json.dump(to_plain(content), sys.stdout, indent=2, allow_nan=False)
        print()
    else:
        _print_table(rows, titles, total)


def _print_table(rows: Sequence[Row], titles: Mapping[str, str], total: bool) -> None:
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError as error:
        raise ImportError("tables need rich: pip install 'torch_sap[cli]'; or take --json") from error
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column, title in titles.items():
        is_text = all(isinstance(row.get(column), (str, type(None))) for row in rows)
        table.add_column(title, justify="left" if is_text else "right", overflow="fold")
    for number, row in enumerate(rows):
        if total and number == len(rows) - 1:
            table.add_section()
        table.add_row(*(_cell(row.get(column), title) for column, title in titles.items()))
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 10_000  # as wide as the contents
    console.print(table)


def _cell(value: Any, title: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{100 * value:.1f}" if title.endswith("%") else f"{value:.4g}" if abs(value) >= 1 else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def shape_text(shape: Sequence[int]) -> str:
    """Write a shape as in "64x3x7x7"."""
    return "x".join(map(str, shape))
