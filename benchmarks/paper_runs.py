"""One run of the paper's experiments: a model, a method and a seed, trained and pruned round after round.

A run is known by its settings alone: two experiments that need the same run share it. Its folder holds
`config.json`, `history.json` at the end, and `state.pt` before: what a killed run goes on from.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import data
import paper_authors
import paper_models
import torch
from torch import Tensor, nn
from training import Recipe, evaluate, fit, seed_everything

import torch_sap
from torch_sap.decide.groups import Entry, Scope
from torch_sap.iterate.pruner import Pruner

Method = Literal["sap", "lottery-ticket", "one-shot", "random", "plain"]
OnEpoch = Callable[[int, float], None]
PAPER_BATCH = 250


@dataclass(frozen=True)
class Run:
    """The settings of a run.

    Args:
        model: name of a model, see `paper_models.build`.
        data: name of a data set, see `data.load`.
        method: "sap"; "lottery-ticket"; "one-shot" as the paper's authors run it (always ranked by the weights of
            the first training, at a falling density); "random" (as the lottery ticket, with random scores); "plain"
            (train, prune once by magnitude, train on from the trained weights).
        seed: of the initial weights and the order of the images.
        rounds: prunings; there is one training more.
        epochs: of each training.
        scope: "global", "layer" or "neuron".
        p, q, eta_r, gamma, beta: of SAP; p and q say which PQ Index the other methods record.
        ratio: share of what is left that a round prunes, of the methods but SAP.
        batch_size: images a step; the paper's is 250.
        width: of the model cnn.
        images: of the training images, the first so many; None is all of them.
        test_images: of the test images, likewise.
        authors: what is done as the authors' code does it, see `paper_authors`: "", "clip", "count" or "clip+count".
    """

    model: str = "mlp"
    data: str = "fashion-mnist"
    method: Method = "sap"
    seed: int = 0
    rounds: int = 30
    epochs: int = 10
    scope: Scope = "global"
    p: float = 0.5
    q: float = 1.0
    eta_r: float = 0.0
    gamma: float = 1.0
    beta: float = 0.9
    ratio: float = 0.2
    batch_size: int = PAPER_BATCH
    width: int | None = None
    images: int | None = None
    test_images: int | None = None
    authors: Literal["", "clip", "count", "clip+count"] = ""

    @property
    def name(self) -> str:
        """All settings in one word, which names the folder."""
        images = "all" if self.images is None else str(self.images)
        tested = "" if self.test_images is None else f"-{self.test_images}"
        head = f"{self.model}{self.width or ''}-{self.data}-{images}{tested}-{self.rounds}x{self.epochs}"
        head += "" if self.batch_size == PAPER_BATCH else f"-batch{self.batch_size}"
        return f"{head}-{self.label}-{self.scope}{self.authors and '-' + self.authors}-seed{self.seed}"

    @property
    def label(self) -> str:
        """The method and its settings in one word."""
        if self.method != "sap":
            return f"{self.method}-{self.ratio:g}"
        beta = "" if self.beta == 0.9 else f"-beta{self.beta:g}"
        return f"sap-{self.p:g}-{self.q:g}-{self.eta_r:g}-{self.gamma:g}{beta}"


class RandomPruning(torch_sap.LotteryTicket):
    """A lottery ticket that prunes at random: what a method must beat."""

    def __init__(self, model: nn.Module, *, seed: int, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.seed = seed

    def rank(self, entries: list[Entry]) -> list[Entry]:
        """Random scores."""
        # Seeded by the round, so that neither the training's random numbers nor a resumed run differ.
        generator = torch.Generator().manual_seed(1000 * (self.seed + 1) + len(self.history))
        return [replace(entry, scores=_random_like(entry.scores, generator)) for entry in entries]


def make_pruner(run: Run, model: nn.Module) -> Pruner:
    """The pruner of a run's method on its model."""
    settings: dict[str, Any] = {"scope": run.scope, "p": run.p, "q": run.q, "gini": True}
    if run.method == "sap":
        sap = paper_authors.AuthorsSAP if "count" in run.authors else torch_sap.SAP
        return sap(model, eta_r=run.eta_r, gamma=run.gamma, beta=run.beta, **settings)
    settings["ratio"] = run.ratio
    if run.method == "one-shot":
        return torch_sap.OneShot(model, **settings)
    if run.method == "random":
        return RandomPruning(model, seed=run.seed, **settings)
    return torch_sap.LotteryTicket(model, rewind="none" if run.method == "plain" else "init", **settings)


def complete(
    run: Run, out: Path, device: str = "cpu", data_dir: Path | None = None, on_epoch: OnEpoch | None = None
) -> torch_sap.History:
    """Do what is left of a run, and return its history.

    Args:
        run: the settings.
        out: folder of all runs; this one has a folder of its own name in it.
        device: where to train.
        data_dir: where the data lie, see `data.load`.
        on_epoch: called after each epoch with its number in the training and its loss.

    Raises:
        FloatingPointError: a training diverged.
    """
    folder = out / run.name
    if (folder / "history.json").exists():
        return torch_sap.History.from_json(folder / "history.json")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "config.json", lambda path: path.write_text(json.dumps(asdict(run), indent=2) + "\n"))
    seed_everything(run.seed)
    dataset = _dataset(run.data, data_dir, run.images, run.test_images).to(torch.device(device))
    shape = {"in_chans": dataset.in_chans, "image_size": dataset.image_size, "num_classes": dataset.num_classes}
    build = functools.partial(paper_models.build, run.model, width=run.width, **shape)
    model = build().to(device)
    pruner = make_pruner(run, model)
    recipe = Recipe(run.epochs, run.batch_size, anneal="epoch")

    def train(model: nn.Module) -> dict[str, float]:
        if "clip" not in run.authors:
            return fit(model, dataset.train, recipe, on_epoch)
        with torch.random.fork_rng():
            twin = build().to(device)
        return fit(twin, dataset.train, recipe, on_epoch, paper_authors.dense_twin(model, twin))

    def test(model: nn.Module) -> dict[str, float]:
        return {**evaluate(model, dataset.test), "pqi_half_1": pq_index_of(model)}

    # The checkpoint holds the random state too: a killed run goes on bit for bit.
    state = folder / "state.pt"
    history = torch_sap.iterative_sap(pruner, train, iterations=run.rounds, eval_fn=test, checkpoint=state)
    write_whole(folder / "history.json", history.to_json)
    state.unlink(missing_ok=True)
    return history


@torch.no_grad()
def pq_index_of(model: nn.Module) -> float:
    """PQ Index with p = 0.5 and q = 1 of all unpruned weights, whatever a run prunes by: all curves show the same."""
    weights = []
    for module, name in torch_sap.prunable_parameters(model):
        weight, mask = getattr(module, name), getattr(module, f"{name}_mask", None)
        weights.append(weight.flatten() if mask is None else weight[mask != 0])
    return float(torch_sap.pq_index(torch.cat(weights), 0.5, 1.0))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that it is either the old one or the new one, whenever the process is killed."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    write(unfinished)
    os.replace(unfinished, path)


@functools.lru_cache(maxsize=1)
def _dataset(name: str, data_dir: Path | None, images: int | None, test_images: int | None) -> data.Dataset:
    found = data.load(name, data_dir)
    train, test = data.first(found.train, images), data.first(found.test, test_images)
    return replace(found, train=train, test=test)


def _random_like(scores: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(scores.shape, generator=generator).to(scores)
