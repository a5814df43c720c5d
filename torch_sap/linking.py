"""Where a module keeps a pruned weight: the Parameter, the attribute that it is read by, and the hooks."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils import prune

from torch_sap.fsdp import rename


def hooks_of(module: nn.Module, name: str) -> list[prune.BasePruningMethod]:
    """The pruning hooks of a tensor of a module, ours and foreign ones."""
    hooks = module._forward_pre_hooks.values()
    return [hook for hook in hooks if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == name]


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
