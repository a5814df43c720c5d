"""Small tensors on the CPU, where calls and lookups take the time: many of one shape are restored in a few calls.

:class:`Small` looks up the weights and masks of many keepers at once. It keeps what it found the last time, and each
time compares that with what the modules hold now: the same objects, or all is looked up anew.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise, repeat
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from torch_sap.decide.keys import INTEGER_OF

SIZE, FEW, MANY = 2**10, 8, 2**7
"""Entries up to which a tensor is small, and how many of a shape and type are stacked at least, and at once."""

Pair = tuple[Tensor, Tensor]
"""A tensor and its bool mask."""

_AUTOGRAD = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradCPU)
_AUTOGRAD = _AUTOGRAD | torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)

_ZEROS = {dtype: torch.zeros((), dtype=dtype, device="cpu") for dtype in INTEGER_OF}


def restore_small_(pairs: Sequence[Pair]) -> None:
    """Restore the zeros of small CPU tensors of one shape and type."""
    if len(pairs) < FEW:
        for tensor, mask in pairs:
            torch.where(mask, data := tensor.data, _ZEROS[tensor.dtype], out=data)
        return
    for start in range(0, len(pairs), MANY):
        tensors, masks = map(list, zip(*pairs[start : start + MANY], strict=True))
        _restore_stacked(tensors, masks)


def _restore_stacked(tensors: list[Tensor], masks: list[Tensor]) -> None:
    with torch.no_grad(), torch._C._ExcludeDispatchKeyGuard(_AUTOGRAD):  # as ``.data`` of each, in less time
        stacked, of_all = torch.stack(tensors), torch.stack(masks)
        if stacked.shape != of_all.shape:
            raise RuntimeError(f"masks of {tuple(of_all.shape[1:])} for tensors of {tuple(stacked.shape[1:])}")
        stacked.view(INTEGER_OF[stacked.dtype]).mul_(of_all)
        torch.unbind_copy(stacked, out=tensors)


class Changes:
    """Counts what may make a :class:`Small` wrong without changing an object that it compares."""

    count = 0


class Small:
    """The weights and masks of those of some keepers that have small tensors, enough of one shape and type each.

    It holds the tensors, but not the modules, whose end drops it (:func:`torch_sap.masks.zeros.forget`).
    """

    def __init__(self, keepers: Iterable[Any]) -> None:
        self._made = Changes.count
        alike: dict[Any, list[Any]] = defaultdict(list)
        for keeper in keepers:
            pair = None if keeper.sharded else keeper.find()
            if pair is not None and keeper.weight is pair[0] and keeper.masks_gradient and _is_small(*pair):
                alike[pair[0].shape, pair[0].dtype].append(keeper)
        groups = [group for group in alike.values() if len(group) >= FEW]
        self.keepers = [keeper for group in groups for keeper in group]
        ends = [0]
        for group in groups:
            ends += [ends[-1] + start for start in range(MANY, len(group), MANY)] + [ends[-1] + len(group)]
        self._parts = [slice(*part) for part in pairwise(ends)]
        modules = [keeper.module for keeper in self.keepers]
        self._parameters = [module._parameters for module in modules]
        self._buffers = [module._buffers for module in modules]
        self._keys = [keeper._weight_key for keeper in self.keepers]
        self._mask_keys = [keeper._mask_key for keeper in self.keepers]
        self.weights = [of_module[key] for of_module, key in zip(self._parameters, self._keys, strict=True)]
        self.masks = [of_module[key] for of_module, key in zip(self._buffers, self._mask_keys, strict=True)]

    def holds(self) -> bool:
        """Whether the modules have the same weights and masks."""
        return (
            self._made == Changes.count
            and all(map(is_, map(dict.get, self._parameters, self._keys), self.weights))
            and all(map(is_, map(dict.get, self._buffers, self._mask_keys), self.masks))
        )

    def restore(self, tensors: list[Any]) -> bool:
        """Restore the zeros of tensors with the masks; False if that cannot be done with all of them."""
        if not self.holds() or any(map(is_, tensors, repeat(None))):
            return False
        try:
            for part in self._parts:
                _restore_stacked(tensors[part], self.masks[part])
        except (RuntimeError, KeyError):  # whoever goes tensor by tensor says why
            return False
        return True


class Attached(Small):
    """The same for a forward, which also wants the modules to read the weights, and their gradients to be masked."""

    def __init__(self, keepers: Iterable[Any]) -> None:
        super().__init__(keepers)
        self._modules = [keeper.module.__dict__ for keeper in self.keepers]
        self._names = [keeper._tensor_name for keeper in self.keepers]
        self._of_weights = [weight.__dict__ for weight in self.weights]

    def holds(self) -> bool:
        """Whether nothing that matters has changed; swap_tensors takes the hook of the gradient and the dict away."""
        self._parameters = list(map(dict.get, self._modules, repeat("_parameters")))
        self._buffers = list(map(dict.get, self._modules, repeat("_buffers")))
        return (
            super().holds()
            and all(map(is_, map(dict.get, self._modules, self._names), self.weights))
            and all(map(is_, map(attrgetter("__dict__"), self.weights), self._of_weights))
        )


def _is_small(weight: Tensor, mask: Tensor) -> bool:
    return (
        type(weight) is nn.Parameter
        and type(mask) is Tensor
        and weight.is_cpu
        and mask.is_cpu
        and weight.dtype in INTEGER_OF
        and weight.shape == mask.shape
        and weight.numel() <= SIZE
    )
