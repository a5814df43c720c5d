"""Masks that hold behind weight standardization: convolutions of timm, and of BiT in transformers.

These convolutions do not compute with their weight but with ``S(w) = gain * (w - mean) / sqrt(var + eps)``, mean and
variance over the entries of an output channel. Subtracting a mean turns pruned zeros into other numbers. A masked one
therefore computes with

    ``mask * S(v)``    where    ``v = mask * (w - mean of w over the unpruned entries of the channel)``

``v`` has mean zero, so that the module's own formula S keeps its zeros up to rounding, and the last product makes them
exact. A channel from which nothing is pruned is computed as before, bit for bit. A plain module whose weight is ``v``
computes the same, so ``remove`` leaves ``v`` (:func:`fold_`).

The mask is applied in a ``forward`` of the module's own, the only place that sees the standardized weight.

Sources: Qiao et al., "Weight Standardization", arXiv 1903.10520; Brock et al., arXiv 2101.08692 (scaled).
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_sap.distributed.sharded import is_dtensor

_CLASSES = {
    "timm.layers.std_conv": ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"),
    "transformers.models.bit.modeling_bit": ("WeightStandardizedConv2d",),
}


class StandardizedForward:
    """The ``forward`` of a pruned standardized convolution."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)  # a strong one would be a cycle, and memory that waits for the collector

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self._module()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._module = weakref.ref(state["module"])

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of an input (N, C, H, W)."""
        module: Any = self._module()
        if "weight_mask" not in module._buffers:  # PyTorch's methods took the tensor over and removed the mask
            out: Tensor = type(module).forward(module, x)
            return out
        if getattr(module, "same_pad", False):
            x = sys.modules["timm.layers.padding"].pad_same(x, module.kernel_size, module.stride, module.dilation)
        elif getattr(module, "pad", None) is not None:
            x = module.pad(x)
        weight = effective_weight(module)
        return F.conv2d(x, weight, module.bias, module.stride, module.padding, module.dilation, module.groups)


def is_standardized(module: nn.Module) -> bool:
    """Whether a module is one of these standardized convolutions, or a subclass that computes as they do."""
    return any(
        (kind := getattr(sys.modules.get(path), name, None)) is not None and type(module).forward is kind.forward
        for path, names in _CLASSES.items()
        for name in names
    )


def is_masked(module: nn.Module) -> bool:
    """Whether a module applies its mask behind the standardization."""
    return isinstance(getattr(module.__dict__.get("forward"), "__self__", None), StandardizedForward)


def mask_standardized(module: nn.Module) -> None:
    """Make a masked module apply its mask behind the standardization, if it standardizes."""
    if is_standardized(module):
        module.__dict__["forward"] = StandardizedForward(module).forward  # a method, as torch.export wants it


def fold_(module: nn.Module) -> None:
    """Before a mask is removed, set the weight to the value with which the module's own forward computes the same."""
    if not is_masked(module):
        return
    del module.__dict__["forward"]
    weight, mask = module._parameters.get("weight_orig"), module._buffers.get("weight_mask")
    if weight is None or mask is None:
        return
    with torch.no_grad():
        weight.copy_(centered(weight.double(), mask))


def effective_weight(module: Any) -> Tensor:
    """Weight that a pruned standardized convolution computes with: exact zeros where the mask is False."""
    weight, mask = module.weight_orig, module.weight_mask  # by these names torch.fx can trace them
    if is_dtensor(mask) and not is_dtensor(weight):  # FSDP has gathered the weight for this forward
        mask = mask.full_tensor()
    gain = (module.gain * module.scale).view(-1) if hasattr(module, "gain") else None
    rows = centered(weight, mask).reshape(1, module.out_channels, -1)
    standardized: Tensor = F.batch_norm(rows, None, None, weight=gain, training=True, momentum=0.0, eps=module.eps)
    return standardized.reshape_as(weight).masked_fill(mask == 0, 0)


def centered(weight: Tensor, mask: Tensor) -> Tensor:
    """The masked weight (C, ...), with mean zero over the unpruned entries of each output channel that lost some."""
    dims = list(range(1, mask.dim()))
    pruned = mask == 0
    kept = (~pruned).sum(dims, keepdim=True)
    mean = weight.masked_fill(pruned, 0).sum(dims, keepdim=True) / kept.clamp(min=1)
    lost_some = kept < mask.shape[1:].numel()  # any() over several dimensions is unknown to DTensors of PyTorch 2.9
    return (weight - mean * lost_some).masked_fill(pruned, 0)
