"""One run of the paper's experiments: a model, a method and a seed, trained and pruned round after round.

A run is known by its settings alone: two experiments that need the same run share it. Its folder holds
`config.json`, `history.json` at the end, and before it `rounds.json`, the finished rounds, and `state.pt`, from which a
killed run resumes.
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
import torch
from torch import nn
from training import Recipe, evaluate, fit, seed_everything

import torch_sap
from paper import authors, models
from paper.controls import RandomPruning, Replay, mean_share
from torch_sap.decide.groups import Scope
from torch_sap.iterate.pruner import Pruner

Method = Literal["sap", "lottery-ticket", "one-shot", "random", "plain", "mean-share", "replay"]
OnEpoch = Callable[[int, float], None]
PAPER_BATCH, PAPER_DECAY = 250, 5e-4
NORMS = ((0.5, 1.0), (1.0, 2.0))
"""p and q that the paper uses."""
LATE = 1
"""The epoch of the first training that late rewinding goes back to."""


@dataclass(frozen=True)
class Run:
    """The settings of a run.

    Args:
        model: name of a model, see `models.build`.
        data: name of a data set, see `data.load`.
        method: "sap"; "lottery-ticket"; "one-shot" as the paper's authors run it (always ranked by the weights of
            the first training, at a falling density); "random" (as the lottery ticket, with random scores); "plain"
            (train, prune once by magnitude, train on from the trained weights); two controls of how adaptive SAP is,
            "mean-share" (one fixed ratio that ends where the SAP run of the seed `source` ends) and "replay" (the
            counts of that run, group by group and round by round, without measuring).
        seed: of the initial weights and the order of the images.
        rounds: prunings; there is one training more. With 0 the model is trained once, and the PQ Indices of `NORMS`
            after each epoch are among its metrics.
        epochs: of each training.
        scope: "global", "layer" or "neuron".
        p, q, eta_r, gamma, beta: of SAP; p and q say which PQ Index the other methods record.
        ratio: share of what is left that a round prunes, of the methods but SAP.
        batch_size: images a step; the paper's is 250.
        width: of the model cnn.
        images: of the training images, the first so many; None is all of them.
        test_images: of the test images, likewise.
        authors: what is done as the authors' code does it, see `paper.authors`: "", "clip", "count" or "clip+count".
        rewind: what the kept weights go back to: "init" (the initial ones), "late" (those after epoch `LATE` of the
            first training), or "none" (they stay, and only the learning rate starts again).
        weight_decay: of the optimizer; the paper's is 5e-4.
        source: seed of the SAP run that a control follows.
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
    rewind: Literal["init", "late", "none"] = "init"
    weight_decay: float = PAPER_DECAY
    source: int | None = None

    @property
    def name(self) -> str:
        """All settings in one word, which names the folder."""
        images = "all" if self.images is None else str(self.images)
        tested = "" if self.test_images is None else f"-{self.test_images}"
        head = f"{self.model}{self.width or ''}-{self.data}-{images}{tested}-{self.rounds}x{self.epochs}"
        head += "" if self.batch_size == PAPER_BATCH else f"-batch{self.batch_size}"
        head += "" if self.weight_decay == PAPER_DECAY else f"-decay{self.weight_decay:g}"
        tail = self.authors and f"-{self.authors}"
        tail += "" if self.rewind == "init" else f"-rewind-{self.rewind}"
        tail += "" if self.source is None else f"-of{self.source}"
        return f"{head}-{self.label}-{self.scope}{tail}-seed{self.seed}"

    @property
    def label(self) -> str:
        """The method and its settings in one word."""
        if not self.follows_sap:
            return f"{self.method}-{self.ratio:g}"
        beta = "" if self.beta == 0.9 else f"-beta{self.beta:g}"
        return f"{self.method}-{self.p:g}-{self.q:g}-{self.eta_r:g}-{self.gamma:g}{beta}"

    @property
    def follows_sap(self) -> bool:
        """Whether the settings of SAP matter."""
        return self.method in ("sap", "mean-share", "replay")

    @property
    def followed(self) -> Run:
        """The SAP run that a control follows."""
        if self.source is None:
            raise ValueError(f"source must be a seed for the method {self.method}, got None")
        return replace(self, method="sap", seed=self.source, source=None)


