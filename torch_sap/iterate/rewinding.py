"""The state of a model at one moment, and the way back to it: parameters and buffers, by copy."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_sap.distributed.fsdp import reshard
from torch_sap.distributed.replicas import unwrap
from torch_sap.distributed.sharded import place
from torch_sap.masks.parameters import Prunable
from torch_sap.masks.zeros import restore_zeros_

State = dict[str, Tensor]
Rewind = Literal["init", "none"] | Mapping[str, Tensor]


def snapshot(model: nn.Module) -> State:
    """Copies of all parameters and buffers (batch-norm statistics too) but for masks, by their names before pruning."""
    with torch.no_grad():
        return {name: tensor.detach().clone() for name, tensor in tensors_of(model).items()}


def restore(model: nn.Module, state: Mapping[str, Tensor], prunables: Sequence[Prunable]) -> None:
    """Copy a state into a model, in place; pruned entries become zeros."""
    with torch.no_grad():
        for name, tensor in tensors_of(model).items():
            if name in state:
                tensor.copy_(state[name])
        restore_zeros_([(p.weight, mask) for p in prunables if (mask := p.mask) is not None])


def anew(optimizer: Optimizer, start: Mapping[str, Any]) -> dict[str, Any]:
    """What an optimizer is to load in order to start anew with the learning rate of now.

    Its state is not just cleared: some fill it when they are made. Copied, because the optimizer writes into what it
    loads.
    """
    return {**optimizer.state_dict(), "state": copy.deepcopy(start["state"])}


def rewind_point(model: nn.Module, rewind: Rewind) -> State | None:
    """What the argument ``rewind`` asks for: a copy of the model as it is, of a state_dict, or nothing.

    Raises:
        ValueError, TypeError: as :func:`check_state` does, and for another word.
    """
    if not isinstance(rewind, str):
        return check_state(model, rewind)
    if rewind not in ("init", "none"):
        raise ValueError(f'rewind must be "init", "none" or a state_dict, got rewind={rewind!r}')
    return snapshot(model) if rewind == "init" else None


def check_state(model: nn.Module, state: Mapping[str, Tensor]) -> State:
    """Copies of a state_dict's tensors by their names before pruning, if they fit a model.

    Args:
        model: The model that the state has to fit.
        state: A state_dict of the model, from before or after it was pruned.

    Raises:
        TypeError: if the state is no mapping to tensors.
        ValueError: if tensors are missing, unknown or of another shape.
    """
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        found = type(state).__name__ if isinstance(state, Mapping) else repr(state)
        raise TypeError(f'rewind must be "init", "none" or a state_dict of tensors, got {found}')
    masks = {
        key.removesuffix("_mask")
        for key in state
        if key.endswith("_mask") and key.removesuffix("_mask") + "_orig" in state
    }
    plain = {
        key.removesuffix("_orig") if key.removesuffix("_orig") in masks else key: value
        for key, value in state.items()
        if not (key.endswith("_mask") and key.removesuffix("_mask") in masks)
    }
    if unwrap(model) is not model:  # names are those inside DistributedDataParallel
        plain, model = {key.removeprefix("module."): value for key, value in plain.items()}, unwrap(model)
    own = tensors_of(model)
    every = {_plain_name(model, key) for key in model.state_dict()} | set(own)
    persistent = {_plain_name(model, key) for key in model.state_dict()} & set(own)
    missing, unknown = sorted(persistent - set(plain)), sorted(set(plain) - every)
    if missing or unknown:
        raise ValueError(f"rewind must be a state_dict of the model, but lacks {missing} and has unknown {unknown}")
    for key in own.keys() & plain.keys():
        if own[key].shape != plain[key].shape:
            raise ValueError(
                f"rewind must be a state_dict of the model, but {key} has shape {tuple(plain[key].shape)}, "
                f"not {tuple(own[key].shape)}"
            )
    return {key: place(value.detach(), like=own[key]).clone() for key, value in plain.items() if key in own}


def tensors_of(model: nn.Module) -> State:
    """Parameters and buffers by their names before pruning, without masks, each once."""
    found: State = {}
    model = unwrap(model)
    reshard(model.modules())
    named = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in named:
        if not _is_mask(model, name):
            found[_plain_name(model, name)] = tensor
    return found


def _split(model: nn.Module, name: str) -> tuple[nn.Module | None, str]:
    path, _, last = name.rpartition(".")
    try:
        return model.get_submodule(path), last
    except AttributeError:  # an entry of a custom state_dict that is no tensor of a module
        return None, last


def _is_mask(model: nn.Module, name: str) -> bool:
    module, last = _split(model, name)
    return module is not None and last.endswith("_mask") and last.removesuffix("_mask") + "_orig" in module._parameters


def _plain_name(model: nn.Module, name: str) -> str:
    module, last = _split(model, name)
    pruned = module is not None and last.endswith("_orig") and last.removesuffix("_orig") + "_mask" in module._buffers
    return name.removesuffix("_orig") if pruned else name
