"""Copy a model's state at one moment (parameters, buffers, modes), and restore it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

from torch_sap.arguments import some
from torch_sap.decide.keys import is_expanded
from torch_sap.distributed.fsdp import reshard
from torch_sap.distributed.replicas import unwrap
from torch_sap.distributed.sharded import local, place
from torch_sap.masks.mask import hold_masks
from torch_sap.masks.parameters import Prunable, has_mask

State = dict[str, Tensor | None]
"""Parameters and buffers; a buffer may be None."""
Rewind = Literal["init", "none"] | Mapping[str, Tensor]


def snapshot(model: nn.Module) -> State:
    """Copy all parameters and buffers except masks, by their names before pruning."""
    with torch.no_grad():
        return {name: value if value is None else value.detach().clone() for name, value in state_of(model).items()}


def state_of(model: nn.Module) -> State:
    """Collect parameters, and buffers even if they are None, as :func:`tensors_of` does."""
    empty = {name: None for name, (buffers, key) in places_of_buffers(model).items() if buffers[key] is None}
    return {**tensors_of(model), **empty}


def places_of_buffers(model: nn.Module) -> dict[str, tuple[dict[str, Tensor | None], str]]:
    """Where each buffer is, masks left out: the dict of its module, and its key there."""
    model = unwrap(model)
    named = [(path, module._buffers) for path, module in model.named_modules()]
    found = {f"{path}.{key}".removeprefix("."): (buffers, key) for path, buffers in named for key in buffers}
    return {name: place for name, place in found.items() if _plain_name(model, name) is not None}


def copier(
    model: nn.Module,
    state: Mapping[str, Tensor | None] | None,
    prunables: Sequence[Prunable],
    masks: Sequence[Tensor | None],
) -> Callable[[], None]:
    """Prepare to give a model masks, with zeros at pruned entries, and a state (None: leave its values).

    Everything that can fail happens here. The function that is returned only copies: pass it to ``mask.finish``.
    A buffer that is or was None, or has another shape than in the state, as of an observer that has met its first
    data, is replaced, and so is an expanded one, into which nothing can be copied.

    Raises:
        RuntimeError: if a parameter has another shape than in the state.
    """
    with torch.no_grad():
        whole = [prunable.whole(mask) for prunable, mask in zip(prunables, masks, strict=True)]
    present, places, device = tensors_of(model), places_of_buffers(model), prunables[0].weight.device
    copied = []
    new: dict[int, Tensor] = {}  # by the identity of what it replaces: several modules may have one buffer
    replaced: list[tuple[dict[str, Tensor | None], str, Tensor | None]] = []
    for name, value in (state or {}).items():
        tensor = present.get(name)
        if value is None or tensor is None:
            if name in places:
                replaced.append((*places[name], None if value is None else value.to(device, copy=True)))
        elif tensor.shape == value.shape and not is_expanded(local(tensor)):
            copied.append((tensor, value))
        elif not isinstance(tensor, nn.Parameter):
            new[id(tensor)] = value.to(tensor.device, tensor.dtype, copy=True)
        elif tensor.shape != value.shape:
            raise RuntimeError(
                f"{name} must keep its shape {tuple(value.shape)} to be set back to its start, but has "
                f"{tuple(tensor.shape)} now; make a new pruner after resizing a parameter"
            )
    replaced += [(buffers, key, new[id(buffers[key])]) for buffers, key in places.values() if id(buffers[key]) in new]

    def copy() -> None:
        for buffers, key, buffer in replaced:
            buffers[key] = buffer
        with torch.no_grad():
            for tensor, value in copied:
                tensor.copy_(value)
            hold_masks(prunables, whole)  # restores the zeros of what was copied, too

    return copy


def masks_of(prunables: Sequence[Prunable]) -> list[Tensor | None]:
    """List the mask of each tensor, or this rank's part of it; None where there is none yet."""
    return [None if (mask := prunable.mask) is None else local(mask) for prunable in prunables]


def modes_of(model: nn.Module) -> dict[nn.Module, bool]:
    """Record which modules are in train mode."""
    return {module: module.training for module in model.modules()}


def set_modes(modes: Mapping[nn.Module, bool]) -> None:
    """Restore the modes that :func:`modes_of` recorded."""
    for module, training in modes.items():
        module.training = training


def check_state(model: nn.Module, state: Mapping[str, Tensor | None]) -> State:
    """Copy the tensors of a model's state_dict, from before or after pruning, by their names before pruning.

    Extra states of modules are left out: they are not rewound.

    Raises:
        TypeError: if the state is not a mapping to tensors, or None for a buffer.
        ValueError: if tensors are missing or unknown, or a parameter has another shape.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f'rewind must be "init", "none" or a state_dict of tensors, got {state!r}')
    state = {key: value for key, value in state.items() if not str(key).endswith(_EXTRA_STATE_KEY_SUFFIX)}
    masks = {key[:-5] for key in state if key.endswith("_mask") and key[:-5] + "_orig" in state}
    plain = {
        key[:-5] if key.endswith("_orig") and key[:-5] in masks else key: value
        for key, value in state.items()
        if not (key.endswith("_mask") and key[:-5] in masks)
    }
    if unwrap(model) is not model:  # names are those inside DistributedDataParallel
        plain, model = {key.removeprefix("module."): value for key, value in plain.items()}, unwrap(model)
    own, buffers = tensors_of(model), places_of_buffers(model)
    odd = (key for key, value in plain.items() if not (isinstance(value, Tensor) or (value is None and key in buffers)))
    if wrong := next(odd, None):
        found = f"a {type(plain[wrong]).__name__} for {wrong!r}"
        raise TypeError(f'rewind must be "init", "none" or a state_dict of tensors, got {found}')
    every = (key for key in model.state_dict() if not key.endswith(_EXTRA_STATE_KEY_SUFFIX))
    keys = {name for key in every if (name := _plain_name(model, key)) is not None}
    missing, unknown = sorted((keys & set(own)) - set(plain)), sorted(set(plain) - keys - set(own) - set(buffers))
    if missing or unknown:
        raise ValueError(
            f"rewind must be a state_dict of the model, but lacks {some(missing) or 'nothing'} and has unknown "
            f"{some(unknown) or 'nothing'}"
        )
    copied: State = {}
    for key, value in plain.items():
        tensor = own.get(key)
        if value is None or tensor is None:
            if key in buffers:
                copied[key] = None if value is None else value.detach().clone()
            continue
        if tensor.shape != value.shape and isinstance(tensor, nn.Parameter):
            raise ValueError(
                f"rewind must be a state_dict of the model, but {key} has shape {tuple(value.shape)}, "
                f"not {tuple(tensor.shape)}"
            )
        copied[key] = place(value.detach(), like=tensor).clone()
    return copied


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Collect parameters and buffers by their names before pruning, without masks, each once."""
    model = unwrap(model)
    reshard(model.modules())
    named = [*model.named_parameters(), *model.named_buffers()]
    return {plain: tensor for name, tensor in named if (plain := _plain_name(model, name)) is not None}


def _plain_name(model: nn.Module, name: str) -> str | None:
    """Return the name before pruning; None for a mask."""
    path, _, last = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:  # an entry of a custom state_dict, not a tensor of a module
        return name
    if last.endswith("_mask") and has_mask(module, last[:-5]):
        return None
    return name[:-5] if last.endswith("_orig") and has_mask(module, last[:-5]) else name
