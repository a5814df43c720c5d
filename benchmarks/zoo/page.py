"""The tables of docs/zoo.md and the summary of a run, from the lines of the CSV files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from pages import fill, table

Row = Mapping[str, str]

UNCOUNTED = {"a lookup table", "a vector"}
WORDS = {"a part of a computed weight": "computed", 'no "weight" in its name': "name"}
"""The page's words for the usual reasons why a matrix is left out."""


def summary(rows: Sequence[Row]) -> dict[str, str]:
    """What lines of one CSV file say in total, a number by its name."""
    found = {
        "architectures": f"{len(rows)}",
        "failures": f"{sum(bool(row['failure']) for row in rows)}",
        "made with": " and ".join(sorted({row["made_with"] for row in rows})),
    }
    passed = [row for row in rows if not row["failure"]]
    if passed and "share" in passed[0]:
        shares = [float(row["share"]) for row in passed]
        found["prunable share of all parameters"] = f"{min(shares):.1%} to {max(shares):.1%}"
        found["with standardized convolutions"] = f"{sum(row['standardized'] != '0' for row in passed)}"
        found["with weights read without calling their module"] = f"{sum(row['uncalled'] != '0' for row in passed)}"
    elif passed:
        found["modules of timm"] = f"{len({row['module'] for row in rows})}"
        found["pruned entries received as zeros, least share"] = (
            f"{min(float(r['zeros_received']) for r in passed):.0%}"
        )
        found["largest difference of a loss"] = f"{max(float(row['loss_difference']) for row in passed):.1e}"
        found["largest difference after reloading"] = f"{max(float(row['reload_difference']) for row in passed):.1e}"
    return found


def bullets(found: Mapping[str, str]) -> str:
    """A summary as a list."""
    return "\n".join(f"- {name}: {value}" for name, value in found.items())


def failure_table(rows: Iterable[Row]) -> str:
    """A line a failure, with its cause."""
    lines = [[row["model"], row["module"], row["failure"]] for row in rows if row["failure"]]
    return table(["architecture", "module of timm", "cause"], lines) if lines else "There are no failures."


def filled(page: str, structure: Sequence[Row], real: Sequence[Row]) -> str:
    """The page of timm with its tables made anew; the lines themselves are in the CSV files."""
    parts = {
        "structure summary": bullets(summary(structure)),
        "real summary": bullets(summary(real)),
        "failures": failure_table([*structure, *real]),
    }
    return fill(page, parts)


def of_libraries(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """The lines of each library, in the order of the file."""
    libraries = dict.fromkeys(row["library"] for row in rows)
    return [(library, [row for row in rows if row["library"] == library]) for library in libraries]


def library_table(coverage: Sequence[Row], lifecycle: Sequence[Row]) -> str:
    """A line per library: of how many architectures nearly everything is found, and how many small models are run."""
    head = ["version", "listed", "built", "at least 90% found", "real runs", "no small model"]
    small = dict(of_libraries(lifecycle))
    lines = []
    for library, found in of_libraries(coverage):
        built = [row for row in found if not row["failure"]]
        enough = sum(float(row["share"]) >= 0.9 for row in built)
        ran = sum(not row["not_run"] for row in small.get(library, []))
        line = [found[0]["made_with"].partition(",")[0], f"{len(found)}", f"{len(built)}"]
        line += [f"{enough} ({enough / len(built):.1%})", f"{ran}", f"{len(small.get(library, [])) - ran}"]
        lines.append(line)
    return table(head, lines)


def less_table(rows: Iterable[Row]) -> str:
    """A line per architecture of which less than 90% are found."""
    lines = [
        [f"{row['library']}/{row['model']}", f"{float(row['share']):.1%}", counted(row["left_out"])]
        for row in rows
        if not row["failure"] and float(row["share"]) < 0.9
    ]
    return table(["architecture", "found", "largest left out (reason)"], lines)


def counted(left_out: str) -> str:
    """The matrices that are left out, the largest first, with one reason for those that follow each other."""
    pairs = re.findall(r"(\S+) \((.*?)\)(?:, |$)", left_out)
    shown = [(name, WORDS.get(reason, reason)) for name, reason in pairs if reason not in UNCOUNTED]
    parts = [(", ".join(name for name, _ in of), reason) for reason, of in groupby(shown, lambda pair: pair[1])]
    return ", ".join(f"{names} ({reason})" for names, reason in parts)


def worst(lifecycle: Sequence[Row]) -> str:
    """The worst numbers of the real runs without a failure."""
    passed = [row for row in lifecycle if not row["not_run"] and not row["failure"]]
    received = min((float(row["zeros_received"]) for row in passed), default=0)
    reloaded, saved = (largest(row[name] for row in passed) for name in ("reload_difference", "saved_difference"))
    return (
        f"Pruned entries received as zeros, least share: {received:.0%}. "
        f"Largest difference of an output after reloading: {reloaded}; after `save_pretrained`: {saved}."
    )


def largest(differences: Iterable[str]) -> str:
    """The largest of some differences, of which those not measured are empty."""
    return f"{max((float(one) for one in differences if one), default=0):.0e}".replace("0e+00", "0")


def filled_others(page: str, coverage: Sequence[Row], lifecycle: Sequence[Row]) -> str:
    """A page with the tables of the other libraries made anew."""
    failures = [[row["library"], row["model"], row["failure"]] for row in lifecycle if row["failure"]]
    parts = {
        "libraries": library_table(coverage, lifecycle),
        "less": less_table(coverage),
        "worst": worst(lifecycle),
        "lifecycle failures": table(["library", "model", "cause"], failures) if failures else "No real run fails.",
    }
    return fill(page, parts)
