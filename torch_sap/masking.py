"""Masks held in place, in PyTorch's form (``weight_orig``, ``weight_mask``, a hook) but without a second tensor.

``module.weight`` is the Parameter ``weight_orig`` itself, and its pruned entries are zeros. They stay so because

- the gradient is masked when it has been accumulated, before anybody clips it or steps with it;
- the zeros are restored after every step of an optimizer, which may carry momentum from before the pruning;
- the zeros are restored when a state has been loaded, and before every forward, whoever wrote into the weight.

A hook is found by PyTorch's own functions (``prune.is_pruned``, ``prune.remove``, a foreign method on top), holds no
mask, and looks the weight and the mask up in its module each time: they may be replaced
(``load_state_dict(assign=True)``, ``to_empty``).
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.utils import prune
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from torch_sap.collective import is_dtensor, place, same_placement
from torch_sap.fsdp import manages, rename
from torch_sap.zeros import restore_zeros_

_live: weakref.WeakValueDictionary[int, InPlaceMask] = weakref.WeakValueDictionary()


class InPlaceMask(prune.BasePruningMethod):
    """The hook of one tensor of one module that torch_sap prunes.

    Args:
        module: Module that has the tensor as ``{name}_orig`` and the mask as ``{name}_mask``.
        name: Name of the tensor before it was pruned.
    """

    PRUNING_TYPE = "unstructured"

    def __init__(self, module: nn.Module, name: str) -> None:
        self._bind(module, name)

    def _bind(self, module: nn.Module, name: str) -> None:
        self._tensor_name = name
        self._module = weakref.ref(module)  # a strong one would be a cycle, and memory that waits for the collector
        self._gradient_of: weakref.ref[Tensor] | None = None
        self._gradient_handles: list[Any] = []
        self._managed = False  # by FSDP, as far as is known
        self.guarded_by: object = None  # the guard of the running forward, which has restored the zeros already
        _live[id(self)] = self

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self._module(), "name": self._tensor_name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._bind(**state)

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """The mask as it is: what to prune is decided elsewhere, for all tensors together."""
        return default_mask

    def _find(self, module: nn.Module) -> tuple[Tensor, Tensor] | None:
        """Weight and mask, or None if they are gone or another pruning method has taken the tensor over."""
        weight = module._parameters.get(self._tensor_name + "_orig")
        mask = module._buffers.get(self._tensor_name + "_mask")
        if weight is None or mask is None or any(hook is not self for hook in hooks_of(module, self._tensor_name)):
            return None
        return weight, mask

    def hold(self, module: nn.Module) -> None:
        """Make the module compute with the masked weight, now and until somebody writes into it."""
        if (found := self.attach(module)) is not None:
            restore_zeros_(*found)

    def attach(self, module: nn.Module) -> tuple[Tensor, Tensor] | None:
        """Let the module read the Parameter and mask its gradients; return it and its mask, None if there is none."""
        name = self._tensor_name
        if name in module._parameters and name + "_orig" in module._parameters:  # assigned by the user: it replaces it
            module._parameters[name + "_orig"] = module._parameters.pop(name)
        found = self._find(module)
        if found is None or not isinstance(found[0], nn.Parameter):
            return None
        weight, mask = found[0], self._place_mask(module)
        _link(module, name, weight)
        if not same_placement(weight, mask):
            self._check_gathered(module)
            return None
        if weight.requires_grad and (self._gradient_of is None or self._gradient_of() is not weight):
            self._mask_gradients_of(weight)
        return weight, mask

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        """Forward pre-hook."""
        weight = module._parameters.get(self._tensor_name + "_orig")
        if torch.compiler.is_compiling():
            if self.guarded_by is None:
                self.restore_in_graph(module)
        elif not isinstance(weight, nn.Parameter):
            self._lend(module)
        elif self.guarded_by is None:
            self.hold(module)
        elif module.__dict__.get(self._tensor_name) is not weight:
            _link(module, self._tensor_name, weight)

    def relink(self, module: nn.Module) -> None:
        """Let ``module.weight`` be the tensor that is there now: FSDP exchanges it for a forward and a backward."""
        if is_dtensor(module._buffers.get(self._tensor_name + "_mask")) and (found := self._find(module)):
            _link(module, self._tensor_name, found[0])

    def _place_mask(self, module: nn.Module) -> Tensor:
        """The mask, cut as the weight is if fully_shard came after the pruning."""
        weight, mask = module._parameters[self._tensor_name + "_orig"], module._buffers[self._tensor_name + "_mask"]
        assert weight is not None and mask is not None
        if is_dtensor(weight) and not is_dtensor(mask):
            mask = module._buffers[self._tensor_name + "_mask"] = place(mask, like=weight)
        return mask

    def _check_gathered(self, module: nn.Module) -> None:
        """A weight that does not lie as its mask does is one that FSDP has gathered from the held parts."""
        self._managed = self._managed or manages(module, self._tensor_name + "_orig")
        if not self._managed:
            raise RuntimeError(
                f"{self._tensor_name}_orig and {self._tensor_name}_mask of {type(module).__name__} must be placed "
                "alike, but one is a DTensor and the other is none or lies elsewhere; load or distribute both"
            )

    def restore_in_graph(self, module: nn.Module) -> None:
        """Restore the zeros as a part of a graph that is compiled, where ``.data`` is not allowed."""
        weight, mask = module._parameters[self._tensor_name + "_orig"], module._buffers[self._tensor_name + "_mask"]
        assert weight is not None and mask is not None
        with torch.no_grad():
            weight.mul_(mask)

    def _lend(self, module: nn.Module) -> None:
        """Compute one call with a tensor that torch.func.functional_call has put in the place of the Parameter."""
        name, found, before = self._tensor_name, self._find(module), module.__dict__.get(self._tensor_name)
        if found is None or before is None:
            return
        weight, mask = found
        _link(module, name, weight * mask)

        def give_back(*_: Any) -> None:
            _link(module, name, before)
            handle.remove()

        handle = module.register_forward_hook(give_back, always_call=True)

    def _mask_gradients_of(self, weight: Tensor) -> None:
        """Mask what backward accumulates in place, and what torch.autograd.grad returns in new memory."""
        self._release_gradient()
        self._gradient_of = weakref.ref(weight)
        accumulated: Any = weight.register_post_accumulate_grad_hook
        asked_for: Any = weight.register_hook
        self._gradient_handles = [accumulated(self._mask_accumulated), asked_for(self._mask_asked_for)]

    def _mask_accumulated(self, weight: Tensor) -> None:
        module = self._module()
        found = None if module is None else self._find(module)
        if found is None or weight.grad is None:
            return
        if is_dtensor(weight) and module is not None:
            self.relink(module)  # FSDP has put the sharded parameter back
        if weight.grad.is_sparse or not same_placement(weight.grad, found[1]):
            weight.grad = weight.grad * found[1].to(weight.grad.dtype)
        else:
            restore_zeros_(weight.grad, found[1])

    def _mask_asked_for(self, gradient: Tensor) -> Tensor | None:
        module = self._module()
        found = None if module is None else self._find(module)
        if found is None or _will_accumulate(found[0]):
            return None
        return gradient * found[1].to(gradient.dtype)

    def before_load(self, module: nn.Module, *_: Any) -> None:
        """load_state_dict pre-hook. A sharded mask can only be copied into one that is sharded too."""
        if self._find(module):
            self._place_mask(module)

    def after_load(self, module: nn.Module, incompatible_keys: Any) -> None:
        """load_state_dict post-hook. ``assign=True`` may have brought a mask of another type, and another Parameter."""
        mask = module._buffers.get(self._tensor_name + "_mask")
        if mask is not None and mask.dtype is not torch.bool and self._find(module):
            module._buffers[self._tensor_name + "_mask"] = mask != 0
        self.hold(module)

    def after_step(self, stepped: set[int]) -> None:
        """Restore the zeros if an optimizer stepped with the weight."""
        module = self._module()
        weight = None if module is None else module._parameters.get(self._tensor_name + "_orig")
        held = None if self._gradient_of is None else self._gradient_of()
        if module is not None and (id(weight) in stepped or id(held) in stepped):
            self.hold(module)
            if is_dtensor(held) and held is not weight and (found := self._find(module)):  # FSDP keeps it gathered
                restore_zeros_(held, found[1])

    def remove(self, module: nn.Module) -> None:
        """Make the pruning permanent, for PyTorch's prune.remove: the same Parameter, its old name, its old place."""
        self.hold(module)
        self.release(module)
        del module._buffers[self._tensor_name + "_mask"]
        module.__dict__.pop(self._tensor_name, None)
        _rename_parameter(module, self._tensor_name + "_orig", self._tensor_name)

    def release(self, module: nn.Module) -> None:
        """Take away all that holds the mask, but for the forward pre-hook."""
        self._release_gradient()
        _live.pop(id(self), None)
        for hooks in (module._load_state_dict_pre_hooks, module._load_state_dict_post_hooks):
            for key, hook in list(hooks.items()):
                if getattr(getattr(hook, "hook", hook), "__self__", None) is self:  # PyTorch wraps pre-hooks
                    del hooks[key]

    def _release_gradient(self) -> None:
        for handle in self._gradient_handles:
            handle.remove()
        self._gradient_of, self._gradient_handles = None, []


