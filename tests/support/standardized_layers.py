"""Standardized convolutions of timm and transformers, and what a masked one computes, written out."""

from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("timm")
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from timm.layers.padding import pad_same

KINDS = [StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame]
if find_spec("transformers") and import_module("transformers").utils.is_torch_available():
    from transformers.models.bit.modeling_bit import WeightStandardizedConv2d

    class BitConv2d(WeightStandardizedConv2d):
        """With a padding that pickle can take."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, padding=1, **kwargs)

    KINDS.append(BitConv2d)
every_kind = pytest.mark.parametrize("kind", KINDS)


def layer(kind, dtype=torch.float64):
    """A convolution with bias, gains that differ, and weights that are far from centered."""
    torch.manual_seed(4)
    made = kind(4, 6, 3, stride=2, groups=2, bias=True).to(dtype)
    with torch.no_grad():
        made.weight.add_(0.1)
        if hasattr(made, "gain"):
            made.gain.copy_(torch.linspace(0.5, 2, 6).view(6, 1, 1, 1))
    return made


def images(dtype=torch.float64):
    return torch.randn(2, 4, 7, 7, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)


def by_hand(module, mask, x):
    """The same convolution of a dense module, channel by channel, as the documentation says."""
    rows = []
    for row, kept in zip(module.weight.flatten(1), mask.flatten(1), strict=True):
        if kept.any() and not kept.all():
            row = row - row[kept].mean()
        row = row * kept
        rows.append((row - row.mean()) / (row.var(unbiased=False) + module.eps).sqrt() * kept)
    weight = torch.stack(rows).view_as(module.weight)
    if hasattr(module, "gain"):
        weight = weight * module.gain * module.scale
    if getattr(module, "same_pad", False):
        x = pad_same(x, module.kernel_size, module.stride)
    elif getattr(module, "pad", None) is not None:
        x = module.pad(x)
    return F.conv2d(x, weight, module.bias, module.stride, module.padding, module.dilation, module.groups)


def record(monkeypatch):
    """The weights that F.conv2d receives from now on, in turn."""
    weights, real = [], F.conv2d

    def recording(x, weight, *args, **kwargs):
        weights.append(weight.detach())
        return real(x, weight, *args, **kwargs)

    monkeypatch.setattr(F, "conv2d", recording)
    return weights
