"""Parse the command line, run a command, and turn errors into one line and an exit code."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch_sap
from torch_sap.cli.commands import compare, env, prune, report, scan
from torch_sap.decide.bounds import Hyperparameters
from torch_sap.decide.groups import Scope

ERRORS = (OSError, ValueError, TypeError, ImportError, MemoryError, RuntimeError)
"""Raised for files and names that cannot be used: one line on stderr, never a traceback."""

CODES = """\
Exit codes:
  0    done
  1    an input or output cannot be used: no such file or name, damaged, nothing to prune, a package is missing
  2    wrong usage: an unknown option, or a number out of its range
  130  stopped by Ctrl-C
"""

EXAMPLES = """\
Examples:
  torch-sap scan test_resnet                               a timm model with random weights
  torch-sap scan model.safetensors --plot scan.png
  torch-sap prune model.safetensors -o pruned.safetensors
  torch-sap report runs/test_resnet-digits-global/sap-0
  torch-sap compare runs/a runs/b --plot runs.png

torch-sap COMMAND --help explains a command.

"""

NUMBERS = {
    "p": "order of the smaller norm of the PQ Index",
    "q": "order of the larger norm",
    "eta_r": "loss that pruning may cause, 0 or more; larger prunes more",
    "gamma": "factor on the number of entries that the bound allows to prune",
    "beta": "largest share of a group that is pruned",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code. Wrong usage raises SystemExit with 2."""
    arguments = _parser().parse_args(argv)
    if "p" in arguments:
        try:
            arguments.rule = Hyperparameters(**{name: getattr(arguments, name) for name in NUMBERS})
        except ValueError as error:
            arguments.parser.error(str(error))
    try:
        arguments.command(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except ERRORS as error:
        print(f"torch-sap: {_text(error)}", file=sys.stderr)
        return 1
    return 0


def _text(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error).strip() or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    style: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    text = "Measure and prune models and checkpoint files by SAP."
    parser = argparse.ArgumentParser("torch-sap", description=text, epilog=EXAMPLES + CODES, **style)
    parser.add_argument("--version", action="version", version=f"torch-sap {torch_sap.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")

    def add(command: Callable[[argparse.Namespace], None], line: str) -> Any:
        text = inspect.getdoc(command)
        new = commands.add_parser(command.__name__, help=line, description=text, epilog=CODES, **style)
        new.set_defaults(command=command, parser=new)
        new.add_argument("--json", action="store_true", help="print everything as JSON instead of the table")
        if command is not env:
            new.add_argument("--csv", type=Path, metavar="FILE", help="also write the table as CSV (default: no file)")
        if command not in (prune, env):
            text = "write a figure; the suffix is the format (default: none)"
            new.add_argument("--plot", type=Path, metavar="FILE", help=text)
        return new

    scanning = add(scan, "what SAP would prune of a model or a checkpoint, layer by layer")
    scanning.add_argument("model", metavar="MODEL", help="name of a timm model, checkpoint file, index or folder")
    text = "timm's pretrained weights, a download (default: random weights)"
    scanning.add_argument("--pretrained", action="store_true", help=text)
    scanning.add_argument("--seed", type=int, default=0, help="seed of a timm model's random weights (default: 0)")
    pruning = add(prune, "prune a checkpoint file once, into another file")
    pruning.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint file, index or folder")
    pruning.add_argument("-o", "--out", type=Path, required=True, help="the file (or folder) to write")
    text = (
        "measure all weights together, each layer, or each row (default: global, which kept 87 %% of a pretrained "
        "network's answers without training, where layer kept 22 %%)"
    )
    pruning.add_argument("--scope", choices=get_args(Scope), default="global", help=text)
    text = "replace files that exist, the input too if it is OUT (default: refuse)"
    pruning.add_argument("--overwrite", action="store_true", help=text)
    for each in (scanning, pruning):
        for name, text in NUMBERS.items():
            option, default = "--" + name.replace("_", "-"), getattr(Hyperparameters(), name)
            each.add_argument(option, type=float, default=default, metavar="X", help=f"{text} (default: {default})")
        text = "leave out the weights that match; may be repeated (default: none)"
        each.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help=text)
        text = "also take parameters that match, such as lookup tables; may be repeated (default: none)"
        each.add_argument("--include", action="append", default=[], metavar="PATTERN", help=text)
        each.add_argument("--key", help="state_dict of a PyTorch file that holds several (default: the only one)")
    one = add(report, "the rounds of a run, as a table and a figure")
    one.add_argument("run", metavar="RUN", help="folder with history.json, or that file")
    several = add(compare, "several runs: a metric against remaining weights")
    several.add_argument("runs", metavar="RUN", nargs="+", help="folders with history.json, or such files")
    text = "loss of the metric that the last column allows (default: 0.01)"
    several.add_argument("--tolerance", type=float, default=0.01, help=text)
    for each in (one, several):
        each.add_argument("--metric", help="the metric to show (default: accuracy, or the first)")
    add(env, "versions and devices, for a report of an issue")
    return parser
