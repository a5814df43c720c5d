"""Copy the states of an optimizer and its schedulers at one moment, the start, and set them back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_sap.masks.zeros import check_optimizer


@runtime_checkable
class Stateful(Protocol):
    """What has a state: optimizers, schedulers of PyTorch, timm and others."""

    def state_dict(self) -> dict[str, Any]:
        """Collect the state."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Set the state."""
        ...


Start = dict[str, Any]
"""A copy of a state_dict that shares nothing with its owner."""


class Starts:
    """An optimizer and its schedulers, whatever there is of them, and the states that rewinding sets them back to.

    A start that :meth:`load` has brought before its owner was there is kept for the owner that :meth:`attach` brings.
    """

    def __init__(self, optimizer: Optimizer | None, schedulers: list[Any]) -> None:
        self.optimizer, self.schedulers = optimizer, schedulers
        self._optimizer: Start | None = None if optimizer is None else start_of(optimizer)
        self._schedulers: list[Start] = [start_of(each) for each in schedulers]
        self._awaited: set[str] = set()  # what load brought a start of, and attach has not brought yet

    def attach(
        self, model: nn.Module, optimizer: Optimizer | None, scheduler: Stateful | Iterable[Stateful] | None
    ) -> None:
        """Take an optimizer or schedulers in place of those before, with the states that they have now.

        Errors are those of :meth:`Pruner.attach`; nothing is changed then.
        """
        check_optimizer(optimizer, model)
        schedulers = as_schedulers(scheduler, self.optimizer if optimizer is None else optimizer)
        if "scheduler" in self._awaited:
            _check_number(self._schedulers, schedulers)
        if optimizer is not None:
            self.optimizer, self.schedulers = optimizer, []
            if "scheduler" not in self._awaited:
                self._schedulers = []
            if "optimizer" not in self._awaited:
                self._optimizer = start_of(optimizer)
            self._awaited.discard("optimizer")
        if schedulers:
            self.schedulers = schedulers
            if "scheduler" not in self._awaited:  # the rates of its start are those that it has set by now
                self._schedulers = [start_of(each) for each in schedulers]
                assert self._optimizer is not None
                self._optimizer = _with_present_groups(self._optimizer, self.optimizer)
            self._awaited.discard("scheduler")

    def resetters(self) -> list[Callable[[], None]]:
        """Prepare to set all of them back."""
        if self.optimizer is None or self._optimizer is None:
            return []
        pairs = zip(self.schedulers, self._schedulers, strict=True) if self.schedulers else ()
        return [resetter(*pair) for pair in ((self.optimizer, self._optimizer), *pairs)]

    def state(self) -> dict[str, Any]:
        """The starts, as items of a pruner's state_dict."""
        return {"optimizer_start": self._optimizer, "scheduler_starts": list(self._schedulers)}

    def check(self, state: Mapping[str, Any]) -> None:
        """Raise a ValueError unless :meth:`load` can load this."""
        _check_number(state["scheduler_starts"], self.schedulers)

    def load(self, state: Mapping[str, Any]) -> None:
        """Set the starts to those of a pruner's state_dict that has any."""
        if state["optimizer_start"] is not None:
            self._optimizer = copy.deepcopy(dict(state["optimizer_start"]))
            self._awaited |= {"optimizer"} if self.optimizer is None else set()
        if state["scheduler_starts"]:
            self._schedulers = copy.deepcopy([dict(start) for start in state["scheduler_starts"]])
            self._awaited |= set() if self.schedulers else {"scheduler"}


def start_of(owner: Stateful) -> Start:
    """Copy the present state."""
    return copy.deepcopy(dict(owner.state_dict()))


def _with_present_groups(start: Start, optimizer: Any) -> Start:
    """The start of an optimizer, with the learning rates and other hyperparameters that its groups have now."""
    now = optimizer.state_dict()
    return {**start, "param_groups": copy.deepcopy(now["param_groups"])} if "param_groups" in now else start


def resetter(owner: Any, start: Start) -> Callable[[], None]:
    """Prepare to set an optimizer or a scheduler back to its start. Calling the result twice is the same as once.

    An optimizer gets back its state (momentum, averages) and the hyperparameters of its groups: ``lr``, and whatever
    else a schedule moves. PyTorch's schedulers leave ``initial_lr`` behind, from which the next scheduler would start:
    it goes if it was not there. Other keys that were added since then stay, as do groups, without their state: whoever
    added them reads them.
    """
    fresh = copy.deepcopy(start)
    if not isinstance(fresh.get("param_groups"), list):  # a scheduler, or an optimizer of another kind
        return lambda: owner.load_state_dict(fresh)
    now, numbers = copy.deepcopy(owner.state_dict()), {}  # type: ignore[var-annotated]
    for group, first in zip(now["param_groups"], fresh["param_groups"], strict=False):
        numbers |= dict(zip(first["params"], group["params"], strict=False))
        group |= {key: value for key, value in first.items() if key not in ("params", "param_names")}
        if "initial_lr" not in first:
            group.pop("initial_lr", None)
    state = {numbers.get(key, key): value for key, value in fresh["state"].items()}
    whole = {**now, **fresh, "param_groups": now["param_groups"], "state": state}
    before = [dict(group) for group in owner.param_groups]

    def reset() -> None:
        owner.load_state_dict(whole)
        with torch.no_grad():
            for group, old in zip(owner.param_groups, before, strict=True):
                for key, value in old.items():  # a learning rate that is a tensor stays the same object
                    if isinstance(value, Tensor) and isinstance(group.get(key), Tensor):
                        group[key] = value.copy_(group[key])

    return reset


def as_schedulers(scheduler: Stateful | Iterable[Stateful] | None, optimizer: Any) -> list[Any]:
    """List the schedulers of an optimizer.

    Raises:
        TypeError: if one has no state_dict and load_state_dict.
        ValueError: if there is no optimizer, or one belongs to another.
    """
    if scheduler is None:
        return []
    schedulers = list(scheduler) if isinstance(scheduler, (list, tuple)) else [scheduler]
    for each in schedulers:
        if isinstance(each, type) or not isinstance(each, Stateful):
            name = each.__name__ if isinstance(each, type) else type(each).__name__
            raise TypeError(f"scheduler must have state_dict and load_state_dict, or be a list of such, got {name}")
    if schedulers and optimizer is None:
        raise ValueError(
            "scheduler must come with its optimizer, whose learning rates are set back too, got optimizer=None"
        )
    own = _parameters(optimizer)
    for each in schedulers:
        moved = getattr(each, "optimizer", None)
        if hasattr(moved, "param_groups") and not own & _parameters(moved):
            raise ValueError(
                f"scheduler must belong to the optimizer, but this {type(each).__name__} moves the learning rates of "
                "another one: pass the optimizer that it was made with"
            )
    return schedulers


def _check_number(starts: Any, schedulers: list[Any]) -> None:
    """Raise a ValueError unless there is one start per scheduler, or none of one of them."""
    if starts and schedulers and len(starts) != len(schedulers):
        raise ValueError(
            f"scheduler must be as many schedulers as the state has, {len(starts)}, got {len(schedulers)}; give those "
            "that the state was made with"
        )


def is_starts(value: Any) -> bool:
    """Whether this is a list of states, as of :meth:`Pruner.state_dict`."""
    return isinstance(value, list) and all(isinstance(each, Mapping) for each in value)


def _parameters(optimizer: Any) -> set[int]:
    groups = [] if optimizer is None else optimizer.param_groups
    return {id(parameter) for group in groups for parameter in group["params"]}
