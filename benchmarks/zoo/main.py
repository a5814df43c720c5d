"""Prune every architecture of timm and of other libraries: what there is to prune in each, and real tests.

Of timm:

    python benchmarks/zoo structure --jobs 2                 # all architectures, on the meta device
    python benchmarks/zoo real --jobs 2                      # at least one of each module, trained and checked
    python benchmarks/zoo real --models test_resnet --out /tmp/zoo
    python benchmarks/zoo real --part --out /tmp/zoo         # a few families, under 3 minutes

Of transformers, torchvision, diffusers, torch_geometric, segmentation-models-pytorch, open_clip and torch.nn:

    python benchmarks/zoo coverage --jobs 2                  # all that they list, on the meta device
    python benchmarks/zoo lifecycle --jobs 2                 # small models: pruned, trained, removed, saved, loaded
    python benchmarks/zoo lifecycle --models transformers/BertConfig --out /tmp/zoo

    python benchmarks/zoo page                               # the tables of docs/zoo.md and docs/zoo-others.md

A result is a line of OUT/zoo_WHAT.csv. Architectures that have a line are left out, so that a
run can be stopped (Ctrl-C, --minutes) and started again; a line that is deleted is made anew.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import timm
import torch
from pages import DOCS
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from zoo import small
from zoo.coverage import coverage
from zoo.libraries import LIBRARIES
from zoo.lifecycle import lifecycle
from zoo.page import filled, filled_others, summary
from zoo.real import real
from zoo.structure import choose, structure

RESULTS = DOCS / "results"
PAGE, OTHERS = DOCS / "zoo.md", DOCS / "zoo-others.md"
TIMM = ("structure", "real")
OTHER: dict[str, Callable[[str], Any]] = {"coverage": coverage, "lifecycle": lifecycle}
MULTIHEAD = "test_resnet+multihead"
PART = [
    "beit_base_patch16_224",
    "sequencer2d_s",
    "swinv2_tiny_window16_256",
    "vit_tiny_r_s16_p8_224",
    "vit_tiny_patch16_dinov3_qkvb",
    "test_nfnet",
    "test_vit",
    "test_convnext",
    "test_efficientnet",
    "test_resnet",
    MULTIHEAD,
]
"""The families that PyTorch's pruning fails on, recurrent weights, and the common ones; the slowest first."""


def read(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV file, none if there is no file."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a line to a CSV file, and the head if it is new."""
    new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def results(task: Callable[[str], Any], names: Sequence[str], jobs: int, minutes: float) -> Iterator[Any]:
    """What a task finds of each name, as it comes, from processes of one thread each; none is begun after the time."""
    end, left = time.monotonic() + 60 * minutes, iter(names)
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        running = {pool.submit(task, name) for name in islice(left, jobs)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
                if time.monotonic() < end and (name := next(left, None)) is not None:
                    running.add(pool.submit(task, name))


def run(task: Callable[[str], Any], names: Sequence[str], path: Path, jobs: int, minutes: float) -> None:
    """Append a line for each name that has none yet, under a progress bar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {f"{row['library']}/{row['model']}" if "library" in row else row["model"] for row in read(path)}
    missing = [name for name in names if name not in known]
    with Progress() as progress:
        bar = progress.add_task(path.stem, total=len(names), completed=len(names) - len(missing))
        for found in results(task, missing, jobs, minutes):
            append(path, asdict(found))
            progress.update(bar, advance=1)
            if found.failure:
                progress.console.print(f"{found.model}: {found.failure}", markup=False)


def show(rows: Sequence[dict[str, str]]) -> None:
    """Print the summary."""
    table = Table(show_header=False)
    for name, value in summary(rows).items():
        table.add_row(name, value)
    Console().print(table)


def names_of(what: str, libraries: Sequence[str]) -> list[str]:
    """All models of libraries as LIBRARY/MODEL; a library that is not installed is named and left out."""
    found = []
    for library in libraries:
        names = LIBRARIES[library].names if what == "coverage" else partial(small.names, library)
        try:
            found += [f"{library}/{name}" for name in names()]
        except ImportError as error:
            Console().print(f"{library} is left out: {error}", markup=False)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the number of failures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*TIMM, *OTHER, "page"])
    parser.add_argument("--models", nargs="+", help="instead of all that belong to it")
    parser.add_argument("--libraries", nargs="+", choices=list(LIBRARIES), default=list(LIBRARIES), help="not timm")
    parser.add_argument("--part", action="store_true", help="a few representative models of timm")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no other model after this time")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV files")
    arguments = parser.parse_args(argv)
    if arguments.what == "page":
        tables = {part: read(arguments.out / f"zoo_{part}.csv") for part in (*TIMM, *OTHER)}
        PAGE.write_text(filled(PAGE.read_text("utf-8"), tables["structure"], tables["real"]), "utf-8")
        OTHERS.write_text(filled_others(OTHERS.read_text("utf-8"), tables["coverage"], tables["lifecycle"]), "utf-8")
        return 0
    path = arguments.out / f"zoo_{arguments.what}.csv"
    names = arguments.models or (PART if arguments.part else None)
    if arguments.what in OTHER:
        names = names or names_of(arguments.what, arguments.libraries)
        run(OTHER[arguments.what], names, path, arguments.jobs, arguments.minutes)
        return sum(bool(row["failure"]) for row in read(path)) if arguments.what == "lifecycle" else 0
    if arguments.what == "structure":
        run(structure, names or timm.list_models(), path, arguments.jobs, arguments.minutes)
    else:
        names = names or [*choose(read(RESULTS / "zoo_structure.csv")), MULTIHEAD]
        run(real, names, path, arguments.jobs, arguments.minutes)
    rows = read(path)
    show(rows)
    return sum(bool(row["failure"]) for row in rows)
