"""FSDP2's records: which modules it shards, and under which name it puts a parameter back.

``fully_shard`` replaces a module's Parameter by a DTensor, and for a forward and a backward by the gathered weight,
each time under the name that the parameter had when the model was sharded. Pruning renames it, so FSDP has to be told.
The records are private to PyTorch (read in torch 2.9 and 2.14); when they cannot be found the error says so.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeGuard

from torch import nn


def is_fsdp(module: nn.Module) -> TypeGuard[Any]:
    """Whether fully_shard was applied to the module itself."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, getattr(fsdp, "FSDPModule", ()))


def reshard(modules: Iterable[nn.Module]) -> None:
    """Put the sharded parameters back where a forward has left gathered ones."""
    wanted = set(modules)
    for owner in {owner for owner, record in _records() if any(module in wanted for module, _ in _places(record))}:
        owner.reshard()


def rename(module: nn.Module, old: str, new: str) -> None:
    """Tell FSDP the new name of a parameter."""
    parameter = module._parameters[new]
    for _, record in _records():
        info = record._module_info
        if info.module is module and info.param_name == old:
            info.param_name = new
        for i, place in enumerate(zip(info.shared_modules, info.shared_param_names, strict=True)):
            if place[0] is module and place[1] == old:
                info.shared_param_names[i] = new
        if record.sharded_param is parameter and (module, new) not in _places(record):
            raise RuntimeError(f"FSDP does not know the parameter {old!r} of {type(module).__name__} that it shards")


def sharded_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """The sharded form of a parameter of a module, which may be gathered now; None if FSDP does not shard it."""
    found = (record.sharded_param for _, record in _records() if (module, name) in _places(record))
    return next(found, None)


def _records() -> Iterator[tuple[Any, Any]]:
    """Every module that fully_shard was applied to, with FSDP's record of each parameter that it shards."""
    if "torch.distributed.fsdp" not in sys.modules:
        return
    from torch.distributed._composable_state import _module_state_mapping

    for module in list(_module_state_mapping):
        if is_fsdp(module):
            state = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None)
            if groups is None:  # PyTorch 2.9 has one group, or None for a module without parameters of its own
                groups = [group for group in [state._fsdp_param_group] if group is not None]
            for group in groups:
                for record in group.fsdp_params:
                    yield module, record


def _places(record: Any) -> list[tuple[nn.Module, str]]:
    info = record._module_info
    shared = zip(info.shared_modules, info.shared_param_names, strict=True)
    return [(info.module, info.param_name), *shared]
