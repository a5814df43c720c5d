"""Prune a timm model by SAP: train, measure, prune, rewind, round after round, on real images.

Without arguments it takes timm's `test_resnet` and scikit-learn's digits, which need no download and no GPU:

    python benchmarks/prune_timm.py
    python benchmarks/prune_timm.py --model resnet18 --data cifar10 --iterations 20 --epochs 30 --device cuda

Each round prints a line. In the --out folder are, at the end: `history.csv`, `history.json` and `history.png` (all
rounds), `last.safetensors` (the weights of the last round, zeros where pruned) and `best.safetensors` (those of the
sparsest round whose test accuracy is within one point of the dense model's).
"""

from __future__ import annotations

import argparse
import copy
import difflib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torch_sap
from torch_sap.records.round import Round

try:
    import timm
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from safetensors.torch import save_file
except ImportError as error:
    raise SystemExit(f"{error}: the benchmarks need more packages, pip install -e '.[bench]'") from error

import data
from training import Recipe, evaluate, fit, seed_everything

TOLERANCE = 0.01
QUIET_SECONDS = 30.0
SMALL_MODEL = 1_000_000


def main(argv: Sequence[str] | None = None) -> torch_sap.History:
    """Run the command line; return the history that it has written."""
    arguments = _parser().parse_args(argv)
    try:
        return run(arguments)
    except (FileNotFoundError, FloatingPointError, ImportError, ValueError) as error:
        raise SystemExit(f"prune_timm: {error}") from error


def run(arguments: argparse.Namespace) -> torch_sap.History:
    """Prune as the arguments say, print the rounds, and write the results."""
    seed_everything(arguments.seed)
    device = choose_device(arguments.device)
    dataset = data.load(arguments.data, arguments.data_dir)
    model, dataset = build(arguments.model, dataset, arguments.image_size)
    model, dataset = model.to(device), dataset.to(device)
    set_threads(model, arguments.threads)
    sap = torch_sap.SAP(model, gini=True, **_settings(arguments))
    out = arguments.out or Path("runs", f"{arguments.model}-{arguments.data}-{arguments.scope}-{arguments.seed}")
    out.mkdir(parents=True, exist_ok=True)
    (out / "best.safetensors").unlink(missing_ok=True)
    recipe = Recipe(arguments.epochs, arguments.batch_size, arguments.lr)
    with Display(arguments.iterations + 1, arguments.epochs) as display:
        display.line(_headline(arguments, dataset, device))
        prune_in_rounds(sap, dataset, recipe, arguments.iterations, out, display)
        save_weights(model, out / "last.safetensors")
        sap.history.plot(out / "history.png")
        display.line(summary(sap.history))
        display.line(f"written to {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    return sap.history


def prune_in_rounds(
    sap: torch_sap.SAP, dataset: data.Dataset, recipe: Recipe, iterations: int, out: Path, display: Display
) -> None:
    """Train and prune `iterations` times, and train once more; write the history after every round."""
    for number in range(iterations + 1):
        metrics = fit(sap.model, dataset.train, recipe, display.epoch) | evaluate(sap.model, dataset.test)
        if number > 0 and is_within_tolerance(metrics["accuracy"], sap.history):
            save_weights(sap.model, out / "best.safetensors")
        if number < iterations:
            sap_round = sap.step(metrics, eval_fn=lambda pruned: evaluate(pruned, dataset.test))
        else:
            sap_round = sap.record(metrics)
        display.round(sap_round)
        sap.history.to_csv(out / "history.csv")
        sap.history.to_json(out / "history.json")


def build(name: str, dataset: data.Dataset, image_size: int | None = None) -> tuple[nn.Module, data.Dataset]:
    """Make a timm model for a data set, and resize the images to what the model takes.

    Args:
        name: of a model of timm.
        dataset: gives the channels, the classes and the size of the images.
        image_size: pixels a side; None leaves the images as they are, or takes the model's size where it is fixed.

    Raises:
        ValueError: timm has no such model, or it cannot take such images.
    """
    if not timm.is_model(name):
        similar = timm.list_models(f"*{name}*")[:5] or difflib.get_close_matches(name, timm.list_models())
        raise ValueError(f"model must be one of timm's, got {name!r}; similar: {', '.join(similar) or 'none'}")
    config = timm.get_pretrained_cfg(name)
    own_size = config.input_size[-1] if config is not None and config.fixed_input_size else None
    sizes: dict[str, Any] = {"img_size": image_size} if own_size and image_size else {}
    try:
        model = timm.create_model(name, in_chans=dataset.in_chans, num_classes=dataset.num_classes, **sizes)
    except TypeError as error:
        raise ValueError(f"{name} cannot be made with these settings: {error}") from error
    if size := image_size or own_size:
        dataset = dataset.resized(size)
    shape = (dataset.in_chans, dataset.image_size, dataset.image_size)
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(2, *shape))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(f"{name} cannot take images of shape {shape}; try --image-size ({error})") from error
    return model, dataset


def choose_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is the GPU where CUDA finds one, and the CPU elsewhere.

    Raises:
        ValueError: PyTorch has no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        first_line = str(error).splitlines()[0]
        raise ValueError(f"device must be one that PyTorch finds here, got {name!r} ({first_line})") from error
    return torch.device(name)


