"""Masks held in place, in PyTorch's form (``weight_orig``, ``weight_mask``, a hook) but without a second tensor.

``module.weight`` is the Parameter ``weight_orig`` itself, and its pruned entries are zeros. They stay so because

- the gradient is masked when it has been accumulated, before anybody clips it or steps with it;
- the zeros are restored after every step of an optimizer, which may carry momentum from before the pruning;
- the zeros are restored when a state has been loaded, and before every forward, whoever wrote into the weight.

Where they are known to be there still, nothing is done (:mod:`torch_sap.masks.stamps`), on the host: a pass over the
weights shows in the time of a training step there. On a device looking would wait for it, so they are always restored,
those of all weights in one call.

A hook is found by PyTorch's own functions (``prune.is_pruned``, ``prune.remove``, a foreign method on top), holds no
mask, and looks the weight and the mask up in its module each time: they may be replaced
(``load_state_dict(assign=True)``, ``to_empty``).
"""

from __future__ import annotations

import weakref
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from torch_sap.distributed.fsdp import manages
from torch_sap.distributed.sharded import is_dtensor, place, same_placement
from torch_sap.masks.gradients import GradientMask
from torch_sap.masks.linking import hooks_of, link, rename_parameter
from torch_sap.masks.optimizers import unwatch, watch
from torch_sap.masks.stamps import Probe, Stamp
from torch_sap.masks.standardized import fold_
from torch_sap.masks.zeros import hold_together, restore_zeros_


