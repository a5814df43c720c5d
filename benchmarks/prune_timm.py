"""Prune a timm model by SAP, beside the Lottery Ticket, and draw how many weights it needs.

Without arguments it takes timm's `test_resnet` and scikit-learn's digits, which need no download and no GPU:

    python benchmarks/prune_timm.py
    python benchmarks/prune_timm.py --model resnet18 --data cifar10 --iterations 12 --epochs 30 --seeds 1

Both methods train, prune, rewind the weights that are left, and train again. The Lottery Ticket prunes a share that you
choose (--ratio); SAP counts the effective number of weights in each round and prunes the rest. In the --out folder are,
at the end: `rounds.png`, and of each method and seed a folder with `history.json` (all rounds), `history.csv`, and
`model.safetensors` (the model of the last round, for `torch_sap.load_sparse`).
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torch_sap
from torch_sap import History
from torch_sap.records.round import Round

try:
    import matplotlib.style
    import numpy as np
    from data import NAMES, Dataset, load
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter
    from models import build, choose_device, set_threads
    from style import DPI, STYLE, WIDTH, look, percent_log
    from tqdm import tqdm
    from training import Recipe, evaluate, fit, seed_everything
except ImportError as error:
    raise SystemExit(f"{error}: the benchmarks need more packages, pip install -e '.[bench]'") from error

METHODS = ("SAP", "Lottery Ticket")
POINT = 0.01
Histories = Mapping[str, Sequence[History]]


def main(argv: Sequence[str] | None = None) -> Histories:
    """Run the command line; return the histories by method, one per seed."""
    arguments = _parser().parse_args(argv)
    try:
        return run(arguments)
    except (FileNotFoundError, FloatingPointError, ImportError, ValueError) as error:
        raise SystemExit(f"prune_timm: {error}") from error


def run(arguments: argparse.Namespace) -> Histories:
    """Prune by both methods with each seed, print the rounds, and write the results."""
    device = choose_device(arguments.device)
    dataset = load(arguments.data, arguments.data_dir)
    model, dataset = build(arguments.model, dataset, arguments.image_size)
    dataset = dataset.to(device)
    for method in METHODS:
        pruner(method, copy.deepcopy(model), arguments)  # refuses wrong settings before the first training
    out = arguments.out or Path("runs", f"{arguments.model}-{arguments.data}-{arguments.scope}")
    print(headline(arguments, dataset, device), flush=True)
    histories: dict[str, list[History]] = {method: [] for method in METHODS}
    epochs = len(METHODS) * arguments.seeds * (arguments.iterations + 1) * arguments.epochs
    with tqdm(total=epochs, unit="epoch", leave=False, disable=None, dynamic_ncols=True) as bar:
        for seed in range(arguments.seeds):
            for method in METHODS:
                bar.set_description(f"{method}, seed {seed}")
                model, history = prune(method, seed, dataset, arguments, on_epoch=lambda *_: bar.update())
                save(model, history, out / f"{method.lower().replace(' ', '-')}-{seed}")
                histories[method].append(history)
                bar.write(f"{method}, seed {seed}: {change(history)}")
    draw(histories, out / "rounds.png")
    print(table(histories), summary(histories), advice(arguments, out), sep="\n\n")
    return histories


def prune(
    method: str, seed: int, dataset: Dataset, arguments: argparse.Namespace, on_epoch: Callable[[int, float], object]
) -> tuple[nn.Module, History]:
    """Train and prune a new model `iterations` times, and train once more."""
    seed_everything(seed)
    model, _ = build(arguments.model, dataset, arguments.image_size)
    model = model.to(choose_device(arguments.device))
    set_threads(model, arguments.threads)
    recipe = Recipe(arguments.epochs, arguments.batch_size, arguments.lr)

    def train(model: nn.Module) -> dict[str, float]:
        return fit(model, dataset.train, recipe, on_epoch)

    def accuracy(model: nn.Module) -> float:
        return evaluate(model, dataset.test)["accuracy"]

    rounds = pruner(method, model, arguments)
    return model, torch_sap.iterative_sap(rounds, train, eval_fn=accuracy, iterations=arguments.iterations)


def pruner(method: str, model: nn.Module, arguments: argparse.Namespace) -> torch_sap.SAP | torch_sap.LotteryTicket:
    """Make what prunes a model by a method."""
    settings: dict[str, Any] = {"scope": arguments.scope, "p": arguments.p, "q": arguments.q}
    if method == "SAP":
        return torch_sap.SAP(model, **settings)
    return torch_sap.LotteryTicket(model, ratio=arguments.ratio, **settings)


def save(model: nn.Module, history: History, folder: Path) -> None:
    """Write the rounds and the pruned model."""
    folder.mkdir(parents=True, exist_ok=True)
    history.to_json(folder / "history.json")
    history.to_csv(folder / "history.csv")
    torch_sap.save_sparse(model, folder / "model.safetensors")


def mean(histories: Sequence[History], of_round: Callable[[Round], float]) -> Any:
    """Mean over the seeds, one value per round."""
    return np.mean([[of_round(found) for found in history] for history in histories], axis=0)


def accuracy(found: Round) -> float:
    """Share of the test images that the trained model of a round gets right."""
    return float(found.metrics["accuracy"])


def remaining(found: Round) -> float:
    """Share of the weights that the model of a round has."""
    return float(found.density)


def effective(found: Round) -> float:
    """Effective number of weights of the trained model of a round, as a share of all weights."""
    return float(sum(group.r.sum() for group in found.groups.values()) / found.total)


def draw(histories: Histories, path: Path) -> None:
    """Draw accuracy against remaining weights, and remaining weights and their effective number against rounds."""
    with matplotlib.style.context(STYLE, after_reset=True):
        figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for number, (method, of_seeds) in enumerate(histories.items()):
            style = look(number)
            for history in of_seeds:
                points = [100 * remaining(found) for found in history], [accuracy(found) for found in history]
                left.plot(*points, **style | {"linestyle": "none"}, alpha=0.5)
            share, effect = 100 * mean(of_seeds, remaining), 100 * mean(of_seeds, effective)
            style |= {"markersize": 4}
            left.plot(share, mean(of_seeds, accuracy), **style, label=method)
            right.plot(share, **style | {"linestyle": "-"}, label=f"{method}: remaining")
            hollow = style | {"linestyle": ":", "markerfacecolor": "white"}
            right.plot(effect, **hollow, label=f"{method}: effective number")
        dense = float(np.mean([mean(of_seeds, accuracy)[0] for of_seeds in histories.values()]))
        left.axhspan(dense - POINT, dense, color="gray", alpha=0.2, linewidth=0, label="within 1 point of dense")
        left.set_xscale("log")
        left.invert_xaxis()
        left.set_xlabel("remaining weights")
        left.set_ylabel("test accuracy")
        left.set_ylim(dense - 8 * POINT, min(1, dense + 2 * POINT))
        right.set_yscale("log")
        right.set_ylim(bottom=right.get_ylim()[0] / 4)  # room for the legend
        right.set_xlabel("round")
        right.set_ylabel("share of the weights")
        shares = [100 * mean(of_seeds, remaining) for of_seeds in histories.values()]
        effects = [100 * mean(of_seeds, effective) for of_seeds in histories.values()]
        percent_log(left.xaxis, [np.min(shares), 100])
        percent_log(right.yaxis, [np.min(effects), 100])
        left.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        for axes in (left, right):
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small", loc="lower left")
        figure.savefig(path, dpi=DPI)


def headline(arguments: argparse.Namespace, dataset: Dataset, device: torch.device) -> str:
    """Say what is going to be done."""
    return (
        f"{arguments.model} on {dataset.name}: {len(dataset.train)} training and {len(dataset.test)} test images of "
        f"{dataset.image_size} x {dataset.image_size} pixels, {arguments.scope} scope, on {device}\n"
        f"{' and '.join(METHODS)}, seeds: {arguments.seeds}, trainings per run: {arguments.iterations + 1}, epochs per "
        f"training: {arguments.epochs}"
    )


def change(history: History) -> str:
    """Compare the last round with the first one."""
    first, last = history[0], history[-1]
    return f"{remaining(last):.1%} of the weights, accuracy {accuracy(last):.1%}, dense {accuracy(first):.1%}"


def table(histories: Histories) -> str:
    """One line per round, means over the seeds."""
    lines = ["".join(["round", *(f"{method + ': weights':>26}{'accuracy':>10}" for method in histories)])]
    columns = [(mean(of_seeds, remaining), mean(of_seeds, accuracy)) for of_seeds in histories.values()]
    for number in range(len(columns[0][0])):
        cells = [f"{share[number]:>26.1%}{right[number]:>10.1%}" for share, right in columns]
        lines.append("".join([f"{number:>5}", *cells]))
    return "\n".join(lines)


def summary(histories: Histories) -> str:
    """Say where each method ends, and what that costs in each seed."""
    lines = []
    for method, of_seeds in histories.items():
        share, right = mean(of_seeds, remaining)[-1], mean(of_seeds, accuracy)
        against = [100 * (accuracy(history[-1]) - accuracy(history[0])) for history in of_seeds]
        how = "a number that it found itself" if method == "SAP" else "by a preset ratio"
        lines.append(
            f"{method} ends with {share:.1%} of the weights, {how}:\n"
            f"  {right[-1]:.1%} of the test images right, dense {right[0]:.1%} "
            f"(points against dense, per seed: {', '.join(f'{points:+.1f}' for points in against)})"
        )
    return "\n".join(lines)


def advice(arguments: argparse.Namespace, out: Path) -> str:
    """Say what there is now, and what to try next."""
    return f"""\
