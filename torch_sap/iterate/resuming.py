"""Keep a run of Algorithm 1 in a file, so that a killed run resumes bit for bit.

The file is written at the start, after every training (so that a kill during evaluation or pruning does not repeat the
training) and after every pruning and rewinding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torch_sap.arguments import check_path
from torch_sap.decide.sums import check_finite
from torch_sap.distributed.replicas import unwrap
from torch_sap.distributed.sharded import is_dtensor
from torch_sap.files.checkpoint import as_plain, differences, read, unreadable, write
from torch_sap.iterate.pruner import Pruner
from torch_sap.iterate.randomness import random_state, set_random_state
from torch_sap.iterate.rewinding import copier, masks_of, modes_of, places_of_buffers, set_modes, state_of, tensors_of
from torch_sap.iterate.starts import resetter, start_of
from torch_sap.masks.mask import finish
from torch_sap.masks.parameters import entries_of
from torch_sap.records.metrics import Metrics, as_metrics
from torch_sap.stopping import StoppingRule

KEYS = {
    "format", "settings", "iterations", "trained", "finished",
    "pruner", "model", "masks", "modes", "extra", "optimizer", "schedulers", "random",
}  # fmt: skip


class Run:
    """A run and its file, if ``path`` is not None.

    An existing file sets the pruner, the model, the optimizer, its schedulers and the random state.

    Attributes:
        finished: Whether the run is over.

    Raises:
        ValueError: if the file is damaged, or from a run with other settings or another model (all differences are
            listed); if parameters are sharded, or replicated without DistributedDataParallel. Nothing is changed.
        OSError: if the file cannot be read or written.
    """

    def __init__(
        self, pruner: Pruner, path: str | os.PathLike[str] | None, iterations: int, rules: Sequence[StoppingRule]
    ) -> None:
        self.finished = False
        self._pruner, self._path, self._iterations, self._rules = pruner, path, iterations, rules
        self._trained: dict[str, float] | None = None  # metrics of a training that is not pruned yet
        self._random: list[Any] = []  # random state of each process after that training
        if path is None:
            return
        check_path("checkpoint", path)
        self._group = _group_of(pruner.model)
        if any(_gathered(os.path.exists(path), self._group)):
            self._load(path)
        else:
            self._save()

    def train(self, train_fn: Callable[[nn.Module], Metrics]) -> dict[str, float]:
        """Train the model, unless the file already holds the trained one, and return its metrics."""
        if self._trained is None:
            metrics = as_metrics(train_fn(self._pruner.model), "train_fn")
            if self._path is None:
                return metrics
            check_finite(entries_of(self._pruner.prunables, None))  # resuming with NaN would fail every time
            self._trained, self._random = metrics, _gathered(random_state(), self._group)
            self._save()
        return dict(self._trained)

    def end_round(self, *, finished: bool) -> None:
        """Save the complete round, which may be the last one."""
        self.finished = finished
        if not finished:  # the metrics of a last training stay for a run with more iterations
            self._trained = None
        if self._path is not None:
            self._save()

    def _save(self) -> None:
        pruner, model, path = self._pruner, unwrap(self._pruner.model), self._path
        assert path is not None
        of_pruner = pruner.state_dict()
        state = {
            "settings": self._settings(of_pruner),
            "iterations": self._iterations,
            "trained": self._trained,
            "finished": self.finished,
            "pruner": of_pruner,
            "model": state_of(model),
            "masks": masks_of(pruner.prunables),
            "modes": list(modes_of(model).values()),
            "extra": {name: module.get_extra_state() for name, module in _with_extra_state(model).items()},
            "optimizer": None if pruner.starts.optimizer is None else pruner.starts.optimizer.state_dict(),
            "schedulers": [each.state_dict() for each in pruner.starts.schedulers],
            "random": self._random if self._trained is not None else _gathered(random_state(), self._group),
        }
        first = self._group is None or torch.distributed.get_rank(self._group) == 0
        _together(lambda: write(path, state) if first else None, self._group)

    def _load(self, path: str | os.PathLike[str]) -> None:
        pruner, random = self._pruner, random_state()
        state = _together(lambda: read(path), self._group)
        extended = self._check(state, path)
        stateful = [*([] if pruner.starts.optimizer is None else [pruner.starts.optimizer]), *pruner.starts.schedulers]
        undo = [resetter(each, start_of(each)) for each in stateful]
        rank = 0 if self._group is None else torch.distributed.get_rank(self._group)
        model = unwrap(pruner.model)
        try:
            modes = dict(zip(modes_of(model), map(bool, state["modes"]), strict=True))
            extra = {module: state["extra"][name] for name, module in _with_extra_state(model).items()}
            trained = None if state["trained"] is None else as_metrics(state["trained"], "the file")
            weights = [prunable.weight for prunable in pruner.prunables]
            masks = [m.to(w.device, torch.bool) for w, m in zip(weights, state["masks"], strict=True)]
            shapes = {name: parameter.shape for name, parameter in _parameters(model).items()}
            in_file = {name: value.shape for name, value in state["model"].items() if name in shapes}
            if in_file != shapes or [mask.shape for mask in masks] != [weight.shape for weight in weights]:
                raise ValueError("its tensors are not those of its settings")
            restore = copier(model, state["model"], pruner.prunables, masks)
            if not state["finished"] or extended:
                set_random_state(state["random"][rank])
            saved = [*([] if pruner.starts.optimizer is None else [state["optimizer"]]), *state["schedulers"]]
            for each, value in zip(stateful, saved, strict=True):
                each.load_state_dict(value)
            pruner._continue(state["pruner"], [int(mask.sum()) for mask in masks])
        except Exception as error:  # from corrupt input
            set_random_state(random)
            for reset in undo:
                reset()
            raise unreadable(path, str(error) or repr(error)) from error
        finish(restore)
        set_modes(modes)
        for module, value in extra.items():
            module.set_extra_state(value)
        self._trained, self._random = trained, state["random"]
        self.finished = state["finished"] and not extended
        if extended:
            pruner.history = pruner.history[:-1]  # that round is going to be pruned

    def _check(self, state: Mapping[str, Any], path: str | os.PathLike[str]) -> bool:
        """Refuse a file of another run; return whether a finished run gets more iterations."""
        if missing := sorted(KEYS - state.keys()):
            raise unreadable(path, f"it lacks {', '.join(missing)}")
        try:
            found = [differences(self._settings(self._pruner.state_dict()), state["settings"], "in the file")]
            history, ended, planned = state["pruner"]["history"], bool(state["finished"]), state["iterations"]
            done, returned = len(history["rounds"]) - ended, history["returned"]
            extended = ended and self._iterations > planned == done
            if self._iterations < done:
                found.append(f"iterations: {self._iterations} here, {done} prunings done in the file")
            if extended and returned not in (None, done):
                found.append(
                    f"iterations: {self._iterations} here, but in the file the run has ended with {done} and given "
                    f"back round {returned}"
                )
        except Exception as error:  # from corrupt input
            raise unreadable(path, f"its settings cannot be read ({error!r})") from None
        if different := "; ".join(filter(None, found)):
            raise ValueError(
                f"checkpoint must be of the same run, but {os.fspath(path)!r} is of another: {different}. Nothing was "
                "loaded. Pass the arguments of that run, or another path to begin a new one"
            )
        return extended

    def _settings(self, of_pruner: Mapping[str, Any]) -> dict[str, Any]:
        """Collect all that must be equal when a run resumes."""
        optimizer, start = self._pruner.starts.optimizer, of_pruner["optimizer_start"] or {"param_groups": []}
        groups = {str(number): as_plain(group) for number, group in enumerate(start["param_groups"])}
        return {
            **of_pruner["settings"],
            "tensors": dict.fromkeys(of_pruner["settings"]["tensors"], "pruned"),
            "model": _table(unwrap(self._pruner.model)),
            "optimizer": {} if optimizer is None else {"class": type(optimizer).__name__, "groups": groups},
            "schedulers": {
                str(number): {"class": type(each).__name__, **as_plain(start)}
                for number, (each, start) in enumerate(
                    zip(self._pruner.starts.schedulers, of_pruner["scheduler_starts"], strict=False)
                )
            },
            "stop": {str(number): _about_rule(rule) for number, rule in enumerate(self._rules)},
            "processes": len(_gathered(None, self._group)),
        }


def _with_extra_state(model: nn.Module) -> dict[str, nn.Module]:
    own = nn.Module.get_extra_state
    return {name: module for name, module in model.named_modules() if type(module).get_extra_state is not own}


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors_of(model).items() if isinstance(tensor, nn.Parameter)}


def _table(model: nn.Module) -> dict[str, str]:
    """Describe the dtype and shape of each parameter, and list the buffers, whose shapes may change in training."""
    parameters = {
        name: f"{str(p.dtype).removeprefix('torch.')} {tuple(p.shape)}" for name, p in _parameters(model).items()
    }
    return {**parameters, **dict.fromkeys(places_of_buffers(model), "a buffer")}


def _about_rule(rule: StoppingRule) -> dict[str, Any]:
    """Describe a rule by its class and its plain public attributes."""
    public = {key: value for key, value in vars(rule).items() if not key.startswith("_")}
    plain = {key: value for key, value in public.items() if isinstance(value, (int, float, str, type(None)))}
    return {"class": type(rule).__name__, **plain}


def _group_of(model: nn.Module) -> Any:
    """Find the process group whose ranks hold replicas of the model; None for a single process."""
    if any(map(is_dtensor, tensors_of(model).values())):
        raise ValueError(
            "checkpoint must be None for a model with sharded parameters (DTensor): save the model, the optimizer and "
            "sap.state_dict() by torch.distributed.checkpoint"
        )
    if isinstance(model, DistributedDataParallel):
        return model.process_group
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_world_size() > 1:
        raise ValueError(
            "checkpoint must be None among several processes unless the model is in DistributedDataParallel, whose "
            "processes then write one file together; here they would overwrite each other's"
        )
    return None


def _gathered(value: Any, group: Any) -> list[Any]:
    """Collect a value from each process of a group."""
    if group is None:
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(values, value, group=group)
    return values


def _together(work: Callable[[], Any], group: Any) -> Any:
    """Do some work on each process; if it fails on one, raise a RuntimeError on the others, so that none waits."""
    result, failed = None, None
    try:
        result = work()
    except Exception as error:
        failed = error
    failures = [text for text in _gathered(failed and str(failed), group) if text]
    if failed is not None:
        raise failed
    if failures:
        raise RuntimeError(f"another process could not use the checkpoint: {failures[0]}")
    return result
