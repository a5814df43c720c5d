"""A callback for iterative SAP in the Trainer of transformers.

A round is a number of epochs or of steps. The pruning happens where the next round begins, not where the last one ends,
so that every checkpoint holds a trained model and belongs to that model's metrics.

Checkpoints hold plain weights with zeros, as ``from_pretrained`` and the Trainer's own loading want them. What they
lack, masks, rewind point and history, is in a file beside them. An identity in it and in ``trainer_state.json`` says
that the two belong together.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Mapping
from numbers import Real
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils.prune import is_pruned
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from torch_sap.arguments import check_int, needs, some
from torch_sap.decide.bounds import Hyperparameters
from torch_sap.decide.groups import Scope, check_scope
from torch_sap.files.checkpoint import differences, read, write
from torch_sap.functional import remove
from torch_sap.iterate.pruner import SAP
from torch_sap.masks.mask import hold_masks
from torch_sap.masks.parameters import Patterns, kept_patterns
from torch_sap.masks.plain import dense_state_dict
from torch_sap.records.history import History

with needs("torch_sap.integrations.transformers", "transformers", "transformers"):
    from safetensors.torch import save_file
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, get_scheduler
    from transformers.trainer_callback import ExportableState
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
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
        exclude, include: Patterns of what not to prune and what to prune, too, see :func:`prunable_parameters`.

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
        exclude: Patterns = (),
        include: Patterns = (),
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
        patterns = kept_patterns(exclude=exclude, include=include)
        self.sap: SAP | None = None
        self._unit, self._length, self._rewind = unit, length, rewind
        self._patterns: Any = patterns
        self._settings: Any = dict(scope=scope, p=p, q=q, eta_r=eta_r, gamma=gamma, beta=beta)
        self._start = 0.0  # where the round began, in epochs or steps of the Trainer
        self._metrics: dict[str, float] = {}
        self._training = False
        self._saves = False  # the Trainer is about to write a checkpoint
        self._identity = ""  # of the last one
        self._args: TrainingArguments | None = None
        self._state: TrainerState | None = None

    @property
    def history(self) -> History:
        """The rounds so far."""
        return History() if self.sap is None else self.sap.history

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Create the pruner or continue its rounds, and make the schedule one of a round."""
        shards = args.fsdp or args.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
        if shards or os.environ.get("ACCELERATE_USE_FSDP") == "true":
            raise ValueError(
                "SAPCallback must have the whole model in each process, but the Trainer shards it by FSDP or "
                "DeepSpeed; use DDP, or SAP with FSDP2 in a loop of your own"
            )
        model: Any = given["model"]
        self._args, self._state, self._saves = args, state, False
        if state.global_step:  # the Trainer has loaded a checkpoint
            self._resume(args, state, model)
        elif self.sap is not None and self.sap.model is model and is_pruned(model):
            if self._training:  # the one before was interrupted
                self._start = 0.0
            self._drop_unpruned_round()
        else:
            self._new(model)
            self._start, self._metrics = 0.0, {}
        assert self.sap is not None
        if self._rewind != "none":
            scheduler = self._schedule_of_a_round(given["lr_scheduler"], given["train_dataloader"], args, state)
            known = self.sap.starts.optimizer is not None and self.sap.starts.optimizer is given["optimizer"]
            self.sap.attach(optimizer=None if known else given["optimizer"], scheduler=scheduler)
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

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Measure the last training of a Trainer that does not log its end."""
        if self._training:
            self._end(state)

    def state(self) -> dict[str, Any]:
        """Describe the callback for ``trainer_state.json``, and write our file if a checkpoint is being written.

        Here and not in ``on_save``, before which the Trainer deletes older checkpoints.
        """
        self._identity = uuid.uuid4().hex
        attributes = {"identity": self._identity}
        if self._args is not None:
            folder = self._folder(self._args, self._state)
            attributes["folder"] = os.path.abspath(folder)
            if self._saves and os.path.isdir(folder):
                self._write(folder)
        settings = {f"{self._unit}_per_round": self._length, "rewind": self._rewind, **self._patterns}
        return {"args": {**self._settings, **settings}, "attributes": attributes}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Note whether the Trainer is about to write a checkpoint."""
        self._saves = control.should_save

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Note whether the Trainer is about to write a checkpoint."""
        self._saves = control.should_save

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Write our file if another callback has asked for the checkpoint after us."""
        if args.should_save and not self._saves and os.path.isdir(folder := self._folder(args, state)):
            self._write(folder)
        self._saves = False

    @staticmethod
    def _folder(args: TrainingArguments, state: Any) -> str:
        """Where the Trainer writes a checkpoint now."""
        return os.path.join(args.output_dir or "", f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def _new(self, model: nn.Module) -> None:
        rewind: Literal["init", "none"] = "none" if self._rewind == "none" else "init"
        self.sap = SAP(model, rewind=rewind, **self._patterns, **self._settings)

    def _round(self) -> dict[str, Any]:
        return {f"{self._unit}_per_round": self._length, "rewind": self._rewind}

    def _write(self, folder: str) -> None:
        assert self.sap is not None
        model: Any = self.sap.model
        if not hasattr(model, "save_pretrained"):  # the Trainer has written the state_dict as it is
            save_file(dense_state_dict(model), os.path.join(folder, SAFE_WEIGHTS_NAME), metadata={"format": "pt"})
        masks = {prunable.name: prunable.mask for prunable in self.sap.prunables}
        place = {"start": self._start, "metrics": self._metrics, "identity": self._identity}
        content = {"round": self._round(), **place, "masks": masks, "sap": self.sap.state_dict()}
        write(os.path.join(folder, FILE), content)

    def _resume(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        """Continue from a checkpoint, whose plain weights the Trainer has loaded."""
        if is_pruned(model):
            raise ValueError(
                "the model must not be pruned yet to resume from a checkpoint, whose weights its masks would cut; make "
                "it anew, or call torch_sap.remove(model) before train"
            )
        saved = self._find(args, state)
        if different := differences(self._round(), saved["round"], "in the checkpoint"):
            raise ValueError(f"SAPCallback must have the settings of the checkpoint, but they differ: {different}")
        self._new(model)
        assert self.sap is not None
        prunables = self.sap.prunables
        if missing := [prunable.name for prunable in prunables if prunable.name not in saved["masks"]]:
            raise ValueError(f"the checkpoint must be of the same model, but it has no mask for {some(missing)}")
        hold_masks(prunables, [saved["masks"][each.name].to(each.weight.device) for each in prunables])
        self.sap.load_state_dict(saved["sap"])
        self._start, self._metrics = saved["start"], dict(saved["metrics"])

    def _find(self, args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
        """Read our file of the checkpoint that the Trainer has resumed from."""
        callbacks: Any = state.stateful_callbacks
        ours = callbacks.get(type(self).__name__, [])
        known = [each.get("attributes", {}) for each in (ours if isinstance(ours, list) else [ours])]
        folders = [args.resume_from_checkpoint, self._folder(args, state), *(each.get("folder") for each in known)]
        for path in (os.path.join(folder, FILE) for folder in folders if folder):
            if os.path.exists(path) and (saved := read(path))["identity"] in [each.get("identity") for each in known]:
                return saved
        raise ValueError(
            "resume_from_checkpoint must be a whole checkpoint of a training with SAPCallback, but there is no "
            f"{FILE} that belongs to it in {some(sorted({os.fspath(folder) for folder in folders if folder}))}: it was "
            "written without the callback, or not to its end, or was moved (name it in "
            "TrainingArguments(resume_from_checkpoint=...), too). Resume from another one, or load its weights by "
            "from_pretrained and start anew"
        )

    def _steps(self, loader: Any, args: TrainingArguments) -> int:
        """Optimizer steps of a round."""
        if self._unit == "steps":
            return self._length
        try:
            batches = len(loader)
        except TypeError:
            raise ValueError("epochs_per_round needs a data set with a length; use steps_per_round") from None
        return self._length * max(-(-batches // args.gradient_accumulation_steps), 1)

    def _schedule_of_a_round(self, scheduler: Any, loader: Any, args: TrainingArguments, state: TrainerState) -> Any:
        """Make the Trainer's schedule for the whole training one for a round; one of the user's is one already."""
        if isinstance(scheduler, LambdaLR):
            whole, of_round = (_schedule(args, scheduler, n) for n in (state.max_steps, self._steps(loader, args)))
            if list(map(_text, scheduler.lr_lambdas)) == list(map(_text, whole)):
                scheduler.lr_lambdas = of_round
                rates = [
                    base * rate(scheduler.last_epoch) for base, rate in zip(scheduler.base_lrs, of_round, strict=True)
                ]
                for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate
                scheduler._last_lr = rates
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


def _schedule(args: TrainingArguments, scheduler: LambdaLR, steps: int) -> list[Any]:
    """The functions of the schedule that the arguments give for so many steps."""
    groups = [{"params": [nn.Parameter(torch.zeros((), device="cpu"))], "lr": base} for base in scheduler.base_lrs]
    stand_in, warmup, more = SGD(groups, lr=args.learning_rate), args.get_warmup_steps(steps), args.lr_scheduler_kwargs
    made: Any = get_scheduler(args.lr_scheduler_type, stand_in, warmup, steps, more)  # type: ignore[arg-type]
    return list(getattr(made, "lr_lambdas", ()))


def _text(schedule: Any) -> str:
    """Describe a function of a schedule, a partial one with its arguments."""
    parts = getattr(schedule, "func", schedule), getattr(schedule, "args", ()), getattr(schedule, "keywords", {})
    return repr(parts)