Look at {out / "rounds.png"}. Then try:
  torch-sap report {out / "sap-0"}
      the rounds of one run as a table
  python benchmarks/prune_timm.py --iterations {3 * arguments.iterations} --seeds 1
      until the accuracy breaks down
  README.md, "In your own script"
      the same with your model and your training"""


def _at_least(smallest: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if int(text) < smallest:
            raise argparse.ArgumentTypeError(f"must be {smallest} or more, got {text}")
        return int(text)

    return parse


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Names the defaults in the help, where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=_Formatter)
    add = parser.add_argument
    add("--model", default="test_resnet", help="name of a model of timm")
    add("--data", default="digits", choices=NAMES, help="the images")
    add("--data-dir", type=Path, help="where they lie, or are downloaded to")
    add("--image-size", type=_at_least(1), help="resize the images to this many pixels per side")
    add("--scope", default="global", choices=("global", "layer", "neuron"), help="which weights are counted together")
    add("--p", type=float, default=1.0, help="the smaller norm of the PQ Index")
    add("--q", type=float, default=2.0, help="the larger norm of the PQ Index")
    add("--ratio", type=float, default=0.35, help="share that a round of the Lottery Ticket prunes")
    add("--iterations", type=_at_least(1), default=6, help="prunings; there is one more training")
    add("--seeds", type=_at_least(1), default=3, help="runs of each method: initial weights and order of the images")
    add("--epochs", type=_at_least(1), default=5, help="epochs of each training")
    add("--batch-size", type=_at_least(1), default=32, help="images per step")
    add("--lr", type=float, default=0.4, help="learning rate at the start of each training")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--threads", type=_at_least(1), help="of the CPU (default: 1 for small models, else PyTorch's choice)")
    add("--out", type=Path, help="folder for the results (default: runs/MODEL-DATA-SCOPE)")
    return parser


if __name__ == "__main__":
    main()
