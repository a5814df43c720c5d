"""Guards restore the zeros inside a module before its forward, once for all weights in it.

Some weights are read without calling their module: timm's BEiT, EVA and Swin v2 compute ``F.linear(x,
self.qkv.weight)``, nn.MultiheadAttention reads ``out_proj.weight``. The hook of such a module never runs, so the
modules around it have guards. The outermost one does the work; guards and hooks inside it find their weights covered.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from torch_sap.arguments import some
from torch_sap.distributed.fsdp import is_fsdp
from torch_sap.distributed.replicas import unwrap
from torch_sap.distributed.sharded import local
from torch_sap.masks.mask import InPlaceMask, is_replica, runs_eagerly, writes
from torch_sap.masks.small import Attached
from torch_sap.masks.zeros import restore_zeros_

Held = list[tuple[InPlaceMask, nn.Module]]
Tree = tuple[tuple[dict[str, Any], ...], tuple[str, ...], tuple[nn.Module, ...]]
"""Every module inside one: the dict of children that it is in, its name there, and the module."""


class Guard:
    """Restores the zeros of all weights inside one module.

    A root, the module that the user pruned, restores them whether they are covered or not, which also ends what an
    interrupted forward has left, and keeps a forward hook of its own. It also notices that a layer was replaced.
    """

    def __init__(self, held: Held, tree: Tree, *, is_root: bool) -> None:
        self.held, self.tree, self.is_root = held, tree, is_root
        self._attached: Attached | None = None
        self._others = held
        self._covering: Held = []
        self._handle: RemovableHandle | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_attached": None, "_others": self.held, "_covering": [], "_handle": None}

    def before(self, module: nn.Module, inputs: Any) -> None:
        """Forward pre-hook."""
        if is_replica(module):
            link_replica(module)
            return
        compiling = torch.compiler.is_compiling()
        if not compiling and is_fsdp(module):
            self._come_first(module)
        if self.is_root and not compiling:
            self._look(module)
        todo = self.held
        if not self.is_root:
            todo = [(hook, inner) for hook, inner in todo if not hook.covered or hook.given(inner) is not None]
        if todo:
            if runs_eagerly():
                self._restore(todo)
            else:
                for hook, inner in todo:
                    hook.trace(inner)
            if self.is_root or not compiling:  # a trace cannot take a hook away again
                for hook, _ in todo:
                    hook.covered = True
            if not (self.is_root or compiling):
                self._covering = todo
                self._handle = module.register_forward_hook(self.after, always_call=True)
        elif not compiling:
            self.link(module, inputs)

    def _restore(self, todo: Held) -> None:
        """Restore the zeros of a forward; a root knows the small tensors from the last one."""
        known = self._attached if self.is_root else None
        if known is not None and known.restore(known.weights):
            todo = self._others
        found = [hook.attached(inner) for hook, inner in todo]
        restore_zeros_([pair for pair in found if pair is not None])
        if self.is_root and todo is self.held:
            self._attached = known = Attached([hook for hook, inner in todo if hook.module is inner])
            done = set(known.keepers)
            self._others = [(hook, inner) for hook, inner in todo if hook not in done]

    def after(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Forward hook, permanent on a root and temporary on another outermost module."""
        if is_replica(module):
            return
        for hook, inner in self.held if self.is_root else self._covering:
            hook.covered = False
            if hook.changes:
                hook.give_back(inner)
                hook.relink(inner)
        if self._handle is not None:
            self._handle.remove()
            self._covering, self._handle = [], None

    def link(self, module: nn.Module, inputs: Any) -> None:
        """Forward pre-hook that runs when FSDP has gathered the weights."""
        for hook, inner in self.held:
            hook.relink(inner)

    def _look(self, module: nn.Module) -> None:
        """See whether the model still has the layers that were pruned, and whether it is an average with old masks."""
        parents, names, children = self.tree
        if tuple(map(dict.get, parents, names)) != children:
            check_layers(module, self)
            self.held, self.tree, self._attached = _held(module, {}), _tree(module), None
        if self.held and self.held[0][0].copied_from is not None:
            warn_of_average(self.held)

    def _come_first(self, module: nn.Module) -> None:
        """Restore zeros before FSDP gathers the weights, though fully_shard came after the guard."""
        hooks: Any = module._forward_pre_hooks  # an OrderedDict
        if next(iter(hooks.values())) != self.before:
            hooks.move_to_end(next(key for key, hook in hooks.items() if hook == self.before), last=False)
            if self.link not in hooks.values():
                module.register_forward_pre_hook(self.link)


def guard(model: nn.Module) -> None:
    """Install guards on a model and on the modules in it that may read an inner weight without calling its module."""
    root, found = unwrap(model), {}  # type: ignore[var-annotated]
    for module in root.modules():
        known = _guards(module)
        is_root = module is root or any(other.is_root for other in known)
        held = _held(module, found)
        tree = _tree(module) if is_root else ((), (), ())
        if known and known[0].held == held and known[0].tree == tree and known[0].is_root == is_root:
            continue
        _release(module)
        if held and (is_root or is_fsdp(module) or _has_own_forward(module)):
            _install(module, Guard(held, tree, is_root=is_root))