class InPlaceMask(prune.BasePruningMethod):
    """The hook of one tensor of one module that torch_sap prunes.

    Args:
        module: Module that has the tensor as ``{name}_orig`` and the mask as ``{name}_mask``.
        name: Name of the tensor before it was pruned.
    """

    PRUNING_TYPE = "unstructured"
    state: Stamp | None

    def __init__(self, module: nn.Module, name: str) -> None:
        self._bind(module, name)

    def _bind(self, module: nn.Module, name: str) -> None:
        self._tensor_name = name
        self._weight_key, self._mask_key = name + "_orig", name + "_mask"
        self._module = weakref.ref(module)  # a strong one would be a cycle, and memory that waits for the collector
        self._gradient: GradientMask | None = None
        self._zeros: Stamp | None = None  # of weight and mask when the zeros were there
        self._probe: Probe | None = None
        self._lent: Tensor | None = None  # the Parameter, while a forward computes with a product
        self._managed = False  # by FSDP, as far as is known
        self.sharded = False  # whether the mask is a DTensor
        self.guarded_by: object = None  # the guard of the running forward, which has restored the zeros already
        watch(self)

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self._module(), "name": self._tensor_name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._bind(**state)

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """The mask as it is: what to prune is decided elsewhere, for all tensors together."""
        return default_mask

    def _find(self, module: nn.Module) -> tuple[Tensor, Tensor] | None:
        """Weight and mask, or None if they are gone or another pruning method has taken the tensor over."""
        weight = module._parameters.get(self._weight_key)
        mask = module._buffers.get(self._mask_key)
        hooks = module._forward_pre_hooks
        alone = len(hooks) == 1 and next(iter(hooks.values())) is self  # mostly
        taken = not alone and any(hook is not self for hook in hooks_of(module, self._tensor_name))
        return None if weight is None or mask is None or taken else (weight, mask)

    def hold(self, module: nn.Module) -> None:
        """Make the module compute with the masked weight, now and until somebody writes into it."""
        hold_together([(self, self.unheld(module))])

    def unheld(self, module: nn.Module) -> tuple[Tensor, Tensor] | None:
        """Weight and mask, if the zeros have to be restored; all else that :meth:`hold` does is done here."""
        known = self._attached(module)
        if known is not None and self._has_zeros(*known):
            return None
        return known or self.attach(module)

    def _attached(self, module: nn.Module) -> tuple[Tensor, Tensor] | None:
        """Weight and mask, if the module is as :meth:`attach` leaves it; None if it may not be."""
        weight: Tensor | None = module._parameters.get(self._weight_key)
        mask = module._buffers.get(self._mask_key)
        read: Tensor | None = module.__dict__.get(self._tensor_name)
        if weight is None or mask is None or read is not weight or is_dtensor(weight) or is_dtensor(mask):
            return None
        masked = not weight.requires_grad or (self._gradient is not None and self._gradient.weight is weight)
        return (weight, mask) if masked else None

    def _has_zeros(self, weight: Tensor, mask: Tensor) -> bool:
        """Whether the zeros are known to be there."""
        if self._zeros is None or self._probe is None:
            return False
        return self._zeros.holds(weight, mask) and self._probe.finds_zeros(weight)

    def note_zeros(self, weight: Tensor, mask: Tensor) -> None:
        """Remember that the zeros are there now, on the host, unless FSDP fills the weight anew without counting."""
        self._zeros = None
        if not (weight.is_cpu and mask.is_cpu):
            return
        module = self._module()
        if module is not None and not manages(module, self._weight_key) and not is_dtensor(weight):
            if self._probe is None or not self._probe.fits(mask):
                self._probe = Probe(mask)
            self._zeros = Stamp(weight, mask)

    def attach(self, module: nn.Module) -> tuple[Tensor, Tensor] | None:
        """Let the module read the Parameter and mask its gradients; return it and its mask, None if there is none."""
        name = self._tensor_name
        if name in module._parameters and self._weight_key in module._parameters:  # the user's: it replaces it
            module._parameters[self._weight_key] = module._parameters.pop(name)
        found = self._find(module)
        if found is None or not isinstance(found[0], nn.Parameter):
            return None
        weight, mask = found[0], self._place_mask(module)
        link(module, name, weight)
        if not same_placement(weight, mask):
            self._check_gathered(module)
            return None
        if weight.requires_grad and (self._gradient is None or self._gradient.weight is not weight):
            self._release_gradient()
            self._gradient = GradientMask(weight, self._find_for_gradient)
        return weight, mask

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        """Forward pre-hook."""
        weight = module._parameters.get(self._weight_key)
        if self.guarded_by is None:
            hold_together([(self, self.before_forward(module))])
            if self._lent is not None and self.give_back not in module._forward_hooks.values():
                module.register_forward_hook(self.give_back, always_call=True)
        elif module.__dict__.get(self._tensor_name) is not weight and _runs_eagerly(weight):
            link(module, self._tensor_name, weight)

    def before_forward(self, module: nn.Module) -> tuple[Tensor, Tensor] | None:
        """Let a forward of the module, or of one around it, compute with zeros at pruned entries.

        Returns what :meth:`unheld` does: the caller restores those zeros.
        """
        weight, mask = module._parameters.get(self._weight_key), module._buffers.get(self._mask_key)
        if _runs_eagerly(weight):
            self._lent = None  # left by a torch.export that failed
            return self.unheld(module)
        if torch.compiler.is_dynamo_compiling() and weight is not None and mask is not None:
            with torch.no_grad():  # a part of the graph, where ``.data`` is not allowed
                weight.mul_(mask)
        else:
            self._lend(module)
        return None

    def relink(self, module: nn.Module) -> None:
        """Let ``module.weight`` be the tensor that is there now: FSDP exchanges it for a forward and a backward."""
        if self.sharded and (found := self._find(module)):
            link(module, self._tensor_name, found[0])

    def _weight_and_mask(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        weight, mask = module._parameters[self._weight_key], module._buffers[self._mask_key]
        assert weight is not None and mask is not None
        return weight, mask

    def _place_mask(self, module: nn.Module) -> Tensor:
        """The mask, cut as the weight is if fully_shard came after the pruning."""
        weight, mask = self._weight_and_mask(module)
        if is_dtensor(weight) and not is_dtensor(mask):
            mask = module._buffers[self._mask_key] = place(mask, like=weight)
        self.sharded = is_dtensor(mask)
        return mask

    def _check_gathered(self, module: nn.Module) -> None:
        """A weight that does not lie as its mask does is one that FSDP has gathered from the held parts."""
        self._managed = self._managed or manages(module, self._weight_key)
        if not self._managed:
            raise RuntimeError(
                f"{self._tensor_name}_orig and {self._tensor_name}_mask of {type(module).__name__} must be placed "
                "alike, but one is a DTensor and the other is none or lies elsewhere; load or distribute both"
            )

    def _lend(self, module: nn.Module) -> None:
        """Compute one call with a product: what functional_call or torch.export have put there is not written to."""
        found, own = self._find(module), module.__dict__.get(self._tensor_name)
        if found is not None and own is not None:
            self._lent = own
            link(module, self._tensor_name, found[0] * found[1])

    def give_back(self, module: nn.Module, *_: Any) -> None:
        """Let the module read its Parameter again. A forward hook too."""
        if self._lent is not None:
            link(module, self._tensor_name, self._lent)
            self._lent = None

    def _find_for_gradient(self) -> tuple[Tensor, Tensor] | None:
        module = self._module()
        if module is None:
            return None
        if self.sharded:
            self.relink(module)  # FSDP has put the sharded parameter back
        return self._find(module)

    def before_load(self, module: nn.Module, *_: Any) -> None:
        """load_state_dict pre-hook. A sharded mask can only be copied into one that is sharded too."""
        if self._find(module):
            self._place_mask(module)

    def after_load(self, module: nn.Module, incompatible_keys: Any) -> None:
        """load_state_dict post-hook. ``assign=True`` may have brought a mask of another type, and another Parameter."""
        mask = module._buffers.get(self._mask_key)
        if mask is not None and mask.dtype is not torch.bool and self._find(module):
            module._buffers[self._mask_key] = mask != 0
        self.hold(module)

    def tensors(self) -> list[Tensor]:
        """What an optimizer may have: the Parameter, or the sharded one while FSDP has put another in its place."""
        module = self._module()
        weight = None if module is None else module._parameters.get(self._weight_key)
        trained = None if self._gradient is None else self._gradient.weight
        return [tensor for tensor in (weight, trained) if tensor is not None]

    def known_zeros(self) -> tuple[Tensor, Tensor] | None:
        """Weight and mask, if the weight and its gradient are known to be zero at the pruned entries, on the host."""
        module = None if self._zeros is None else self._module()
        known = None if module is None else self._attached(module)
        if known is None or not self._has_zeros(*known):
            return None
        if (gradient := known[0].grad) is None:
            return known
        return known if self._gradient is not None and self._gradient.is_masked(gradient, known[1]) else None

    def after_step(self, known: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        """Note that the zeros are still there if the step was known to keep them, else return as :meth:`unheld`."""
        if known is not None:
            self._zeros = Stamp(*known)
            return None
        module = self._module()
        if module is None:
            return None
        unheld, trained = self.unheld(module), None if self._gradient is None else self._gradient.weight
        if unheld is None and is_dtensor(trained) and (found := self._find(module)) and found[0] is not trained:
            restore_zeros_(trained, found[1])  # FSDP keeps the weight gathered
        return unheld

    def remove(self, module: nn.Module) -> None:
        """Make the pruning permanent, for PyTorch's prune.remove: the same Parameter, its old name, its old place."""
        self.hold(module)
        fold_(module)
        self.release(module)
        del module._buffers[self._mask_key]
        module.__dict__.pop(self._tensor_name, None)
        rename_parameter(module, self._weight_key, self._tensor_name)

    def release(self, module: nn.Module) -> None:
        """Take away all that holds the mask, but for the forward pre-hook."""
        self._release_gradient()
        unwatch(self)
        for hooks in (module._load_state_dict_pre_hooks, module._load_state_dict_post_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if getattr(getattr(hook, "hook", hook), "__self__", None) is self:  # PyTorch wraps pre-hooks
                    del hooks[key]

    def _release_gradient(self) -> None:
        if self._gradient is not None:
            self._gradient.release()
        self._gradient = None


def _runs_eagerly(weight: Tensor | None) -> TypeGuard[nn.Parameter]:
    """Whether a forward runs now, no trace of one, and with the module's own weight."""
    return isinstance(weight, nn.Parameter) and not (torch.compiler.is_compiling() or torch._C._is_tracing())
