"""What every torch.optim optimizer does with pruned weights: their zeros are there after each of its steps.

They are restored after the step, and in the optimizer's state (momentum from before the pruning) once. Where it is
known that a step moves no zero, it is let be: SGD, Adam and AdamW change an entry by its own gradient, state and value
alone, so nothing becomes of zeros.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from torch_sap.masks.stamps import Stamp
from torch_sap.masks.zeros import Holder, hold_together, restore_zeros_

KEEP_ZEROS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


class Held(Holder, Protocol):
    """A pruned weight, as this module sees it."""

    state: Stamp | None
    """Of the mask and the optimizer's state when the latter had its zeros."""

    def tensors(self) -> list[Tensor]:
        """The tensors that an optimizer may have of the weight."""

    def known_zeros(self) -> tuple[Tensor, Tensor] | None:
        """Weight and mask, if the weight and its gradient are known to be zero at the pruned entries."""

    def after_step(self, known: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        """Note that the zeros are there still if the step was known to keep them, or return what to restore."""


_held: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_stepping: weakref.WeakKeyDictionary[Optimizer, list[tuple[Held, Tensor, Any]]] = weakref.WeakKeyDictionary()
"""The pruned weights of the optimizers that take a step now, each with what :meth:`Held.known_zeros` said before."""


def watch(held: Held) -> None:
    """Look after a weight in the steps of all optimizers from now on."""
    held.state = None
    _held[id(held)] = held


def unwatch(held: Held) -> None:
    """Let it be."""
    _held.pop(id(held), None)


def _held_in(optimizer: Optimizer) -> Iterator[tuple[Held, Tensor, dict[str, Any]]]:
    """The pruned weights of an optimizer, with the tensor that it has and the group that this is in."""
    groups = {id(tensor): group for group in optimizer.param_groups for tensor in group["params"]}
    for reference in _held.valuerefs():
        held: Held | None = reference()
        for tensor in held.tensors() if held is not None else ():
            if held is not None and (group := groups.get(id(tensor))) is not None:
                yield held, tensor, group
                break


def _state_of(optimizer: Optimizer, weight: Tensor) -> list[Tensor]:
    """What an optimizer keeps for each entry of a weight."""
    kept, shape = optimizer.state.get(weight, {}), weight.shape
    return [value for value in kept.values() if isinstance(value, Tensor) and value.shape == shape]


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    _stepping.pop(optimizer, None)  # of a step that failed
    closure = args[1:] or kwargs  # args[0] is the optimizer; a closure may change what is known here
    hooked = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks  # they run within the step too
    if not _held or type(optimizer) not in KEEP_ZEROS or closure or hooked:
        return
    stepping = []
    for held, weight, group in _held_in(optimizer):
        known = held.known_zeros() if group.get("eps", 1.0) > 0 else None
        if known is not None:
            mask, state = known[1], _state_of(optimizer, weight)
            if held.state is None or not held.state.holds(mask, *state):
                for tensor in state:
                    restore_zeros_(tensor, mask)
        stepping.append((held, weight, known))
    _stepping[optimizer] = stepping


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not _held:
        return
    stepping = _stepping.pop(optimizer, None)
    if stepping is None:
        stepping = [(held, weight, None) for held, weight, _ in _held_in(optimizer)]
    hold_together([(held, held.after_step(known)) for held, _, known in stepping])
    for held, weight, known in stepping:
        held.state = Stamp(known[1], *_state_of(optimizer, weight)) if known is not None else None


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)


def check_optimizer(optimizer: Any, model: nn.Module) -> None:
    """Refuse what is not the optimizer of a model; None is fine.

    Raises:
        TypeError: if it is no optimizer.
        ValueError: if it holds no parameter of the model.
    """
    if optimizer is None:
        return
    if not hasattr(optimizer, "state") or not hasattr(optimizer, "param_groups"):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    own = set(map(id, model.parameters()))
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError(
            "optimizer must hold parameters of the model, but holds none of them: make it from model.parameters()"
        )