def _install(module: nn.Module, new: Guard) -> None:
    module.register_forward_pre_hook(new.before, prepend=is_fsdp(module))
    if is_fsdp(module):
        module.register_forward_pre_hook(new.link)
    if new.is_root:
        module.register_forward_hook(new.after, always_call=True)


def _has_own_forward(module: nn.Module) -> bool:
    """Whether the forward may read weights itself: Sequential's only calls modules, and module lists have none."""
    return type(module).forward not in (nn.Sequential.forward, nn.Module.forward)


def link_replica(module: nn.Module) -> None:
    """Link the weights of a copy by DataParallel, which runs in a thread beside the other copies, and of all in it."""
    for inner in module.modules():
        for hook in list(inner._forward_pre_hooks.values()):
            if isinstance(hook, InPlaceMask):
                hook.link_replica(inner)


def unguard(model: nn.Module) -> None:
    """Remove all guards of a model."""
    for module in model.modules():
        _release(module)


def _held(module: nn.Module, found: dict[nn.Module, dict[InPlaceMask, nn.Module]]) -> Held:
    """What a guard of a module restores: all in it, but what its own hook restores."""
    return [(h, inner) for h, inner in _hooks_in(module, found).items() if inner is not module or is_fsdp(module)]


def _tree(root: nn.Module) -> Tree:
    edges = [
        (module._modules, name, child)
        for module in root.modules()
        for name, child in module._modules.items()
        if child is not None
    ]
    return tuple(zip(*edges, strict=True)) if edges else ((), (), ())  # type: ignore[return-value]


def check_layers(root: nn.Module, guard: Guard) -> None:
    """Raise a RuntimeError if pruned layers of a model are gone and new ones with dense weights are there.

    Layers may be taken away (a head that became nn.Identity), moved, wrapped, or made anew with the same Parameters and
    hooks (QAT).
    """
    for module in root.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, InPlaceMask) and hook._weight_key not in module._parameters:
                hook.adopt(module)
    paths = {module: path for path, module in root.named_modules()}
    lost = [hook.path for hook, inner in guard.held if inner not in paths]
    new = [
        f"{path}.{name}".removeprefix(".")
        for module, path in paths.items()
        if module not in guard.tree[2] and module is not root
        for name, parameter in module._parameters.items()
        if parameter is not None
        and (is_lazy(parameter) or parameter.dim() > 1)
        and name.removesuffix("_orig") + "_mask" not in module._buffers
    ]
    if lost and new:
        raise RuntimeError(
            f"the pruned layers must stay in the model, but {some(lost)} was replaced, and {some(new)} is dense; call "
            "torch_sap.remove(model) before replacing layers, or, to train the new ones dense until the next pruning, "
            "torch_sap.layer_unstructured(model, gamma=0) now"
        )


def warn_of_average(held: Held) -> None:
    """Warn if a copy of a pruned model is an average that keeps masks from before a pruning of that model.

    Whoever averages weights writes into a copy that is neither trained by an optimizer nor pruned nor loaded.
    """
    for hook, _ in held:
        if hook.outdated is None or hook.copied_from is None or (source := hook.copied_from()) is None:
            continue
        own, other = hook.find(), source.find()
        if own is None or other is None or not isinstance(own[0], nn.Parameter) or writes(own[0]) == hook.outdated:
            continue
        if torch.equal(local(own[1]), local(other[1]).to(own[1].device)):
            hook.outdated = None
        else:
            for each, _ in held:
                each.copied_from = each.outdated = None
            warnings.warn(
                f"{hook.path} of a copy of a pruned model was changed, but has the mask from before the model's last "
                "pruning. If it is an average of weights, it is not pruned where the model is: after each update add "
                "average.load_state_dict({k: v for k, v in model.state_dict().items() if k.endswith('_mask')}, "
                "strict=False), or average with torch.optim.swa_utils.AveragedModel",
                stacklevel=2,
            )
            return


def _hooks_in(module: nn.Module, found: dict[nn.Module, dict[InPlaceMask, nn.Module]]) -> dict[InPlaceMask, nn.Module]:
    """Collect the hooks of a module and its children, each with the module that has it; ``found`` is a cache."""
    if module not in found:
        hooks = module._forward_pre_hooks.values()
        found[module] = {hook: module for hook in hooks if isinstance(hook, InPlaceMask)}
        for child in module.children():
            found[module].update(_hooks_in(child, found))
    return found[module]


def _guards(module: nn.Module) -> Sequence[Guard]:
    owners = [getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values()]
    return [owner for owner in owners if isinstance(owner, Guard)]


def _release(module: nn.Module) -> None:
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Guard)]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)
