"""The paper's figures anew, an audit of its methods at equal compute, and a comparison with its authors' own code.

    python benchmarks/paper.py audit run --jobs 2
    python benchmarks/paper.py audit draw

`run` does what is left of an experiment's runs (killed ones go on where they were) and packs their histories into
docs/results/paper; `draw` makes the figure and the tables from there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import paper_experiments as experiments
from paper_jobs import Machine, complete_all
from paper_runs import Run

ROOT = Path(__file__).parents[1]
NAMES = ("anchors", "differences", "figure2", "figure3", "figure4", "figure5", "audit")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    arguments = _parser().parse_args(argv)
    machine = Machine(arguments.out, arguments.jobs, arguments.threads, arguments.device, arguments.data_dir)
    failures = complete_all(chosen(arguments), machine)
    if failures:
        raise SystemExit("paper: " + "; ".join(failures))


def chosen(arguments: argparse.Namespace) -> list[Run]:
    """The runs of the experiment that the arguments name, with the budget that they give."""
    if arguments.experiment in ("anchors", "differences"):
        base = experiments.ANCHORS
    elif arguments.experiment in ("figure4", "figure5"):
        base = experiments.ABLATION
    else:
        base = experiments.REDUCED.get(arguments.model, experiments.REDUCED["mlp"])
    if arguments.model != base.model:
        base = replace(base, model=arguments.model)
    named = {name: getattr(arguments, name) for name in ("data", "rounds", "epochs", "width", "images", "test_images")}
    base = replace(base, **{name: value for name, value in named.items() if value is not None})
    seeds = {} if arguments.seeds is None else {"seeds": arguments.seeds}
    return list(getattr(experiments, arguments.experiment)(base, **seeds))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("experiment", choices=NAMES)
    add("action", choices=("run", "draw"))
    add("--model", default="mlp")
    add("--data", default=None)
    add("--rounds", type=int)
    add("--epochs", type=int)
    add("--width", type=int)
    add("--images", type=int)
    add("--test-images", type=int)
    add("--seeds", type=int, nargs="+")
    add("--out", type=Path, default=Path("runs/paper"))
    add("--data-dir", type=Path)
    add("--jobs", type=int, default=1)
    add("--threads", type=int, default=1)
    add("--device", default="cpu")
    return parser


if __name__ == "__main__":
    main()
