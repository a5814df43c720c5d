"""The training loop of the benchmarks: SGD, Nesterov momentum, a cosine schedule, clipped gradients."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from data import Split
from torch import Tensor, nn

OnEpoch = Callable[[int, float], None]


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Args:
        epochs: passes over the training images.
        batch_size: images a step.
        lr: learning rate of the first step; it falls to zero along half a cosine.
        momentum: Nesterov momentum of SGD.
        weight_decay: added to the gradient as this times the weight.
        clip: largest norm of the gradient over all parameters.
        anneal: whether the learning rate falls after each "step" or after each "epoch".
    """

    epochs: int = 8
    batch_size: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip: float = 1.0
    anneal: Literal["step", "epoch"] = "step"


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch, and let cuDNN choose repeatable algorithms."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def fit(
    model: nn.Module,
    split: Split,
    recipe: Recipe,
    on_epoch: OnEpoch | None = None,
    before_step: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Train a model in place, with an optimizer and a schedule of its own.

    Args:
        model: a classifier on the device of `split`.
        split: the training images.
        recipe: how to train.
        on_epoch: called after each epoch with its number (from 1) and its mean loss, for a progress bar.
        before_step: called after each clipping, before the optimizer's step.

    Returns:
        `{"train_loss": mean loss over the last epoch}`.

    Raises:
        FloatingPointError: the loss became NaN or infinite.
    """
    optimizer = torch.optim.SGD(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.momentum > 0,
    )
    steps = max(1, len(split) // recipe.batch_size) if recipe.anneal == "step" else 1
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs * steps)
    loss = math.nan
    for epoch in range(1, recipe.epochs + 1):
        each_step = schedule if recipe.anneal == "step" else None
        loss = _train_one_epoch(model, split, recipe, optimizer, each_step, before_step)
        if recipe.anneal == "epoch":
            schedule.step()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"training diverged in epoch {epoch}: the loss is {loss}; try a smaller learning rate"
            )
        if on_epoch is not None:
            on_epoch(epoch, loss)
    return {"train_loss": loss}


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, batch_size: int = 256) -> dict[str, float]:
    """Return `{"accuracy": share classified right, "loss": mean cross-entropy}`; the model's mode is kept."""
    was_training = model.training
    model.eval()
    right: Tensor | float = 0.0
    loss: Tensor | float = 0.0
    for images, labels in split.batches(batch_size):
        logits = model(images)
        right = right + (logits.argmax(1) == labels).sum()
        loss = loss + F.cross_entropy(logits, labels, reduction="sum")
    model.train(was_training)
    return {"accuracy": float(right) / len(split), "loss": float(loss) / len(split)}


def _train_one_epoch(
    model: nn.Module,
    split: Split,
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler | None,
    before_step: Callable[[], None] | None,
) -> float:
    model.train()
    total: Tensor | float = 0.0
    steps = 0
    for images, labels in split.batches(recipe.batch_size, shuffle=True):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        if before_step is not None:
            before_step()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        # Summed on the device and read once an epoch: reading it each step would make a GPU wait.
        total = total + loss.detach()
        steps += 1
    return float(total) / steps