def make_pruner(run: Run, model: nn.Module, followed: torch_sap.History | None = None) -> Pruner:
    """The pruner of a run's method on its model; a control needs the history that it follows."""
    rewind = "none" if run.method == "plain" or run.rewind == "none" else "init"
    settings: dict[str, Any] = {"scope": run.scope, "p": run.p, "q": run.q, "gini": True, "rewind": rewind}
    if run.method == "sap":
        sap = authors.AuthorsSAP if "count" in run.authors else torch_sap.SAP
        return sap(model, eta_r=run.eta_r, gamma=run.gamma, beta=run.beta, **settings)
    if followed is not None and run.method == "replay":
        return Replay(model, followed, **settings)
    ratio = run.ratio if followed is None else mean_share(followed)
    if run.method == "one-shot":
        return torch_sap.OneShot(model, ratio=ratio, **settings)
    if run.method == "random":
        return RandomPruning(model, seed=run.seed, ratio=ratio, **settings)
    return torch_sap.LotteryTicket(model, ratio=ratio, **settings)


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
    controls = run.follows_sap and run.method != "sap"
    followed = complete(run.followed, out, device, data_dir, on_epoch) if controls else None
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "config.json", lambda path: path.write_text(json.dumps(asdict(run), indent=2) + "\n"))
    seed_everything(run.seed)
    dataset = _dataset(run.data, data_dir, run.images, run.test_images).to(torch.device(device))
    shape = {"in_chans": dataset.in_chans, "image_size": dataset.image_size, "num_classes": dataset.num_classes}
    build = functools.partial(models.build, run.model, width=run.width, **shape)
    model = build().to(device, memory_format=torch.channels_last)
    pruner = make_pruner(run, model, followed)
    recipe = Recipe(run.epochs, run.batch_size, weight_decay=run.weight_decay, anneal="epoch")
    by_epoch: dict[str, float] = {}

    def after_epoch(epoch: int, loss: float) -> None:
        if run.rewind == "late" and epoch == LATE and not pruner.history:
            pruner.set_rewind_point()
        if run.rounds == 0:
            for p, q in NORMS:
                indices = sparsity_of(model, p, q)
                by_epoch.update({f"epoch {epoch} ({p:g}, {q:g}) {name}": index for name, index in indices.items()})
        if on_epoch is not None:
            on_epoch(epoch, loss)

    def train(model: nn.Module) -> dict[str, float]:
        if "clip" not in run.authors:
            return {**fit(model, dataset.train, recipe, after_epoch), **by_epoch}
        with torch.random.fork_rng():
            twin = build().to(device, memory_format=torch.channels_last)
        return fit(twin, dataset.train, recipe, after_epoch, authors.dense_twin(model, twin))

    def test(model: nn.Module) -> dict[str, float]:
        return {**evaluate(model, dataset.test), "pqi_half_1": pq_index_of(model)}

    # The checkpoint holds the random state too: a killed run goes on bit for bit.
    state = folder / "state.pt"
    history = torch_sap.iterative_sap(
        pruner,
        train,
        iterations=run.rounds,
        eval_fn=test,
        callback=lambda _: write_whole(folder / "rounds.json", pruner.history.to_json),
        checkpoint=state,
    )
    os.replace(folder / "rounds.json", folder / "history.json")
    state.unlink(missing_ok=True)
    return history


def pq_index_of(model: nn.Module) -> float:
    """PQ Index with p = 0.5 and q = 1 of all unpruned weights, whatever a run prunes by: all curves show the same."""
    return sparsity_of(model, 0.5, 1.0)["global"]


@torch.no_grad()
def sparsity_of(model: nn.Module, p: float, q: float) -> dict[str, float]:
    """PQ Index of all unpruned weights ("global"), and of those of each tensor by its name."""
    names = {module: name for name, module in model.named_modules()}
    weights = {}
    for module, name in torch_sap.prunable_parameters(model):
        weight, mask = getattr(module, name), getattr(module, f"{name}_mask", None)
        weights[f"{names[module]}.{name}"] = weight.flatten() if mask is None else weight[mask != 0]
    groups = {"global": torch.cat(list(weights.values())), **weights}
    return {name: float(torch_sap.pq_index(group, p, q)) for name, group in groups.items()}


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
