"""A callback for iterative SAP in the Trainer of transformers.

A round is a number of epochs or of steps. The pruning happens where the next round begins, not where the last one ends,
so that every checkpoint holds a trained model and belongs to that model's metrics.

Checkpoints hold plain weights with zeros, as ``from_pretrained`` and the Trainer's own loading want them. What they
lack, masks, rewind point and history, is in a file beside them. The Trainer tells its callbacks neither the folder
that it writes nor the one that it resumes from; both are read from its frames.
"""

from __future__ import annotations

import copy
import functools
import logging
import os
import sys
from collections.abc import Iterable, Mapping
from numbers import Real
from types import FrameType
from typing import Any, Literal

from torch import nn
from torch.nn.utils.prune import is_pruned

from torch_sap.arguments import check_int, needs
from torch_sap.decide.bounds import Hyperparameters
from torch_sap.decide.groups import Scope, check_scope
from torch_sap.files.checkpoint import differences, read, write
from torch_sap.functional import remove
from torch_sap.iterate.pruner import SAP
from torch_sap.masks.mask import hold_masks
from torch_sap.records.history import History

with needs("torch_sap.integrations.transformers", "transformers", "transformers"):
    from safetensors.torch import save_file
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState
    from transformers.utils import SAFE_WEIGHTS_NAME

FILE = "torch_sap.pt"
"""Name of the file in a checkpoint's folder."""

_logger = logging.getLogger(__name__)


