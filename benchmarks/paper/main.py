"""The paper's figures anew, an audit of its methods at equal compute, and a comparison with its authors' own code.

    python benchmarks/paper audit run --jobs 2
    python benchmarks/paper audit draw

`run` does what is left of an experiment's runs (a killed one goes on where it was), shares them with the other
experiments, and packs their histories into docs/results/paper. From there `draw` makes the figures of
docs/does-it-work.md, the table of docs/settings.md, and all tables in docs/results/paper/tables.
Without further arguments both do what those pages show; with them the paper's own:

    python benchmarks/paper figure2 run --data cifar10 --model cnn --width 64 --rounds 30 --epochs 200 --device cuda
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import data
from pages import DOCS

from paper import experiments
from paper.runs import Run

RESULTS = DOCS / "results" / "paper"
IMAGES = DOCS / "images"
PAGE = DOCS / "does-it-work.md"
NAMES = (
    "anchors",
    "differences",
    "figure2",
    "figure3",
    "figure4",
    "figure5",
    "audit",
    "cifar10",
    "adaptive",
    "settings",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.action == "run":
            run(arguments)
        else:
            page = arguments.page or page_of(arguments.experiment)
            draw(arguments.experiment, base_of(arguments), arguments.results, arguments.images_dir, page)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"paper: {error}") from error


def run(arguments: argparse.Namespace) -> None:
    """Do what is left of an experiment's runs, and pack their histories."""
    from paper.jobs import Machine, complete_all
    from paper.results import pack

    runs = runs_of(arguments)
    machine = Machine(arguments.out, arguments.jobs, arguments.threads, arguments.device, arguments.data_dir)
    failures = complete_all(runs, machine)
    pack(runs, arguments.out, arguments.results)
    if failures:
        raise SystemExit("paper: " + "; ".join(failures))


def draw(experiment: str, base: Run, results: Path, images: Path, page: Path) -> None:
    """Make the figures and the tables of an experiment from packed histories."""
    from pages import fill, save_table

    from paper import draw as drawings
    from paper.results import read

    tables, figures = getattr(drawings, experiment)(read(results), base, results)
    images.mkdir(parents=True, exist_ok=True)
    for name, save in figures.items():
        save(images / name)
    for name, text in tables.items():
        save_table(text, table_path(results, name))
    if page.exists():
        written = page.read_text("utf-8")
        shown = {name: text for name, text in tables.items() if f"<!-- begin {name} -->" in written}
        page.write_text(fill(written, shown), "utf-8")
    for text in tables.values():
        print(text, end="\n\n")


def table_path(results: Path, name: str) -> Path:
    """Where a table lies as CSV; the page shows some of them too."""
    return results / "tables" / f"{name.replace(' ', '_')}.csv"


def page_of(experiment: str) -> Path:
    """The page that shows an experiment."""
    return DOCS / "settings.md" if experiment == "settings" else PAGE


def runs_of(arguments: argparse.Namespace) -> list[Run]:
    """The runs of the experiment that the arguments name."""
    seeds = {} if arguments.seeds is None else {"seeds": arguments.seeds}
    return list(getattr(experiments, arguments.experiment)(base_of(arguments), **seeds))


def base_of(arguments: argparse.Namespace) -> Run:
    """The budget that the arguments give: this page's, or the paper's for a model and data that the page lacks."""
    shown = experiments.BASES.get(arguments.experiment, Run())
    wanted = arguments.model or shown.model, arguments.data or shown.data
    own = arguments.experiment in experiments.BASES and (shown.model, shown.data) == wanted
    base = shown if own else experiments.REDUCED.get(wanted) or experiments.paper_budget(wanted[0])
    names = ("data", "rounds", "epochs", "batch_size", "width", "images", "test_images")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return replace(base, **given)


def _parser() -> argparse.ArgumentParser:
    lines = __doc__.split("\n")
    parser = argparse.ArgumentParser(
        description=lines[0], epilog="\n".join(lines[2:]), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("experiment", choices=NAMES)
    add("action", choices=("run", "draw"))
    add("--model", help="linear, mlp, cnn, resnet18, wresnet28x8, or a model of timm")
    add("--data", choices=data.NAMES, help="the images")
    add("--rounds", type=int, help="prunings; there is one training more")
    add("--epochs", type=int, help="epochs of each training")
    add("--batch-size", type=int, help="images a step")
    add("--width", type=int, help="channels of the first convolution of cnn (the paper's: 64)")
    add("--images", type=int, help="the first so many training images only")
    add("--test-images", type=int, help="the first so many test images only")
    add("--seeds", type=int, nargs="+", help="of the initial weights and the order of the images")
    add("--jobs", type=int, default=1, help="runs at a time")
    add("--threads", type=int, default=1, help="of the CPU, for each run")
    add("--device", default="cpu", help="where to train")
    add("--data-dir", type=Path, help="where the images lie, or are downloaded to")
    add("--out", type=Path, default=Path("runs/paper"), help="a folder for each run is made in it")
    add("--results", type=Path, default=RESULTS, help="folder of the packed histories")
    add("--images-dir", type=Path, default=IMAGES, help="folder of the figures")
    add("--page", type=Path, help="the page whose tables are filled")
    return parser
