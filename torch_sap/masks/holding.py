"""A tensor of a module gets a mask that is held in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from torch_sap.distributed.replicas import check_agreement, groups_of_copies
from torch_sap.masks.interrupts import complete
from torch_sap.masks.linking import hooks_of, load_hooks_of, rename_parameter
from torch_sap.masks.masking import InPlaceMask
from torch_sap.masks.parameters import Prunable
from torch_sap.masks.standardized import mask_standardised
from torch_sap.masks.zeros import restore_all_zeros_


def hold_mask(module: nn.Module, name: str, mask: Tensor) -> None:
    """Give a tensor of a module a mask that is held in place, from whatever form it is in.

    The zeros are not there yet: call :func:`torch_sap.masks.zeros.restore_all_zeros_` for all tensors that got a mask.

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
    for left in load_hooks_of(module):
        if left._tensor_name == name:
            left.release(module)
    if name in module._parameters:
        rename_parameter(module, name, name + "_orig")
    hook = InPlaceMask(module, name)
    module.__dict__.pop(name, None)
    module.register_buffer(name + "_mask", mask)
    module.register_forward_pre_hook(hook)
    before_load: Any = module.register_load_state_dict_pre_hook
    before_load(hook.before_load)
    after_load: Any = module.register_load_state_dict_post_hook
    after_load(hook.after_load)
    hook.attach(module)


def hold_masks(prunables: Sequence[Prunable], masks: Sequence[Tensor | None]) -> None:
    """Prune tensors in place with masks, wherever they are used: all of them or, if there is no memory, none.

    None stands for nothing pruned.
    """
    whole = [prunable.whole(mask) for prunable, mask in zip(prunables, masks, strict=True)]

    def hold() -> None:
        for prunable, mask in zip(prunables, whole, strict=True):
            for module, name in prunable.holders:
                hold_mask(module, name, mask)
                mask_standardised(module)
        restore_all_zeros_([(p.weight, held) for p in prunables if (held := p.mask) is not None])

    complete(hold)


def check_copies(model: object, prunables: Sequence[Prunable], masks: Sequence[Tensor | None]) -> None:
    """Raise a RuntimeError if processes that are known to have copies of the same weights made different masks."""
    groups = groups_of_copies(model, [prunable.weight for prunable in prunables])
    check_agreement(masks, groups, prunables[0].weight.device)
