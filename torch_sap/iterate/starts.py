"""Copy the state of an optimizer or a scheduler at one moment, the start, and set it back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


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


def start_of(owner: Stateful) -> Start:
    """Copy the present state."""
    return copy.deepcopy(dict(owner.state_dict()))


def with_present_groups(start: Start, optimizer: Any) -> Start:
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


def check_starts(starts: Any, schedulers: list[Any]) -> None:
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
