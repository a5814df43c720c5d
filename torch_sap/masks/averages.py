"""Averages of weights by ``torch.optim.swa_utils.AveragedModel`` have the masks of the model that they average.

With ``use_buffers=True`` AveragedModel averages masks as it does statistics, and a bool mask that is False only here
and there becomes True everywhere. An average made before the first pruning has no masks at all. PyTorch offers no hook,
so its method is wrapped: masks are copied, whatever the rule of the average is, and get there if they are missing.
Subclasses that call the method, such as torchvision's ``ExponentialMovingAverage``, have it too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from torch_sap.masks.guards import guard
from torch_sap.masks.mask import InPlaceMask, hold_mask

_update: Any = AveragedModel.update_parameters

_Masks = list[tuple[nn.Module, str]]
"""Modules, and the names of their mask buffers."""


@wraps(_update)
def _update_parameters(self: AveragedModel, model: nn.Module) -> None:
    sources = _masks_of(model)
    if not sources:
        _update(self, model)
        return
    with torch.no_grad():
        pairs = _pair(self.module, model, sources)
    with _hidden([place for pair in pairs for place in pair] if self.use_buffers else []):
        _update(self, model)
    with torch.no_grad():
        for (module, name), (source, its_name) in pairs:
            _buffer(module, name).copy_(_buffer(source, its_name))


def _masks_of(model: nn.Module) -> dict[int, _Masks]:
    """The masks that torch_sap holds in a model, by the identity of their weights, which several modules may share."""
    found: dict[int, _Masks] = {}
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, InPlaceMask) and (pair := hook.find()) is not None:
                found.setdefault(id(pair[0]), []).append((module, hook._tensor_name + "_mask"))
    return found


def _pair(average: nn.Module, model: nn.Module, sources: dict[int, _Masks]) -> list[tuple[Any, Any]]:
    """Pair the masks of an average, which gets those that it lacks, with the masks of its model."""
    holders: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, module in average.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((path, module, key))
    pairs: list[tuple[Any, Any]] = []
    is_new = False
    for mean, weight in zip(average.parameters(), model.parameters(), strict=False):
        for path, module, key in holders[id(mean)] if id(weight) in sources and mean.shape == weight.shape else ():
            name = key.removesuffix("_orig")
            if name + "_mask" not in module._buffers:
                ones = torch.ones_like(mean, dtype=torch.bool, requires_grad=False)
                hold_mask(module, name := key, ones, f"{path}.{key}".removeprefix("."))
                is_new = True
            pairs.append(((module, name + "_mask"), sources[id(weight)][0]))
    if is_new:
        guard(average)
    return pairs


@contextmanager
def _hidden(masks: _Masks) -> Iterator[None]:
    """Take masks out of ``buffers()``; their places are kept."""
    kept = [(module, name, module._buffers[name]) for module, name in masks]
    try:
        for module, name in masks:
            module._buffers[name] = None
        yield
    finally:
        for module, name, mask in kept:
            module._buffers[name] = mask


def _buffer(module: nn.Module, name: str) -> Tensor:
    mask = module._buffers[name]
    assert mask is not None
    return mask


AveragedModel.update_parameters = _update_parameters  # type: ignore[method-assign]