class SAPCallback(TrainerCallback, ExportableState):
    """Sparsity-informed Adaptive Pruning in transformers' Trainer: train, measure, prune, rewind, again.

    A round takes ``epochs_per_round`` epochs or ``steps_per_round`` steps, and the last one is not pruned: train for
    ``(iterations + 1)`` rounds. Rewinding restores the surviving weights, all other parameters, the buffers and the
    optimizer, and the learning rate starts anew: the schedule and the warm-up of the TrainingArguments are those of
    one round. A scheduler that you give to the Trainer yourself is set back too, and has to be for one round. The
    history's metrics are those of the last evaluation.

    The Trainer's checkpoints hold plain weights; ``train(resume_from_checkpoint=...)`` continues from any of them.

    Args:
        epochs_per_round: Epochs of each training; 1 or more.
        steps_per_round: Optimizer steps of each training, instead of epochs; 1 or more.
        scope, p, q, eta_r, gamma, beta: As of :class:`SAP`.
        rewind: "init": to the state at the start of the training. A number of epochs (steps), less than a round: to
            the weights after that many of the first round (late rewinding). "none": nothing is set back, and the
            learning rate follows one schedule for all rounds.
        exclude: Patterns of what not to prune, see :func:`prunable_parameters`.

    Attributes:
        sap: The :class:`SAP` pruner; None before the training.

    Raises:
        ValueError: if an argument is out of range; in training if weights are NaN or infinite, if there is nothing to
            prune, if a checkpoint comes from a callback with other settings or without one, or with FSDP or DeepSpeed.
        TypeError: if an argument has the wrong type.

    Example:
        >>> callback = SAPCallback(epochs_per_round=3, scope="global")
        >>> # Trainer(model, TrainingArguments("out", num_train_epochs=12), callbacks=[callback], ...).train()

    Source: Algorithm 1 of the paper (Diao et al., ICLR 2023, arXiv 2302.05601).
    """

    def __init__(
        self,
        epochs_per_round: int | None = None,
        *,
        steps_per_round: int | None = None,
        scope: Scope = "layer",
        p: float = 0.5,
        q: float = 1.0,
        eta_r: float = 0.0,
        gamma: float = 1.0,
        beta: float = 0.9,
        rewind: Literal["init", "none"] | int = "init",
        exclude: str | Iterable[str] = (),
    ) -> None:
        Hyperparameters(p, q, eta_r, gamma, beta)  # raises here if one is out of range
        check_scope(scope)
        if (epochs_per_round is None) == (steps_per_round is None):
            raise ValueError(
                "a round must be given as epochs_per_round or as steps_per_round, got "
                f"epochs_per_round={epochs_per_round}, steps_per_round={steps_per_round}"
            )
        unit = "epochs" if steps_per_round is None else "steps"
        length = epochs_per_round if steps_per_round is None else steps_per_round
        check_int(f"{unit}_per_round", length, low=1)
        assert length is not None
        late = isinstance(rewind, int) and not isinstance(rewind, bool) and 0 < rewind < length
        if not late and rewind not in ("init", "none"):
            raise ValueError(
                f'rewind must be "init", "none" or a number of {unit} from 1 to {unit}_per_round - 1 = {length - 1}, '
                f"got rewind={rewind!r}"
            )
        if not isinstance(exclude, Iterable):
            raise TypeError(f"exclude must be a pattern or an iterable of patterns, got {exclude!r}")
        self.sap: SAP | None = None
        self._unit, self._length, self._rewind = unit, length, rewind
        self._exclude = exclude if isinstance(exclude, str) else list(exclude)
        self._settings: Any = dict(scope=scope, p=p, q=q, eta_r=eta_r, gamma=gamma, beta=beta)
        self._start = 0.0  # where the round began, in epochs or steps of the Trainer
        self._metrics: dict[str, float] = {}
        self._training = False

    @property
    def history(self) -> History:
        """The rounds so far."""
        return History() if self.sap is None else self.sap.history

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Create the pruner or continue its rounds, and make the schedule one of a round."""
        frame = _frame(Trainer, "resume_from_checkpoint")
        trainer: Any = frame.f_locals["self"]
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                "SAPCallback must have the whole model in each process, but the Trainer shards it by FSDP or "
                "DeepSpeed; use DDP, or SAP with FSDP2 in a loop of your own"
            )
        model: Any = given["model"]
        folder = frame.f_locals["resume_from_checkpoint"]
        if folder is not None:
            self._resume(trainer, model, os.fspath(folder))
        elif self.sap is not None and self.sap.model is model and is_pruned(model):
            if self._training:  # the one before was interrupted
                self._start = 0.0
            self._drop_unpruned_round()
        else:
            self._new(model)
            self._start, self._metrics = 0.0, {}
        assert self.sap is not None
        if not hasattr(getattr(model, "save_pretrained", _save_pretrained), "writes_plain_weights"):
            model.save_pretrained = functools.partial(_save_pretrained, model)
        if self._rewind != "none":
            scheduler = self._schedule_of_a_round(trainer, given["train_dataloader"], resumed=folder is not None)
            known = self.sap.optimizer is not None and self.sap.optimizer is trainer.optimizer
            self.sap.attach(optimizer=None if known else trainer.optimizer, scheduler=scheduler)
        steps = self._steps(given["train_dataloader"], args)
        if not self.history and state.max_steps <= steps + self._start:
            _logger.warning("SAPCallback prunes nothing: %d steps are no more than one round", state.max_steps)
        self._training = True

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Prune if a round of epochs is complete."""
        if self._unit == "epochs":
            self._begin(state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Prune if a round of steps is complete."""
        if self._unit == "steps":
            self._begin(state)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, Any] | None = None,
        **given: Any,
    ) -> None:
        """Keep the metrics, except for what they say about the time."""
        if self._training:
            about_time = ("_runtime", "_per_second", "epoch")
            numbers = {key: value for key, value in (metrics or {}).items() if isinstance(value, Real)}
            self._metrics = {key: float(value) for key, value in numbers.items() if not key.endswith(about_time)}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **given: Any,
    ) -> None:
        """Measure the last training. This log is the Trainer's last event before it loads its best model."""
        if self._training and "train_runtime" in (logs or {}):
            self._end(state)
            if args.load_best_model_at_end and state.best_model_checkpoint:
                remove(given["model"])  # the best model has zeros of its own
                _frame(Trainer, "self").f_locals["self"]._load_best_model()  # older Trainers do it before this log

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Measure the last training of a Trainer that does not log its end."""
        if self._training:
            self._end(state)

    def state(self) -> dict[str, Any]:
        """Describe the callback for ``trainer_state.json``; while a checkpoint is written, write our file into it.

        Here and not in ``on_save``, before which the Trainer deletes older checkpoints.
        """
        if (frame := _find_frame(Trainer, "_save_checkpoint", "output_dir")) is not None:
            self._write(frame.f_locals["output_dir"])
        settings = {f"{self._unit}_per_round": self._length, "rewind": self._rewind, "exclude": self._exclude}
        return {"args": {**self._settings, **settings}, "attributes": {}}

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Write our file if :meth:`state` has not."""
        folder = os.path.join(args.output_dir or "", f"checkpoint-{state.global_step}")
        if args.should_save and os.path.isdir(folder) and not os.path.exists(os.path.join(folder, FILE)):
            self._write(folder)

    def _new(self, model: nn.Module) -> None:
        rewind: Literal["init", "none"] = "none" if self._rewind == "none" else "init"
        self.sap = SAP(model, rewind=rewind, exclude=self._exclude, **self._settings)

    def _round(self) -> dict[str, Any]:
        return {f"{self._unit}_per_round": self._length, "rewind": self._rewind}

    def _write(self, folder: str) -> None:
        assert self.sap is not None
        model: Any = self.sap.model
        if not hasattr(model, "save_pretrained"):  # the Trainer has written the state_dict as it is
            save_file(_plain_state_dict(model), os.path.join(folder, SAFE_WEIGHTS_NAME), metadata={"format": "pt"})
        masks = {prunable.name: prunable.mask for prunable in self.sap.prunables}
        place = {"start": self._start, "metrics": self._metrics}
        write(
            os.path.join(folder, FILE), {"round": self._round(), **place, "masks": masks, "sap": self.sap.state_dict()}
        )

    def _resume(self, trainer: Any, model: nn.Module, folder: str) -> None:
        """Continue from a checkpoint, whose plain weights the Trainer has loaded."""
        path = os.path.join(folder, FILE)
        if not os.path.exists(path):
            raise ValueError(
                f"resume_from_checkpoint must be a whole checkpoint of a training with SAPCallback, but {folder!r} has "
                f"no {FILE}: it was written without the callback, or not to its end. Resume from another one, or load "
                "its weights by from_pretrained and start anew"
            )
        state = read(path)
        if different := differences(self._round(), state["round"], "in the checkpoint"):
            raise ValueError(f"SAPCallback must have the settings of the checkpoint, but they differ: {different}")
        if is_pruned(model):  # by a training in this process; plain weights did not fit
            trainer._load_from_checkpoint(folder, remove(model))
        self._new(model)
        assert self.sap is not None
        prunables = self.sap.prunables
        if missing := [prunable.name for prunable in prunables if prunable.name not in state["masks"]]:
            raise ValueError(f"the checkpoint must be of the same model, but it has no mask for {', '.join(missing)}")
        hold_masks(prunables, [state["masks"][each.name].to(each.weight.device) for each in prunables])
        self.sap.load_state_dict(state["sap"])
        self._start, self._metrics = state["start"], dict(state["metrics"])

    def _steps(self, loader: Any, args: TrainingArguments) -> int:
        """Optimizer steps of a round."""
        if self._unit == "steps":
            return self._length
        try:
            batches = len(loader)
        except TypeError:
            raise ValueError("epochs_per_round needs a data set with a length; use steps_per_round") from None
        return self._length * max(-(-batches // args.gradient_accumulation_steps), 1)

    def _schedule_of_a_round(self, trainer: Any, loader: Any, *, resumed: bool) -> Any:
        """Make the Trainer's schedule for a round; one that the user has given is one already."""
        if not trainer._created_lr_scheduler:
            return trainer.lr_scheduler
        state, groups = trainer.lr_scheduler.state_dict(), trainer.optimizer.param_groups
        rates = copy.deepcopy([group["lr"] for group in groups])
        trainer.lr_scheduler = None
        scheduler = trainer.create_scheduler(num_training_steps=self._steps(loader, trainer.args))
        if resumed:
            scheduler.load_state_dict(state)
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
        trainer.callback_handler.lr_scheduler = scheduler
        return scheduler

    def _reached(self, state: TrainerState) -> float:
        """Epochs or steps that the Trainer has done."""
        return float(state.global_step if self._unit == "steps" else state.epoch or 0)

    def _begin(self, state: TrainerState) -> None:
        """Where an epoch or a step begins: prune if it is the first of a round."""
        assert self.sap is not None
        done = round(self._reached(state) - self._start, 6)  # not whole inside an epoch, after a resume
        if done >= self._length:
            _logger.info("%r", self.sap.step(self._metrics))
            self._start, self._metrics = self._reached(state), {}
        elif done == self._rewind and not self.history:
            self.sap.set_rewind_point()

    def _end(self, state: TrainerState) -> None:
        assert self.sap is not None
        self.sap.record(self._metrics)
        self._training = False
        self._start -= self._reached(state)  # another train() counts from 0

    def _drop_unpruned_round(self) -> None:
        """Drop the record of a training that is no longer the last one."""
        assert self.sap is not None
        self.sap.history = History(found for found in self.history if found.pruned is not None)


def _save_pretrained(model: Any, *args: Any, **kwargs: Any) -> Any:
    """``save_pretrained`` of a model during and after a training: plain weights, whatever masks the model has."""
    if kwargs.get("state_dict") is None and len(args) < 3:
        kwargs["state_dict"] = _plain_state_dict(model)
    return type(model).save_pretrained(model, *args, **kwargs)


_save_pretrained.writes_plain_weights = True  # type: ignore[attr-defined]


def _plain_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state_dict by the names before pruning, without masks. Pruned entries are zeros already."""
    state = model.state_dict()
    pruned = {key[:-5] for key in state if key.endswith("_mask") and key[:-5] + "_orig" in state}
    names = {key: key[:-5] if key.endswith("_orig") and key[:-5] in pruned else key for key in state}
    return {names[key]: value for key, value in state.items() if not (key.endswith("_mask") and key[:-5] in pruned)}


def _find_frame(kind: type, *names: str) -> FrameType | None:
    """The innermost running method of an object of a kind that has, or is, all these names."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        own = frame.f_locals
        if isinstance(own.get("self"), kind) and all(name in own or name == frame.f_code.co_name for name in names):
            return frame
        frame = frame.f_back
    return None


def _frame(kind: type, name: str) -> FrameType:
    frame = _find_frame(kind, name)
    if frame is None:
        raise RuntimeError(
            f"SAPCallback must be called by the train method of a {kind.__name__} of transformers that has a local "
            f"variable {name}; this version has none"
        )
    return frame
