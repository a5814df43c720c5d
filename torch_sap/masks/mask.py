"""Masks held in place, in PyTorch's form (``weight_orig``, ``weight_mask``, a hook) but without a second tensor.

``module.weight`` is the Parameter ``weight_orig`` itself, and its pruned entries are zeros
(:mod:`torch_sap.masks.zeros` keeps them so). A hook is found by PyTorch's own functions (``prune.is_pruned``,
``prune.remove``, a foreign method on top), holds no mask, and looks the weight and the mask up in its module each time:
they may be replaced (``load_state_dict(assign=True)``, ``to_empty``).
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from torch_sap.decide.keys import check_dtype, is_prunable
from torch_sap.distributed.fsdp import rename, reshard, sharded_parameter
from torch_sap.distributed.replicas import check_agreement, groups_of_copies
from torch_sap.distributed.sharded import is_dtensor, local, place, same_placement
from torch_sap.masks.parameters import Prunable
from torch_sap.masks.plain import save_plainly
from torch_sap.masks.small import Pair
from torch_sap.masks.standardized import fold_, mask_standardized
from torch_sap.masks.zeros import MARK, MaskedGradient, forget, renew_hooks, restore_zeros_, unwatch, watch

PRODUCT = "_torch_sap_product"
"""Attribute of a weight times its mask, with which a layer computes one call."""

OFFLOADED = "call accelerate.hooks.remove_hook_from_submodules(model), then torch_sap.remove(model)"
"""What to do about a pruned model that accelerate has offloaded."""


class Lent(NamedTuple):
    """A product with which a layer computes one call."""

    source: Tensor
    """What it is the product of: a given tensor, or the Parameter in a trace."""
    before: Any
    """What ``module.weight`` was before; None if it was not linked."""
    by_layer: bool
    """Whether the layer's own hook lent it, and gives it back, not one around."""


