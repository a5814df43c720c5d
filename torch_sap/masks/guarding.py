"""Guards: masks held for weights that are read without calling their module.

timm's BEiT, EVA and Swin v2 compute ``F.linear(x, self.qkv.weight)``, nn.MultiheadAttention reads ``out_proj.weight``.
The forward pre-hook of such a module never runs, so the modules around it restore the zeros before their own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from torch_sap.distributed.fsdp import is_fsdp
from torch_sap.masks.masking import InPlaceMask
from torch_sap.masks.zeros import hold_together


class Guard:
    """Holds the masks of all modules inside one module, once a forward.

    Args:
        held: The hooks, each with its module.
    """

    def __init__(self, held: Sequence[tuple[InPlaceMask, nn.Module]]) -> None:
        self.held = list(held)

    def before(self, module: nn.Module, inputs: Any) -> None:
        """Forward pre-hook. An outer guard that has done it already is trusted."""
        compiling = torch.compiler.is_compiling()
        if not compiling and is_fsdp(module):
            self._come_first(module)
        unheld = []
        for hook, inner in self.held:
            if hook.guarded_by is None or hook.guarded_by is self:
                unheld.append((hook, hook.before_forward(inner)))
                hook.guarded_by = self
            elif hook.sharded and not compiling:
                hook.relink(inner)
        hold_together(unheld)

    def link(self, module: nn.Module, inputs: Any) -> None:
        """Forward pre-hook that runs when FSDP has gathered the weights."""
        for hook, inner in self.held:
            hook.relink(inner)

    def _come_first(self, module: nn.Module) -> None:
        """Restore zeros before FSDP gathers the weights, though fully_shard came after the guard."""
        hooks: Any = module._forward_pre_hooks  # an OrderedDict
        if next(iter(hooks.values())) != self.before:
            hooks.move_to_end(next(key for key, hook in hooks.items() if hook == self.before), last=False)
            if self.link not in hooks.values():
                module.register_forward_pre_hook(self.link)

    def after(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Forward hook."""
        for hook, inner in self.held:
            if hook.guarded_by is self:
                hook.guarded_by = None
                hook.give_back(inner)
            if hook.sharded:
                hook.relink(inner)


def guard(model: nn.Module) -> None:
    """Give every module of a model that has pruned modules inside a guard for them, or leave it the one it has."""
    found: dict[nn.Module, dict[InPlaceMask, nn.Module]] = {}
    for module in model.modules():
        held = [
            (hook, inner) for hook, inner in _hooks_in(module, found).items() if inner is not module or is_fsdp(module)
        ]
        known = _guards(module)
        if known and known[0].held == held:
            continue
        if known:
            _release(module)
        if held:
            new = Guard(held)
            module.register_forward_pre_hook(new.before, prepend=is_fsdp(module))
            if is_fsdp(module):
                module.register_forward_pre_hook(new.link)
            module.register_forward_hook(new.after, always_call=True)


def unguard(model: nn.Module) -> None:
    """Take all guards of a model away."""
    for module in model.modules():
        _release(module)


def _hooks_in(module: nn.Module, found: dict[nn.Module, dict[InPlaceMask, nn.Module]]) -> dict[InPlaceMask, nn.Module]:
    """The hooks of a module and of those inside it, with the modules that have them; it adds them to ``found``."""
    if module not in found:
        hooks = module._forward_pre_hooks.values()
        found[module] = {hook: module for hook in hooks if isinstance(hook, InPlaceMask)}
        for child in module.children():
            found[module].update(_hooks_in(child, found))
    return found[module]


def _guards(module: nn.Module) -> list[Guard]:
    owners = [getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values()]
    return [owner for owner in owners if isinstance(owner, Guard)]


def _release(module: nn.Module) -> None:
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Guard)]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)
