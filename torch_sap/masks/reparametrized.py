"""Warnings about modules that compute their weight from other parameters."""

from __future__ import annotations

import warnings

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.weight_norm import WeightNorm

from torch_sap.distributed.replicas import unwrap


def warn_of_reparametrized(model: nn.Module, stacklevel: int) -> None:
    """Warn about modules whose weight is computed, with their paths and what to do.

    ``torch.nn.utils.parametrize`` keeps the values under another name, which is not pruned; the older
    ``torch.nn.utils.weight_norm`` keeps lengths and directions of the rows, of which the directions are pruned.
    """
    modules = [(path or "the model", module) for path, module in unwrap(model).named_modules()]
    for found, warning in (
        (
            [path for path, module in modules if _is_parametrized(module)],
            "by torch.nn.utils.parametrize, and it is not pruned: {}. Call "
            "parametrize.remove_parametrizations(module, 'weight') before pruning, or leave them dense",
        ),
        (
            [p for p, m in modules if any(isinstance(hook, WeightNorm) for hook in m._forward_pre_hooks.values())],
            "from weight_g and weight_v, and weight_v is pruned by its own magnitudes: {}. Call "
            "torch.nn.utils.remove_weight_norm(module) before pruning, or exclude them",
        ),
    ):
        if found:
            text = warning.format(", ".join(found))
            warnings.warn(f"these modules compute their weight {text}", stacklevel=stacklevel + 1)


def _is_parametrized(module: nn.Module) -> bool:
    return parametrize.is_parametrized(module) and any("weight" in name for name in module.parametrizations)  # type: ignore[union-attr]