class InPlaceMask(prune.BasePruningMethod):
    """The hook of a tensor that torch_sap prunes: ``{name}_orig`` and ``{name}_mask`` of one module."""

    PRUNING_TYPE = "unstructured"

    def __init__(self, module: nn.Module, name: str, path: str = "") -> None:
        self._bind(module, name, path or name, (module._parameters, module._buffers))

    def _bind(self, module: nn.Module | None, name: str, path: str, dicts: Any) -> None:
        self._tensor_name, self.path = name, path
        self._dicts = dicts  # the module's parameters and buffers, for a layer that takes its place (adopt)
        self._weight_key, self._mask_key = name + "_orig", name + "_mask"
        # a strong reference would be a cycle, and memory that waits for the collector
        self._module: Callable[[], nn.Module | None] = (lambda: None) if module is None else weakref.ref(module, forget)
        self.number = -1  # in the forward pre-hooks of the module
        self.weight: Tensor | None = None  # the Parameter whose gradients are masked
        self.covered = False  # a running forward around the module has restored the zeros
        self.sharded = False  # the mask is a DTensor
        self._gradient: MaskedGradient | None = None
        self._mark: int | None = None  # of the Parameter, when the gradient's hook was registered
        self._lent: list[Lent] = []
        self._managed = False  # by FSDP, as far as is known
        self._copies: list[weakref.ref[InPlaceMask]] = []
        self.copied_from: Callable[[], InPlaceMask | None] | None = None  # until the copy is used on its own
        self.outdated: int | None = None  # how often the copy had been written to when the original was pruned again
        watch(self)
        save_plainly()

    def __getstate__(self) -> dict[str, Any]:
        module, name, path = self._module(), self._tensor_name, self.path
        return {"module": module, "name": name, "path": path, "dicts": self._dicts, "number": self.number}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._bind(state["module"], state["name"], state["path"], state["dicts"])
        self.number = state["number"]

    def __deepcopy__(self, memo: dict[int, Any]) -> InPlaceMask:
        copied = memo[id(self)] = InPlaceMask.__new__(InPlaceMask)
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        copied.copied_from = weakref.ref(self)
        self._copies = [*(alive for alive in self._copies if alive() is not None), weakref.ref(copied)]
        return copied

    def outdate_copies(self) -> None:
        """Note how often each copy has been written to; one that is written to later is an average with old masks."""
        for reference in self._copies:
            if (copied := reference()) is not None and (found := copied.find()) is not None:
                copied.outdated = writes(found[0])

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """Return the mask as it is: what to prune is decided elsewhere, for all tensors together."""
        return default_mask

    def find(self) -> Pair | None:
        """The weight and its mask; None if they are gone or another pruning method holds them."""
        module = self._module()
        if module is None:
            return None
        if self.sharded:
            self.relink(module)  # FSDP may have put the sharded parameter back
        return self._find(module)

    def _find(self, module: nn.Module) -> Pair | None:
        weight, mask = module._parameters.get(self._weight_key), module._buffers.get(self._mask_key)
        if weight is None:
            weight = module.__dict__.get(self._weight_key)  # a plain tensor, put there for one call by tensordict
        hook: Any = module._forward_pre_hooks.get(self.number)
        if weight is None or mask is None or hook is not self:
            return None
        if type(weight) is not nn.Parameter and not self.sharded and is_dtensor(weight):
            mask = self._place_mask(module)  # fully_shard came after the pruning
        return weight, mask

    def attached(self, module: nn.Module) -> Pair | None:
        """Make the module read the Parameter and mask its gradients; return both tensors, None if there are none."""
        weight, mask = module._parameters.get(self._weight_key), module._buffers.get(self._mask_key)
        if weight is None or mask is None or self.sharded or (self._gradient is None and weight.requires_grad):
            return self._attach(module)
        known = (
            weight is self.weight
            and weight is module.__dict__.get(self._tensor_name)
            and weight.__dict__.get(MARK) == self._mark  # swap_tensors takes it away, and the gradient's hook with it
        )
        return (weight, mask) if known else self._attach(module)

    def _attach(self, module: nn.Module) -> Pair | None:
        self._take_replacement(module)
        found = self._find(module)
        if found is None:
            return None
        self._check_link(module)
        if not isinstance(found[0], nn.Parameter):  # given to functional_call
            self._lend(module)
            return None
        self._lent.clear()  # left by a torch.export that failed
        weight, mask = found[0], self._place_mask(module)
        shard = None if self.sharded else sharded_parameter(module, self._weight_key)
        if shard is not None:  # fully_shard came after the pruning, and has gathered the weight for its first forward
            module._buffers[self._mask_key], self.sharded = place(mask, like=shard), True
        self.check()
        link(module, self._tensor_name, weight)
        if not same_placement(weight, mask):
            self._check_gathered(module)
            return None
        self._mask_gradient_of(weight if shard is None else shard)
        return weight, mask

    def _mask_gradient_of(self, weight: nn.Parameter) -> None:
        if weight is not self.weight or weight.__dict__.get(MARK) != self._mark:
            self._release_gradient()
            if weight is self.weight:
                renew_hooks(weight)
            self.weight = weight
            forget()
        if weight.requires_grad and self._gradient is None:
            self._gradient = MaskedGradient(weight, self)
        self._mark = weight.__dict__.get(MARK)

    def _take_replacement(self, module: nn.Module) -> None:
        """Prune the parameter that somebody has put in the place of ours."""
        replacement = module._parameters.get(self._tensor_name)
        if isinstance(replacement, nn.Parameter) and self._weight_key in module._parameters:
            module._parameters[self._weight_key] = module._parameters.pop(self._tensor_name)

    def check(self) -> None:
        """Raise an error that names the weight if it has been changed so that its mask cannot hold."""
        module = self._module()
        if module is None or (found := self._find(module)) is None:
            return
        weight, mask = found
        if weight.shape != mask.shape:
            raise RuntimeError(
                f"{self.path} must keep its shape {tuple(mask.shape)} while it is pruned, but was replaced by one of "
                f"shape {tuple(weight.shape)}; call torch_sap.remove(model) first, before resizing or replacing it"
            )
        if weight.is_meta and (not mask.is_meta or hasattr(module, "_hf_hook")):
            raise RuntimeError(
                f"{self.path} must not be offloaded while it is pruned, but is on the meta device; {OFFLOADED}, "
                "and offload the model then"
            )
        if not weight.is_meta and isinstance(weight, nn.Parameter):
            try:
                check_dtype(weight, self.path)
            except TypeError as error:
                raise TypeError(f"{error}; call torch_sap.remove(model) before converting the model") from None

    def _place_mask(self, module: nn.Module) -> Tensor:
        """The mask, sharded like the weight even if fully_shard came after the pruning."""
        weight, mask = module._parameters[self._weight_key], module._buffers[self._mask_key]
        assert weight is not None and mask is not None
        if is_dtensor(weight) and not is_dtensor(mask):
            mask = module._buffers[self._mask_key] = place(mask, like=weight)
        self.sharded = is_dtensor(mask)
        return mask

    def _check_gathered(self, module: nn.Module) -> None:
        """Raise a RuntimeError unless FSDP explains why weight and mask are placed differently."""
        self._managed = self._managed or sharded_parameter(module, self._weight_key) is not None
        if not self._managed:
            raise RuntimeError(
                f"{self._tensor_name}_orig and {self._tensor_name}_mask of {type(module).__name__} must be placed "
                "alike, but one is a DTensor and the other is none or lies elsewhere; load or distribute both"
            )

    @property
    def changes(self) -> bool:
        """Whether ``module.weight`` is another tensor during a forward than after it."""
        return self.sharded or bool(self._lent)

    def relink(self, module: nn.Module) -> None:
        """Point ``module.weight`` at the current tensor: FSDP swaps it for a forward and a backward."""
        if self.sharded and (found := self._find(module)):
            link(module, self._tensor_name, found[0])

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        """Forward pre-hook."""
        weight = module._parameters.get(self._weight_key)
        if self.covered and weight is self.weight is not None and weight is module.__dict__.get(self._tensor_name):
            return
        if is_replica(module):
            self.link_replica(module)
            return
        if weight is None and self._weight_key not in module.__dict__:
            self.adopt(module)(module, inputs)
            return
        if self.covered and self.given(module) is None and not (isinstance(weight, nn.Parameter) and runs_eagerly()):
            return
        if self.covered and self.sharded and isinstance(weight, nn.Parameter):  # gathered by FSDP
            link(module, self._tensor_name, weight)
            return
        around = len(self._lent)
        if not runs_eagerly():
            self.trace(module)
        elif (pair := self.attached(module)) is not None:
            restore_zeros_([pair])
        if len(self._lent) > around:
            self._lent[-1] = Lent(self._lent[-1].source, self._lent[-1].before, by_layer=True)
            if self.give_back not in module._forward_hooks.values():
                module.register_forward_hook(self.give_back, always_call=True)

    def given(self, module: nn.Module) -> Tensor | None:
        """The plain tensor that a call has been given for the weight, unless one around has lent its product."""
        weight = module._parameters.get(self._weight_key)
        if weight is None:
            weight = module.__dict__.get(self._weight_key)
        if weight is self.weight or weight is None or isinstance(weight, nn.Parameter):
            return None
        return None if self._lent and self._lent[-1].source is weight else weight

    def adopt(self, module: nn.Module) -> InPlaceMask:
        """Prune the layer that has taken the place of ours, and our hook and Parameter (as prepare_qat makes them).

        Returns:
            The hook of that layer.

        Raises:
            RuntimeError: if the layer has another weight.
        """
        weight, mask = self._dicts[0].get(self._weight_key), self._dicts[1].get(self._mask_key)
        if weight is None or mask is None or module._parameters.get(self._tensor_name) is not weight:
            raise self.lost(self.path, module)
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is self]:
            del module._forward_pre_hooks[key]
        self._release_gradient()
        return hold_mask(module, self._tensor_name, mask, self.path)

    @property
    def module(self) -> nn.Module | None:
        """The pruned module; None if it is gone."""
        return self._module()

    @property
    def masks_gradient(self) -> bool:
        """Whether a hook masks the gradient of the weight."""
        return self._gradient is not None

    @staticmethod
    def lost(path: str, module: nn.Module | None = None) -> RuntimeError:
        """The error for a weight that is used without its mask."""
        kind = "" if module is None else f" ({type(module).__name__})"
        return RuntimeError(
            f"the layer{kind} that uses {path} must be the one that was pruned, but it was converted, replaced or "
            "traced since, and the mask was left behind; call torch_sap.remove(model) first, then convert the model"
        )

    def trace(self, module: nn.Module) -> None:
        """Make the zeros a part of the graph of a traced forward."""
        found = self._find(module)
        if found is None:
            return
        self._check_link(module)
        weight, mask = found
        if torch.compiler.is_dynamo_compiling() and isinstance(weight, nn.Parameter):
            with torch.no_grad():  # where ``.data`` is not allowed
                weight.masked_fill_(~mask, 0)
        else:
            self._lend(module)

    def _lend(self, module: nn.Module) -> None:
        """Compute one call with weight * mask: tensors given by functional_call or torch.export are not written to."""
        found, own = self._find(module), module.__dict__.get(self._tensor_name)
        if found is not None:
            product = found[0] * found[1]
            self._lent.append(Lent(found[0], own, by_layer=False))
            if not torch.compiler.is_dynamo_compiling():
                product.__dict__[PRODUCT] = True
            link(module, self._tensor_name, product)

    def _check_link(self, module: nn.Module) -> None:
        """Raise a RuntimeError if somebody has put a plain tensor in the place of ``module.weight``."""
        own = module._parameters.get(self._tensor_name)  # where functional_call has put back the Parameter before
        if own is not None and own is module._parameters.get(self._weight_key):
            return  # given under both names
        own = module.__dict__.get(self._tensor_name) if own is None else own
        if isinstance(own, Tensor) and not (isinstance(own, nn.Parameter) or self.sharded or PRODUCT in own.__dict__):
            raise RuntimeError(
                f"{self.path} must not be replaced by a plain tensor while it is pruned; give functional_call and "
                f"tensordict {self.path}_orig, its name since the first pruning (make torchrl's losses after it)"
            )

    def give_back(self, module: nn.Module, *of_hook: Any) -> None:
        """Point ``module.weight`` back at the Parameter, or at the product of a call around; also a forward hook."""
        if not self._lent or self._lent[-1].by_layer != bool(of_hook):
            return
        before = self._lent.pop().before
        if before is None:
            module.__dict__.pop(self._tensor_name, None)
        else:
            link(module, self._tensor_name, before)

    def link_replica(self, module: nn.Module) -> None:
        """Make a module that DataParallel has copied to a device compute with that device's weight times its mask.

        A copy has plain tensors for parameters, lives for one forward, and refers to the Parameter of its original.
        """
        weight, mask = module.__dict__.get(self._weight_key), module._buffers.get(self._mask_key)
        if weight is not None and mask is not None:
            link(module, self._tensor_name, weight * mask)
            mask_standardized(module)

    def before_load(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """load_state_dict pre-hook: a plain weight is taken as ``weight_orig``; its mask stays, as a missing key.

        Without that, ``strict=False`` would skip the weight silently. A sharded mask can only be copied into one that
        is sharded too.
        """
        self._take_replacement(module)
        if not self._find(module):
            return
        mask = self._place_mask(module)
        plain, key = prefix + self._tensor_name, prefix + self._weight_key
        if plain in state and key not in state:
            weight = state[key] = state.pop(plain)
            alike = same_placement(weight, mask) and weight.shape == mask.shape and not weight.is_meta
            if alike and bool((local(weight).to(local(mask).device)[~local(mask)] != 0).any()):
                warnings.warn(
                    "the loaded state_dict has plain weights that are not zero where the model is pruned; they are "
                    "set to zero there. To load another model, call torch_sap.remove(model) first",
                    stacklevel=2,
                )

    def after_load(self, module: nn.Module, incompatible_keys: Any) -> None:
        """load_state_dict post-hook. ``assign=True`` may have brought another Parameter, and a mask of another type."""
        mask = module._buffers.get(self._mask_key)
        if mask is not None and mask.dtype is not torch.bool and self._find(module):
            module._buffers[self._mask_key] = mask != 0
        self.copied_from = None
        self.hold(module)

    def after_save(self, module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        """state_dict hook: where a plain weight was saved, make it ``weight_orig`` and add the mask.

        A layer with code of its own for that (PyTorch Geometric's) saves it so, and one whose weight functional_call
        has put back under the name that it was called by.
        """
        plain, mask = prefix + self._tensor_name, module._buffers.get(self._mask_key)
        if plain in state and mask is not None and self._find(module) and "_save_to_state_dict" not in module.__dict__:
            state[prefix + self._weight_key] = state.pop(plain)
            state.setdefault(prefix + self._mask_key, mask)

    def hold(self, module: nn.Module) -> None:
        """Restore the zeros now."""
        self.covered = False
        if (pair := self.attached(module)) is not None:
            restore_zeros_([pair])

    def remove(self, module: nn.Module) -> None:
        """Make the pruning permanent, for prune.remove: the same Parameter under its old name in its old place."""
        if self._fits(module):
            module.__dict__.pop(self._tensor_name, None)  # whatever was put there
            self.hold(module)
            fold_(module)
        self.release(module)
        finish_form(module, self._tensor_name)

    def _fits(self, module: nn.Module) -> bool:
        """Whether there are a weight and a mask that can be applied to it."""
        self._take_replacement(module)
        try:
            self.check()
        except (RuntimeError, TypeError):
            return False
        return self._module() is module and self._find(module) is not None

    def release(self, module: nn.Module) -> None:
        """Remove everything but the forward pre-hook."""
        self._release_gradient()
        if self.weight is not None:
            self.weight.__dict__.pop(MARK, None)
        self.weight = None
        unwatch(self)
        for hooks in (
            module._state_dict_hooks,
            module._load_state_dict_pre_hooks,
            module._load_state_dict_post_hooks,
            module._forward_hooks,
        ):
            for key, hook in list(hooks.items()):
                if getattr(getattr(hook, "hook", hook), "__self__", None) is self:  # PyTorch wraps pre-hooks
                    del hooks[key]

    def _release_gradient(self) -> None:
        if self._gradient is not None:
            self._gradient.handle.remove()
            forget()
        self._gradient = None


def is_replica(module: nn.Module) -> bool:
    """Whether this is a copy that torch.nn.DataParallel has made for one forward."""
    return bool(module.__dict__.get("_is_replica", False))


def writes(weight: Tensor) -> int:
    """How often a weight was written to, not counting zeros that we restore."""
    return 0 if weight.is_inference() else weight._version


def runs_eagerly() -> bool:
    """Whether the forward runs eagerly, not in a trace."""
    return not (torch.compiler.is_compiling() or torch._C._is_tracing())


def hooks_of(module: nn.Module, name: str) -> list[prune.BasePruningMethod]:
    """The pruning hooks of a tensor of a module, ours and foreign ones."""
    hooks = module._forward_pre_hooks.values()
    return [hook for hook in hooks if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == name]


def load_hooks_of(module: nn.Module) -> set[InPlaceMask]:
    """Our hooks on the loading of a module, including those whose tensor another method has taken over.

    PyTorch tells a hook neither that another method was applied on top of it nor that the two were removed.
    """
    owners = {getattr(hook, "__self__", None) for hook in module._load_state_dict_post_hooks.values()}
    return {owner for owner in owners if isinstance(owner, InPlaceMask)}


def check_not_offloaded(model: nn.Module) -> None:
    """Raise a RuntimeError if accelerate, which knows weights by their names, has taken pruned ones out of a model."""
    for path, module in model.named_modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.is_meta and hasattr(module, "_hf_hook") and name.endswith("_orig"):
                name = f"{path}.{name.removesuffix('_orig')}".removeprefix(".")
                raise RuntimeError(f"{name} must not be offloaded while its mask is removed; {OFFLOADED}")


def remove_masks(module: nn.Module) -> None:
    """Make the masks of a module permanent, of whatever method, and take away what a conversion has left of them."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, prune.BasePruningMethod):
            name = hook._tensor_name
            if isinstance(hook, InPlaceMask) and hook._weight_key not in module._parameters:
                with suppress(RuntimeError):
                    hook.adopt(module)
            if isinstance(hook, InPlaceMask) or _left(module, name):
                prune.remove(module, name)
            else:
                del module._forward_pre_hooks[key]
    for left in load_hooks_of(module):
        left.release(module)
    for name in [key.removesuffix("_mask") for key in module._buffers if key.endswith("_mask")]:
        if (pair := _left(module, name)) is not None:  # their hook is gone
            if pair[0].shape == pair[1].shape and is_prunable(pair[0]):
                pair[0].masked_fill_(pair[1] == 0, 0)
            finish_form(module, name)


def _left(module: nn.Module, name: str) -> Pair | None:
    """The weight of a pruned tensor, or what replaced it, and its mask, with or without their hook."""
    mask = module._buffers.get(name + "_mask")
    weight = module._parameters.get(name + "_orig")
    if weight is None or mask is None:
        return None
    replaced = module._parameters.get(name)
    return (weight if replaced is None else replaced), mask


def link(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Set ``module.name`` to a tensor, past nn.Module's own bookkeeping."""
    module.__dict__[name] = tensor
    if name in (flat_names := module.__dict__.get("_flat_weights_names", ())):  # recurrent modules read this list
        module.__dict__["_flat_weights"][flat_names.index(name)] = tensor


def finish_form(module: nn.Module, name: str) -> None:
    """Give what is left of a pruned tensor its plain form: no mask, and the parameter under its name in its place."""
    module._buffers.pop(name + "_mask", None)
    if name + "_orig" in module._parameters:
        module.__dict__.pop(name, None)
        if name in module._parameters:  # put there since
            module._parameters[name + "_orig"] = module._parameters.pop(name)
        rename_parameter(module, name + "_orig", name)


def rename_parameter(module: nn.Module, old: str, new: str) -> None:
    """Rename a parameter and keep its place, for optimizers and averages that go by order."""
    parameters = [(new if key == old else key, value) for key, value in module._parameters.items()]
    module._parameters.clear()
    module._parameters.update(parameters)
    rename(module, old, new)


def hold_masks(prunables: Sequence[Prunable], masks: Sequence[Tensor | None]) -> None:
    """Prune tensors in place in every module that uses them; None means nothing is pruned.

    What can fail for lack of memory is done first. If an exception of any kind comes in the rest, the rest is finished
    and the exception raised again.
    """
    whole = [prunable.whole(mask) for prunable, mask in zip(prunables, masks, strict=True)]

    def hold() -> None:
        reshard(module for prunable in prunables for module, _ in prunable.holders)  # a forward may have gathered them
        known: list[Pair] = []
        for prunable, mask in zip(prunables, whole, strict=True):
            for module, name in prunable.holders:
                hold_mask(module, name, mask, prunable.name, known)
        plain = [pair for pair in known if not is_dtensor(pair[0])]
        if plain:
            torch._foreach_copy_(*map(list, zip(*plain, strict=True)))  # type: ignore[arg-type]
        for buffer, mask in known:
            if is_dtensor(buffer):
                buffer.copy_(mask)
        pairs = [(prunable.weight, prunable.mask) for prunable in prunables]
        restore_zeros_((weight, mask) for weight, mask in pairs if mask is not None and same_placement(weight, mask))

    finish(hold)


def finish(change: Callable[[], object]) -> None:
    """Run a change; if it raises, run it once more to complete it, and raise.

    For changes that only copy values to where they belong: made twice they are the same as made once.
    """
    try:
        change()
    except BaseException:
        change()
        raise


def hold_mask(module: nn.Module, name: str, mask: Tensor, path: str, known: list[Pair] | None = None) -> InPlaceMask:
    """Give a tensor of a module, pruned or not, a mask that is held in place, and return its hook.

    The mask becomes the buffer, unless there is a bool one already, which gets its values, or is added to ``known``
    with them, for the caller to copy them all at once. Errors name the tensor by its path.
    """
    mask_standardized(module)
    hooks = hooks_of(module, name)
    ours = [hook for hook in hooks if isinstance(hook, InPlaceMask)]
    if ours and len(hooks) == 1:
        ours[0].attached(module)  # a mask from before the model was sharded is sharded too
        buffer = module._buffers[name + "_mask"]
        assert buffer is not None
        if known is None:
            buffer.copy_(mask)
        else:
            known.append((buffer, mask))
        ours[0].copied_from = None
        ours[0].outdate_copies()
        return ours[0]
    for key in [key for key, hook in module._forward_pre_hooks.items() if hook in hooks]:
        del module._forward_pre_hooks[key]
    for left in load_hooks_of(module):
        if left._tensor_name == name:
            left.release(module)
    if name in module._parameters:
        rename_parameter(module, name, name + "_orig")
    hook = InPlaceMask(module, name, path)
    module.__dict__.pop(name, None)
    if mask.is_inference():  # which training could not use, nor a later pruning change
        with torch.inference_mode(False):
            mask = mask.clone()
    module.register_buffer(name + "_mask", mask)
    hook.number = module.register_forward_pre_hook(hook).id
    before_load: Any = module.register_load_state_dict_pre_hook
    before_load(hook.before_load)
    after_load: Any = module.register_load_state_dict_post_hook
    after_load(hook.after_load)
    after_save: Any = module._register_state_dict_hook  # the public one takes functions only
    after_save(hook.after_save)
    hook.attached(module)
    return hook


def check_copies(model: object, prunables: Sequence[Prunable], masks: Sequence[Tensor | None]) -> None:
    """Raise a RuntimeError if processes that are known to have copies of the same weights made different masks."""
    groups = groups_of_copies(model, [prunable.weight for prunable in prunables])
    check_agreement(masks, groups, prunables[0].weight.device)