def set_threads(model: nn.Module, threads: int | None) -> None:
    """Set the threads that PyTorch uses on the CPU; None is one for a small model, and PyTorch's choice for others."""
    weights = sum(parameter.numel() for parameter in model.parameters())
    if threads or weights < SMALL_MODEL:
        # Two threads gain a small model little, and on busy cores they wait for each other: 54 s an epoch, not 2 s.
        torch.set_num_threads(threads or 1)


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a plain state_dict with zeros where the model is pruned; the model itself keeps its masks."""
    permanent = torch_sap.remove(copy.deepcopy(model)).state_dict()
    # Cloned, because safetensors refuses tensors that share memory (tied weights).
    save_file({key: value.contiguous().clone() for key, value in permanent.items()}, path)


def is_within_tolerance(accuracy: float, history: torch_sap.History) -> bool:
    """Whether a test accuracy is at most one point below that of the dense model."""
    return accuracy >= history[0].metrics["accuracy"] - TOLERANCE - 1e-9


def summary(history: torch_sap.History) -> str:
    """Say in a few lines how the dense model, the sparsest good one and the last one compare."""
    dense = f"dense (round 0): {100 * history[0].metrics['accuracy']:.2f} % test accuracy"
    if len(history) == 1:
        return f"{dense}; nothing was pruned"
    good = [found for found in history[1:] if is_within_tolerance(found.metrics["accuracy"], history)]
    if not good:
        return f"{dense}; no pruned round is within 1 point of it (one run, one seed)"
    best, last = good[-1], history[-1]
    lines = [
        dense,
        f"sparsest round within 1 point: {_describe(best)}",
        f"last round: {_describe(last)}",
        f"{len(good)} of {len(history) - 1} pruned rounds are within 1 point",
        "(one run, one seed; 'within 1 point' is judged on the test images themselves)",
    ]
    return "\n".join(lines)


class Display:
    """Progress bars on a terminal, plain lines elsewhere.

    Args:
        rounds: trainings in all.
        epochs: epochs of each.
    """

    def __init__(self, rounds: int, epochs: int) -> None:
        self.console = Console(highlight=False, markup=False, soft_wrap=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self.rounds = self.progress.add_task("rounds", total=rounds)
        self.epochs = self.progress.add_task("epochs", total=epochs)
        self._spoke = time.monotonic()

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def line(self, text: str) -> None:
        """Print a line above the bars."""
        self.console.print(text)
        self._spoke = time.monotonic()

    def epoch(self, epoch: int, loss: float) -> None:
        """Move the bar of the epochs; without a bar, say a word if nothing was printed for long."""
        self.progress.update(self.epochs, completed=epoch, description=f"epochs, loss {loss:.3f}")
        if not self.console.is_terminal and time.monotonic() - self._spoke > QUIET_SECONDS:
            self.line(f"       epoch {epoch} of {self.progress.tasks[self.epochs].total:.0f}, loss {loss:.3f}")

    def round(self, found: Round) -> None:
        """Print the line of a round in the table, and move the bar of the rounds."""
        if found.number == 0:
            self.line("round  remaining %  PQ Index  trained, accuracy %  pruned, before rewinding %  seconds")
        after = found.pruned_metrics.get("accuracy")
        pruned = "-" if after is None else f"{100 * after:.2f}"
        self.line(
            f"{found.number:5}  {100 * found.density:11.2f}  {found.pqi:8.4f}  "
            f"{100 * found.metrics['accuracy']:19.2f}  {pruned:>26}  {found.seconds:7.1f}"
        )
        self.progress.update(self.rounds, completed=found.number + 1)
        self.progress.update(self.epochs, completed=0)


def _describe(found: Round) -> str:
    accuracy, density = found.metrics["accuracy"], found.density
    return f"round {found.number}, {100 * accuracy:.2f} % at {100 * density:.1f} % remaining weights"


def _headline(arguments: argparse.Namespace, dataset: data.Dataset, device: torch.device) -> str:
    return (
        f"{arguments.model} on {dataset.name}: {len(dataset.train)} training and {len(dataset.test)} test images of "
        f"{dataset.in_chans} x {dataset.image_size} x {dataset.image_size}, {dataset.num_classes} classes; "
        f"{arguments.iterations} prunings, {arguments.epochs} epochs a round, on {device}"
    )


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("scope", "p", "q", "eta_r", "gamma", "beta", "exclude")}


def _at_least(smallest: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if int(text) < smallest:
            raise argparse.ArgumentTypeError(f"must be {smallest} or more, got {text}")
        return int(text)

    return parse


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Names the defaults in the help, where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, ()) else super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=_Formatter)
    add = parser.add_argument
    add("--model", default="test_resnet", help="name of a model of timm")
    add("--data", default="digits", choices=data.NAMES, help="the images")
    add("--data-dir", type=Path, help="where they lie, or are downloaded to")
    add("--image-size", type=_at_least(1), help="resize the images to this many pixels a side")
    add("--scope", default="layer", choices=("global", "layer", "neuron"), help="what one ratio is computed over")
    add("--iterations", type=_at_least(0), default=10, help="prunings; there is one training more")
    add("--epochs", type=_at_least(1), default=4, help="epochs of each training")
    add("--batch-size", type=_at_least(1), default=64, help="images a step")
    add("--lr", type=float, default=0.1, help="learning rate at the start of each training")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--threads", type=_at_least(1), help="of the CPU (default: 1 for small models, else PyTorch's choice)")
    add("--seed", type=int, default=0, help="of the initial weights and the order of the images")
    add("--out", type=Path, help="folder for the results (default: runs/MODEL-DATA-SCOPE-SEED)")
    add("--p", type=float, default=0.5, help="the smaller norm of the PQ Index")
    add("--q", type=float, default=1.0, help="the larger norm of the PQ Index")
    add("--eta-r", type=float, default=0.0, help="larger prunes more")
    add("--gamma", type=float, default=1.0, help="factor on what could be pruned")
    add("--beta", type=float, default=0.9, help="largest share of a group that one round prunes")
    add("--exclude", nargs="*", default=(), help="weights to leave alone, as patterns of dotted paths (fc, layer4.*)")
    return parser


if __name__ == "__main__":
    main()