def hooks_of(module: nn.Module, name: str) -> list[prune.BasePruningMethod]:
    """The pruning hooks of a tensor of a module, ours and foreign ones."""
    hooks = module._forward_pre_hooks.values()
    return [hook for hook in hooks if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == name]


def hold_mask(module: nn.Module, name: str, mask: Tensor) -> None:
    """Give a tensor of a module a mask that is held in place, from whatever form it is in.

    The zeros are not there yet: call :func:`torch_sap.zeros.restore_all_zeros_` for all tensors that got a mask.

    Args:
        module: Module that has the tensor, unpruned, pruned in place, or pruned by one of PyTorch's methods.
        name: Name of the tensor before it was pruned.
        mask: Bool tensor of its shape on its device; it becomes the buffer, unless there is a bool one, which gets
            its values.
    """
    hooks = hooks_of(module, name)
    ours = [hook for hook in hooks if isinstance(hook, InPlaceMask)]
    if ours and len(hooks) == 1:
        ours[0].attach(module)  # a mask from before the model was sharded is sharded too
        module._buffers[name + "_mask"].copy_(mask)  # type: ignore[union-attr]
        return
    for key in [key for key, hook in module._forward_pre_hooks.items() if hook in hooks]:
        del module._forward_pre_hooks[key]
    if name in module._parameters:
        _rename_parameter(module, name, name + "_orig")
    hook = InPlaceMask(module, name)
    module.__dict__.pop(name, None)
    module.register_buffer(name + "_mask", mask)
    module.register_forward_pre_hook(hook)
    before_load: Any = module.register_load_state_dict_pre_hook
    before_load(hook.before_load)
    after_load: Any = module.register_load_state_dict_post_hook
    after_load(hook.after_load)
    hook.attach(module)


def _rename_parameter(module: nn.Module, old: str, new: str) -> None:
    """Rename a parameter and keep its place, so that optimizers and averages that go by order fit."""
    parameters = [(new if key == old else key, value) for key, value in module._parameters.items()]
    module._parameters.clear()
    module._parameters.update(parameters)
    rename(module, old, new)


def _link(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Let ``module.name`` be the tensor."""
    module.__dict__[name] = tensor
    if name in (flat_names := module.__dict__.get("_flat_weights_names", ())):  # recurrent modules read this list
        module.__dict__["_flat_weights"][flat_names.index(name)] = tensor


def _will_accumulate(weight: Tensor) -> bool:
    """Whether the backward pass that runs now adds to the weight's ``grad``; torch.autograd.grad does not."""
    try:
        return bool(torch._C._will_engine_execute_node(get_gradient_edge(weight).node))
    except RuntimeError:  # how it says that the engine runs torch.autograd.grad for this very tensor
        return False


def _after_optimizer_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if _live:
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for reference in _live.valuerefs():
            if (hook := reference()) is not None:
                hook.after_step(stepped)


register_optimizer_step_post_hook(_after_optimizer_step)
