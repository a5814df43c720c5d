"""What the state_dict of a model holds, by the names from before pruning, each tensor once, with its mask beside it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torch_sap.distributed.replicas import unwrap
from torch_sap.distributed.sharded import is_dtensor
from torch_sap.masks.parameters import Pair, Prunable


@dataclass(frozen=True, eq=False)
class Held:
    """One parameter or buffer of a model.

    Attributes:
        name: Its key in the state_dict of the model before pruning, the first one if it is shared.
        aliases: The other keys.
        tensor: The parameter or buffer itself.
        prunable: The parameter as it is pruned; None for a buffer.
    """

    name: str
    aliases: tuple[str, ...]
    tensor: Tensor
    prunable: Prunable | None


def held_tensors(model: nn.Module, function: str) -> list[Held]:
    """The parameters and buffers of a state_dict in its order, without masks.

    Args:
        model: Any module, pruned or not; inside DistributedDataParallel its names are those of the module.
        function: What is said to need them in messages.

    Raises:
        TypeError: if model is no module, or its state_dict has something else.
        ValueError: if a tensor has no values.
        NotImplementedError: if a tensor is sharded.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    model = unwrap(model)
    holders, masks, pruned = _holders(model)
    buffers = {id(buffer) for buffer in model.buffers()}
    state = model.state_dict(keep_vars=True)
    keys: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for key, value in state.items():
        if id(value) in masks:
            continue
        if id(value) not in holders and id(value) not in buffers:
            raise TypeError(
                f"{function} needs a state_dict of parameters and buffers, but {key} is a {type(value).__name__} that "
                "is none; keep it apart"
            )
        keys.setdefault(id(value), []).append(key.removesuffix("_orig") if id(value) in pruned else key)
        tensors[id(value)] = value
    found = []
    for identity, names in keys.items():
        _check_values(tensors[identity], names[0], function)
        prunable = Prunable(names[0], tuple(holders[identity])) if identity in holders else None
        found.append(Held(names[0], tuple(names[1:]), tensors[identity], prunable))
    return found


def _holders(model: nn.Module) -> tuple[dict[int, list[Pair]], set[int], set[int]]:
    """By identity: the modules that have each parameter and its name there, the masks, the parameters behind masks."""
    holders: dict[int, list[Pair]] = {}
    masks, pruned = set(), set()
    for module in model.modules():
        for now, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = now.removesuffix("_orig")
            if (mask := module._buffers.get(name + "_mask")) is not None and name != now:
                masks.add(id(mask))
                pruned.add(id(parameter))
            else:
                name = now
            holders.setdefault(id(parameter), []).append((module, name))
    return holders, masks, pruned


def _check_values(tensor: Tensor, name: str, function: str) -> None:
    if is_dtensor(tensor):
        raise NotImplementedError(
            f"{name} is sharded (a DTensor), which {function} cannot handle; use a model on one process with the full "
            "state_dict (torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True)"
        )
    if is_lazy(tensor) or tensor.is_meta:
        raise ValueError(f"{name} must have values, but it is on the meta device or not initialized yet")
