"""Where a module keeps a pruned weight: the Parameter, the attribute that it is read by, and the hooks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import prune

from torch_sap.distributed.fsdp import rename


def hooks_of(module: nn.Module, name: str) -> list[prune.BasePruningMethod]:
    """The pruning hooks of a tensor of a module, ours and foreign ones."""
    hooks = module._forward_pre_hooks.values()
    return [hook for hook in hooks if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == name]


def load_hooks_of(module: nn.Module) -> set[Any]:
    """Our pruning hooks that look after the loading of a module, those of tensors that others hold now too.

    PyTorch tells a hook neither that another method was applied on top of it nor that the two were removed.
    """
    owners = {getattr(hook, "__self__", None) for hook in module._load_state_dict_post_hooks.values()}
    return {owner for owner in owners if isinstance(owner, prune.BasePruningMethod)}


def rename_parameter(module: nn.Module, old: str, new: str) -> None:
    """Rename a parameter and keep its place, so that optimizers and averages that go by order fit."""
    parameters = [(new if key == old else key, value) for key, value in module._parameters.items()]
    module._parameters.clear()
    module._parameters.update(parameters)
    rename(module, old, new)


def link(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Let ``module.name`` be the tensor."""
    module.__dict__[name] = tensor
    if name in (flat_names := module.__dict__.get("_flat_weights_names", ())):  # recurrent modules read this list
        module.__dict__["_flat_weights"][flat_names.index(name)] = tensor
