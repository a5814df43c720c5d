"""The tables of docs/zoo.md and the summary of a run, from the lines of the CSV files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pages import fill, table

Row = Mapping[str, str]


def summary(rows: Sequence[Row]) -> dict[str, str]:
    """What lines of one CSV file say in total, a number by its name."""
    found = {
        "architectures": f"{len(rows)}",
        "modules of timm": f"{len({row['module'] for row in rows})}",
        "failures": f"{sum(bool(row['failure']) for row in rows)}",
        "made with": " and ".join(sorted({row["made_with"] for row in rows})),
    }
    passed = [row for row in rows if not row["failure"]]
    if passed and "share" in passed[0]:
        shares = [float(row["share"]) for row in passed]
        found["share of all parameters that can be pruned"] = f"{min(shares):.1%} to {max(shares):.1%}"
        found["with standardized convolutions"] = f"{sum(row['standardized'] != '0' for row in passed)}"
        found["with weights read without calling their module"] = f"{sum(row['uncalled'] != '0' for row in passed)}"
    elif passed:
        found["pruned entries received as zeros, least share"] = (
            f"{min(float(r['zeros_received']) for r in passed):.0%}"
        )
        found["largest difference of a loss"] = f"{max(float(row['loss_difference']) for row in passed):.1e}"
        found["largest difference after reloading"] = f"{max(float(row['reload_difference']) for row in passed):.1e}"
    return found


def failure_table(rows: Iterable[Row]) -> str:
    """A line a failure, with its cause."""
    lines = [[row["model"], row["module"], row["failure"]] for row in rows if row["failure"]]
    return table(["architecture", "module of timm", "cause"], lines) if lines else "There are no failures."


def filled(page: str, structure: Sequence[Row], real: Sequence[Row]) -> str:
    """The page of timm with its tables made anew; the lines themselves are in the CSV files."""
    parts = {
        "structure summary": table(["", ""], summary(structure).items()),
        "real summary": table(["", ""], summary(real).items()),
        "failures": failure_table([*structure, *real]),
    }
    return fill(page, parts)


def of_libraries(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """The lines of each library, in the order of the file."""
    libraries = dict.fromkeys(row["library"] for row in rows)
    return [(library, [row for row in rows if row["library"] == library]) for library in libraries]


def coverage_table(rows: Sequence[Row]) -> str:
    """A line per library: how many of its architectures are found whole, and how many are warned of."""
    head = ["library", "listed", "built", "at least 90% found", "less, with a warning", "less, silent", "made with"]
    lines = []
    for library, found in of_libraries(rows):
        built = [row for row in found if not row["failure"]]
        less = [row for row in built if float(row["share"]) < 0.9]
        enough = len(built) - len(less)
        warned = sum(bool(row["warned"]) for row in less)
        lines.append(
            [
                library,
                f"{len(found)}",
                f"{len(built)}",
                f"{enough} ({enough / len(built):.1%})",
                f"{warned}",
                f"{len(less) - warned}",
                found[0]["made_with"],
            ]
        )
    return table(head, lines)


def less_table(rows: Iterable[Row]) -> str:
    """A line per architecture of which less than 90% are found."""
    lines = [
        [row["library"], row["model"], f"{float(row['share']):.1%}", row["warned"], row["left_out"]]
        for row in rows
        if not row["failure"] and float(row["share"]) < 0.9
    ]
    return table(["library", "architecture", "found", "the warning names what is", "left out, largest first"], lines)


def lifecycle_table(rows: Sequence[Row]) -> str:
    """A line per library of the real runs."""
    head = ["library", "real runs", "passed", "pruned entries received as zeros, least share"]
    head += ["largest difference reloaded", "largest difference saved", "no small model"]
    lines = []
    for library, of_library in of_libraries(rows):
        found = [row for row in of_library if not row["not_run"]]
        passed = [row for row in found if not row["failure"]]
        saved = [float(row["saved_difference"]) for row in passed if row["saved_difference"]]
        lines.append(
            [
                library,
                f"{len(found)}",
                f"{len(passed)}",
                f"{min(float(row['zeros_received']) for row in passed):.0%}",
                f"{max(float(row['reload_difference']) for row in passed):.0e}".replace("0e+00", "0"),
                f"{max(saved):.0e}".replace("0e+00", "0") if saved else "",
                f"{len(of_library) - len(found)}",
            ]
        )
    return table(head, lines)


def filled_others(page: str, coverage: Sequence[Row], lifecycle: Sequence[Row]) -> str:
    """A page with the tables of the other libraries made anew."""
    failures = [[row["library"], row["model"], row["failure"]] for row in lifecycle if row["failure"]]
    parts = {
        "coverage": coverage_table(coverage),
        "less": less_table(coverage),
        "lifecycle": lifecycle_table(lifecycle),
        "lifecycle failures": table(["library", "model", "cause"], failures) if failures else "No real run fails.",
    }
    return fill(page, parts)
