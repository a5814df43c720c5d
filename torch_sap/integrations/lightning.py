"""A callback for iterative SAP in Lightning's Trainer.

A round is a fixed number of epochs. The pruning happens at the start of the next epoch, not at the end of the last one,
so that every checkpoint holds a trained model and that model's metrics.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils.prune import is_pruned
from torch.optim.swa_utils import AveragedModel
from torch.utils.hooks import RemovableHandle

from torch_sap.arguments import check_int, needs
from torch_sap.decide.bounds import Hyperparameters
from torch_sap.decide.groups import Scope, check_scope
from torch_sap.functional import global_unstructured, remove
from torch_sap.iterate.pruner import SAP
from torch_sap.iterate.starts import Start, resetter, start_of
from torch_sap.masks.mask import hold_masks
from torch_sap.masks.parameters import Patterns, kept_patterns, prunable_parameters
from torch_sap.records.history import History

with needs("torch_sap.integrations.lightning", "Lightning", "lightning"):
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import StochasticWeightAveraging

_logger = logging.getLogger(__name__)


class SAPCallback(Callback):
    """Sparsity-informed Adaptive Pruning in a Trainer: train, measure, prune, rewind, again.

    A round takes ``epochs_per_round`` epochs, and the last one is not pruned: use
    ``max_epochs=(iterations + 1) * epochs_per_round``. Rewinding restores the surviving weights, all other parameters,
    the buffers, the optimizers, and the learning-rate schedulers, so create schedulers for one round. The history's
    metrics are ``trainer.callback_metrics``.

    The state is part of the Trainer's checkpoints; ``fit(ckpt_path=...)`` continues at the end of a round or inside
    one. A second ``fit`` of the same module continues where the first one ended; another module starts again.

    Args:
        epochs_per_round: Epochs of each training; 1 or more.
        scope, p, q, eta_r, gamma, beta: As of :class:`SAP`.
        rewind: "init": to the state at the start of the first ``fit``. A number of epochs, less than
            ``epochs_per_round``: to the weights after that many epochs of the first round (late rewinding), with fresh
            optimizers and schedulers. "none": nothing is set back, schedulers continue.
        exclude, include: Patterns of what not to prune and what to prune, too, see :func:`prunable_parameters`; paths
            are those in the LightningModule.

    Attributes:
        sap: The :class:`SAP` pruner; None before the first ``fit``.

    Raises:
        ValueError: if an argument is out of range; in ``fit`` if weights are NaN or infinite, if there is nothing to
            prune, or if a checkpoint comes from a callback with other settings.
        TypeError: if an argument has the wrong type.

    Example:
        >>> callback = SAPCallback(epochs_per_round=10, scope="layer", rewind=1)
        >>> trainer = Trainer(max_epochs=50, callbacks=[callback], logger=False)  # five trainings, four prunings
        >>> # trainer.fit(module, train_loader, validation_loader); callback.history.to_csv("history.csv")

    Source: Algorithm 1 of the paper (Diao et al., ICLR 2023, arXiv 2302.05601).
    """

    def __init__(
        self,
        epochs_per_round: int,
        *,
        scope: Scope = "layer",
        p: float = 0.5,
        q: float = 1.0,
        eta_r: float = 0.0,
        gamma: float = 1.0,
        beta: float = 0.9,
        rewind: Literal["init", "none"] | int = "init",
        exclude: Patterns = (),
        include: Patterns = (),
    ) -> None:
        Hyperparameters(p, q, eta_r, gamma, beta)  # raises here if one is out of range
        check_int("epochs_per_round", epochs_per_round, low=1)
        check_scope(scope)
        late = isinstance(rewind, int) and not isinstance(rewind, bool) and 0 < rewind < epochs_per_round
        if not late and rewind not in ("init", "none"):
            raise ValueError(
                'rewind must be "init", "none" or a number of epochs from 1 to epochs_per_round - 1 = '
                f"{epochs_per_round - 1}, got rewind={rewind!r}"
            )
        patterns = kept_patterns(exclude=exclude, include=include)
        self.epochs_per_round, self.rewind = epochs_per_round, rewind
        self.sap: SAP | None = None
        self._patterns: Any = patterns
        self._settings: Any = dict(scope=scope, p=p, q=q, eta_r=eta_r, gamma=gamma, beta=beta)
        self._loaded: Mapping[str, Any] = {}
        self._metrics: dict[str, float] = {}
        self._epochs_before = 0  # epochs of this round in earlier calls of fit
        self._round_start: int | None = None  # the Trainer's epoch at its start; None between fits
        self._gave_masks = False  # to a module that has not loaded its state yet
        self._load_handle: RemovableHandle | None = None
        self._starts: list[tuple[Any, Start]] = []  # optimizers and schedulers, and their states before training

    @property
    def history(self) -> History:
        """The rounds so far."""
        return History() if self.sap is None else self.sap.history

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Add masks of ones before other callbacks copy the module, and let it load any checkpoint.

        The Trainer loads the module's state before any later hook. Layers from ``configure_model`` do not exist yet;
        they get their masks when masks are loaded, or in ``on_fit_start``.
        """
        if stage == "fit" and prunable_parameters(pl_module) and not is_pruned(pl_module):
            global_unstructured(pl_module, gamma=0, **self._patterns)  # gamma=0 prunes nothing
            self._gave_masks = True
            for average in _averages(trainer):  # made before this callback was set up
                if not is_pruned(average.module):
                    global_unstructured(average.module, gamma=0, **self._patterns)
        register: Any = pl_module.register_load_state_dict_pre_hook
        self._load_handle = register(self._match_masks)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the loading hook from the module; its masks stay."""
        self._gave_masks = False
        if self._load_handle is not None:
            self._load_handle.remove()
            self._load_handle = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Create the pruner, now that the module is on its device with any checkpoint's weights."""
        self.teardown(trainer, pl_module, "fit")
        if self.sap is None or self.sap.model is not pl_module:
            rewind: Literal["init", "none"] = "none" if self.rewind == "none" else "init"
            self.sap = SAP(pl_module, rewind=rewind, **self._patterns, **self._settings)
            self._metrics, self._epochs_before, self._round_start = {}, 0, None
        self._resume()
        stateful: list[Any] = [*trainer.optimizers, *(config.scheduler for config in trainer.lr_scheduler_configs)]
        self._starts = [(each, start_of(each)) for each in stateful]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue the round of the last fit; the Trainer knows its own epoch only now."""
        if self._round_start is None:
            self._round_start = trainer.current_epoch - self._epochs_before

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune if a round is complete.

        StochasticWeightAveraging adds an epoch at the end, for the statistics of the average: that is no new round.
        """
        assert self.sap is not None and self._round_start is not None
        epochs = trainer.current_epoch - self._round_start
        if epochs >= self.epochs_per_round and not _only_updates_statistics(trainer):
            self._drop_unpruned_round()
            _logger.info("%r", self.sap.step(self._metrics))
            if self.rewind != "none":
                for each, start in self._starts:
                    resetter(each, start)()
            self._round_start = trainer.current_epoch
        elif epochs == self.rewind and not any(found.pruned for found in self.history):
            self.sap.set_rewind_point()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics of training and validation, which are complete now."""
        values = trainer.callback_metrics.items()
        self._metrics = {name: float(value) for name, value in values if value.numel() == 1}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the last training. If another fit follows, the round continues."""
        self._end(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the zeros of weights that other callbacks have written (StochasticWeightAveraging).

        Measure the last training if there was none in this fit, after resuming from the last checkpoint.
        """
        if self._round_start is not None and trainer.current_epoch > self._round_start:
            self._end(trainer)
        if self.sap is not None:
            with torch.no_grad():
                hold_masks(self.sap.prunables, [prunable.mask for prunable in self.sap.prunables])

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let another fit continue after an error."""
        self._pause(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Collect the pruner's state and the place in the round, as plain values."""
        if self.sap is None:
            return {}
        return {
            "sap": self.sap.state_dict(),
            "metrics": dict(self._metrics),
            "epochs_before": self._epochs_before,
            "round_start": self._round_start,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a :meth:`state_dict`; the Trainer calls it before or after ``on_fit_start``."""
        self._loaded = state_dict
        self._resume()

    def _match_masks(self, module: nn.Module, state: Mapping[str, Any], *_: Any) -> None:
        """Before the module loads a state: add masks, or remove those of :meth:`setup`, as the state needs."""
        if any(key.endswith("_mask") and key.removesuffix("_mask") + "_orig" in state for key in state):
            global_unstructured(module, gamma=0, **self._patterns)
        elif self._gave_masks:
            remove(module)

    def _resume(self) -> None:
        if self._loaded and self.sap is not None:
            self.sap.load_state_dict(self._loaded["sap"])
            self._metrics = dict(self._loaded["metrics"])
            self._epochs_before, self._round_start = self._loaded["epochs_before"], self._loaded["round_start"]
            self._loaded = {}

    def _end(self, trainer: Trainer) -> None:
        assert self.sap is not None
        self._drop_unpruned_round()
        self.sap.record(self._metrics)
        self._pause(trainer)

    def _drop_unpruned_round(self) -> None:
        """Drop the record of a training that is no longer the last one."""
        assert self.sap is not None
        self.sap.history = History(found for found in self.history if found.pruned is not None)

    def _pause(self, trainer: Trainer) -> None:
        if self._round_start is not None:
            self._epochs_before = trainer.current_epoch - self._round_start
            self._round_start = None


def _only_updates_statistics(trainer: Trainer) -> bool:
    """Whether this is the epoch that StochasticWeightAveraging adds, for the batch-norm statistics of its average."""
    averaging = [each for each in trainer.callbacks if isinstance(each, StochasticWeightAveraging)]  # type: ignore[attr-defined]
    return any(trainer.current_epoch > each.swa_end for each in averaging)


def _averages(trainer: Trainer) -> Iterator[AveragedModel]:
    """The averages that callbacks keep (WeightAveraging)."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        yield from (value for value in vars(callback).values() if isinstance(value, AveragedModel))
