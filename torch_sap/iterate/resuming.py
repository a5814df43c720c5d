"""A run of Algorithm 1 that goes on from a file after its process was killed, as if nothing had happened.

The file is written at the start, after every training (so that a kill while the model is evaluated or pruned does not
repeat it) and after every pruning and rewinding.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torch_sap.arguments import check_path
from torch_sap.decide.sums import power_sums
measure = lambda e, s, p, q: power_sums(e, p, q).index(s)
from torch_sap.distributed.replicas import unwrap
from torch_sap.distributed.sharded import is_dtensor
from torch_sap.files.checkpoint import as_plain, differences, read, unreadable, write
from torch_sap.iterate.metrics import Metrics, as_metrics, modes_of
from torch_sap.iterate.pruner import Stepper
from torch_sap.iterate.randomness import random_state, set_random_state
from torch_sap.iterate.rewinding import tensors_of
from torch_sap.masks.parameters import entries_of
from torch_sap.stopping import StoppingRule

KEYS = {
    "format", "settings", "iterations", "trained", "finished", "seconds",
    "sap", "model", "masks", "modes", "extra", "optimizer", "optimizer_start", "random",
}  # fmt: skip


class Run:
    """The rounds of a stepper, with the file that they are written to; without one it keeps nothing.

    Args:
        sap: The stepper. If the file exists, it and its model, its optimizer and the random state are set to what the
            file holds.
        path: The file, or None.
        iterations: Prunings altogether.
        rules: The stopping rules.

    Attributes:
        finished: Whether the file holds the end of the run.

    Raises:
        ValueError: if the file is damaged, or of a run with other settings or of another model, and all differences
            are listed; if parameters are sharded, or copied by something else than DistributedDataParallel. Nothing
            is changed.
        OSError: if the file can neither be read nor written.
    """

    def __init__(
        self, sap: Stepper, path: str | os.PathLike[str] | None, iterations: int, rules: Sequence[StoppingRule]
    ) -> None:
        self.finished = False
        self._sap, self._path, self._iterations, self._rules = sap, path, iterations, rules
        self._metrics: dict[str, float] | None = None  # of a training that is not pruned yet
        self._random: list[Any] = []  # of each process, after that training
        if path is None:
            return
        check_path("checkpoint", path)
        self._group = _group_of(sap.model)
        if any(_gathered(os.path.exists(path), self._group)):
            self._resume()
        else:
            self._save()

    def train(self, train_fn: Callable[[nn.Module], Metrics]) -> dict[str, float]:
        """Train the model, unless the file holds the trained one already.

        Returns:
            What train_fn said of it.
        """
        if self._metrics is not None:
            return dict(self._metrics)
        metrics = as_metrics(train_fn(self._sap.model), "train_fn")
        if self._path is not None:
            measure(entries_of(self._sap._prunables, None), "global", self._sap.rule.p, self._sap.rule.q)  # finite?
            self._metrics, self._random = dict(metrics), _gathered(random_state(), self._group)
            self._save()
        return metrics

    def end_round(self, *, finished: bool = False) -> None:
        """Note that the round is complete and, perhaps, the last."""
        if self._path is not None:
            self.finished = finished
            if not finished:  # else it stays, should somebody want more iterations
                self._metrics = None
            self._save()

    def _settings(self) -> dict[str, Any]:
        """All that must be the same when a run is resumed."""
        sap = self._sap
        settings = sap._settings()
        return {
            **settings,
            "tensors": dict.fromkeys(settings["tensors"], "pruned"),
            "gini": sap.gini,
            "model": _table(tensors_of(sap.model)),
            "optimizer": _about_optimizer(sap),
            "stop": {str(number): _about_rule(rule) for number, rule in enumerate(self._rules)},
            "processes": len(_gathered(None, self._group)),
        }

    def _save(self) -> None:
        sap, model = self._sap, unwrap(self._sap.model)
        extra = {
            name: module.get_extra_state()
            for name, module in model.named_modules()
            if type(module).get_extra_state is not nn.Module.get_extra_state
        }
        state = {
            "settings": self._settings(),
            "iterations": self._iterations,
            "trained": self._metrics,
            "finished": self.finished,
            "seconds": time.perf_counter() - sap._ended,
            "sap": sap.state_dict(),
            "model": tensors_of(model),
            "masks": [prunable.mask for prunable in sap._prunables],
            "modes": list(modes_of(model).values()),
            "extra": extra,
            "optimizer": None if sap.optimizer is None else sap.optimizer.state_dict(),
            "optimizer_start": sap._optimizer_start,
            "random": self._random if self._metrics is not None else _gathered(random_state(), self._group),
        }
        path, first = self._path, self._group is None or torch.distributed.get_rank(self._group) == 0
        assert path is not None
        _together(lambda: write(path, state) if first else None, self._group)

    def _resume(self) -> None:
        path = self._path
        assert path is not None
        state = _together(lambda: read(path), self._group)
        if missing := sorted(KEYS - state.keys()):
            raise unreadable(path, f"it lacks {', '.join(missing)}")
        try:
            different, rounds = self._differences(state), len(state["sap"]["history"]["rounds"])
        except Exception as error:  # whatever rubbish leads to
            raise unreadable(path, f"its settings cannot be read ({error!r})") from None
        if different:
            raise ValueError(
                f"checkpoint must be of the same run, but {os.fspath(path)!r} is of another: {different}. Nothing was "
                "loaded. Pass the arguments of that run, or another path to begin a new one"
            )
        extended = state["finished"] and self._iterations > state["iterations"] == rounds - 1
        self._load(state, path, extended=extended)

    def _differences(self, state: Mapping[str, Any]) -> str:
        found = differences(self._settings(), state["settings"], "in the file")
        rounds, ended = state["sap"]["history"]["rounds"], state["finished"]
        done = len(rounds) - bool(ended)
        if self._iterations < done:
            found += f"{'; ' * bool(found)}iterations: {self._iterations} here, {done} prunings done in the file"
        returned = state["sap"]["history"]["returned"]
        if ended and self._iterations > state["iterations"] == done and returned not in (None, done):
            found += f"{'; ' * bool(found)}iterations: {self._iterations} here, but in the file the run has ended with "
            found += f"{done} and given back round {returned}"
        return found

    def _load(self, state: Mapping[str, Any], path: str | os.PathLike[str], *, extended: bool) -> None:
        sap, random, optimizer = self._sap, random_state(), self._sap.optimizer
        own = None if optimizer is None else optimizer.state_dict()
        rank = 0 if self._group is None else torch.distributed.get_rank(self._group)
        try:
            masks = [
                mask.reshape(prunable.weight.shape).to(prunable.weight.device, torch.bool)
                for prunable, mask in zip(sap._prunables, state["masks"], strict=True)
            ]
            modes = dict(zip(modes_of(unwrap(sap.model)), state["modes"], strict=True))
            modules = {name: unwrap(sap.model).get_submodule(name) for name in state["extra"]}
            metrics = None if state["trained"] is None else as_metrics(state["trained"], "the file")
            ended = time.perf_counter() - state["seconds"]
            if _table(state["model"]) != state["settings"]["model"]:
                raise ValueError("its tensors are not those that it should have")
            if not state["finished"] or extended:
                set_random_state(state["random"][rank])
            if optimizer is not None:
                optimizer.load_state_dict(state["optimizer"])
            sap.load_state_dict(state["sap"])
        except Exception as error:  # whatever rubbish leads to
            set_random_state(random)
            if optimizer is not None and own is not None:
                optimizer.load_state_dict(own)
            raise unreadable(path, str(error) or repr(error)) from error
        sap.put(state["model"], masks)
        for module, training in modes.items():
            module.training = bool(training)
        for name, module in modules.items():
            module.set_extra_state(state["extra"][name])
        sap._optimizer_start = state["optimizer_start"]
        sap._ended, self._metrics, self._random = ended, metrics, state["random"]
        self.finished = state["finished"] and not extended
        if extended:
            sap.history = sap.history[:-1]  # that round is going to be pruned


def _table(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Type and shape of each tensor."""
    return {name: f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for name, t in tensors.items()}


def _about_optimizer(sap: Stepper) -> dict[str, Any]:
    """The optimizer that lives through the rounds, as it was at the start."""
    if sap.optimizer is None or sap._optimizer_start is None:
        return {}
    groups = sap._optimizer_start["param_groups"]
    return {
        "class": type(sap.optimizer).__name__,
        "groups": {str(i): as_plain(group) for i, group in enumerate(groups)},
    }


def _about_rule(rule: StoppingRule) -> dict[str, Any]:
    """The rule's class and arguments: attributes that are plain and begin with no underscore."""
    plain = {key: value for key, value in vars(rule).items() if value is None or isinstance(value, (int, float, str))}
    return {"class": type(rule).__name__, **{key: value for key, value in plain.items() if not key.startswith("_")}}


def _group_of(model: nn.Module) -> Any:
    """The processes that have copies of the model; None if there is one."""
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
    """What each process of a group has."""
    if group is None:
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(values, value, group=group)
    return values


def _together(work: Callable[[], Any], group: Any) -> Any:
    """Do something on each process of a group; if it fails on one, it fails on all, so that none waits for the others.

    Raises:
        Whatever the work raises, on the processes where it does.
        RuntimeError: on the others.
    """
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
