"""Copy a model's state at one moment (parameters, buffers, modes), and restore it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
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
from torch_sap.masks.parameters import Prunable

State = dict[str, Tensor]
Rewind = Literal["init", "none"] | Mapping[str, Tensor]


def snapshot(model: nn.Module) -> State:
    """Copy all parameters and buffers except masks, by their names before pruning."""
    with torch.no_grad():
        return {name: tensor.detach().clone() for name, tensor in tensors_of(model).items()}


def empty_buffers(model: nn.Module) -> set[str]:
    """List the buffers that are None, which no state holds."""
    return {name for name, buffers, key in _places_of_buffers(model) if buffers[key] is None}


def _places_of_buffers(model: nn.Module) -> list[tuple[str, dict[str, Tensor | None], str]]:
    modules = unwrap(model).named_modules()
    return [(f"{path}.{key}".removeprefix("."), m._buffers, key) for path, m in modules for key in m._buffers]


def copier(
    model: nn.Module,
    state: Mapping[str, Tensor] | None,
    prunables: Sequence[Prunable],
    masks: Sequence[Tensor | None],
    empty: Collection[str] = (),
) -> Callable[[], None]:
    """Prepare to give a model masks, with zeros at pruned entries, and a state (None: leave its values).

    Everything that can fail happens here. The function that is returned only copies: pass it to ``mask.finish``.
    A buffer of another shape than in the state, as of an observer that has met its first data, is replaced, and so is
    an expanded one, into which nothing can be copied. Those named in ``empty`` are None again, unless the state has
    them.

    Raises:
        RuntimeError: if a parameter has another shape than in the state.
    """
    with torch.no_grad():
        whole = [prunable.whole(mask) for prunable, mask in zip(prunables, masks, strict=True)]
    copied: list[tuple[Tensor, Tensor]] = []
    new: dict[int, Tensor] = {}
    for name, tensor in tensors_of(model).items() if state else ():
        if state is None or (value := state.get(name)) is None:
            continue
        if tensor.shape == value.shape and not is_expanded(local(tensor)):
            copied.append((tensor, value))
        elif not isinstance(tensor, nn.Parameter):
            new[id(tensor)] = value.to(tensor.device, tensor.dtype, copy=True)
        elif tensor.shape != value.shape:
            raise RuntimeError(
                f"{name} must keep its shape {tuple(value.shape)} to be set back to its start, but has "
                f"{tuple(tensor.shape)} now; make a new pruner after resizing a parameter"
            )
    places = [(of, key, new[id(of[key])]) for _, of, key in _places_of_buffers(model) if id(of[key]) in new]

    filled = [place for place in _places_of_buffers(model) if place[0] in empty and place[0] not in (state or {})]

    def copy() -> None:
        for buffers, key, value in places:
            buffers[key] = value
        for _, buffers, key in filled:
            buffers[key] = None
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


def check_state(model: nn.Module, state: Mapping[str, Tensor]) -> State:
    """Copy the tensors of a model's state_dict, from before or after pruning, by their names before pruning.

    Extra states of modules are left out: they are not rewound.

    Raises:
        TypeError: if the state is not a mapping to tensors.
        ValueError: if tensors are missing, unknown or have another shape.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f'rewind must be "init", "none" or a state_dict of tensors, got {state!r}')
    state = {key: value for key, value in state.items() if not str(key).endswith(_EXTRA_STATE_KEY_SUFFIX)}
    if wrong := next((key for key, value in state.items() if not isinstance(value, Tensor)), None):
        found = f"a {type(state[wrong]).__name__} for {wrong!r}"
        raise TypeError(f'rewind must be "init", "none" or a state_dict of tensors, got {found}')
    masks = {key[:-5] for key in state if key.endswith("_mask") and key[:-5] + "_orig" in state}
    plain = {
        key[:-5] if key.endswith("_orig") and key[:-5] in masks else key: value
        for key, value in state.items()
        if not (key.endswith("_mask") and key[:-5] in masks)
    }
    if unwrap(model) is not model:  # names are those inside DistributedDataParallel
        plain, model = {key.removeprefix("module."): value for key, value in plain.items()}, unwrap(model)
    own = tensors_of(model)
    every = (key for key in model.state_dict() if not key.endswith(_EXTRA_STATE_KEY_SUFFIX))
    keys = {name for key in every if (name := _plain_name(model, key)) is not None}
    missing, unknown = sorted((keys & set(own)) - set(plain)), sorted(set(plain) - keys - set(own))
    if missing or unknown:
        raise ValueError(
            f"rewind must be a state_dict of the model, but lacks {some(missing) or 'nothing'} and has unknown "
            f"{some(unknown) or 'nothing'}"
        )
    for key in own.keys() & plain.keys():
        if own[key].shape != plain[key].shape:
            raise ValueError(
                f"rewind must be a state_dict of the model, but {key} has shape {tuple(plain[key].shape)}, "
                f"not {tuple(own[key].shape)}"
            )
    return {key: place(value.detach(), like=own[key]).clone() for key, value in plain.items() if key in own}


def tensors_of(model: nn.Module) -> State:
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
    if last.endswith("_mask") and last[:-5] + "_orig" in module._parameters:
        return None
    return name[:-5] if last.endswith("_orig") and last[:-5] + "_mask" in module._buffers else name
