"""What torch_sap finds to prune in a timm architecture, without its values, and which to test for real."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from timm.models import _registry
from torch import nn

import torch_sap

MADE_WITH = f"timm {timm.__version__}, torch {torch.__version__.partition('+')[0]}"
STANDARDIZED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)


@dataclass(frozen=True)
class Structure:
    """One architecture.

    Attributes:
        model: Its name in timm.
        module: The module of timm that has it.
        tensors: Weights that torch_sap prunes; shared ones count once.
        weights: Entries of all of them.
        parameters: Entries of all parameters.
        share: weights / parameters.
        standardized: Convolutions that standardize their weight.
        uncalled: Attention modules that read the weight of their qkv layer without calling it.
        failure: Empty, or what went wrong.
        made_with: Versions.
    """

    model: str
    module: str
    tensors: int = 0
    weights: int = 0
    parameters: int = 0
    share: float = 0.0
    standardized: int = 0
    uncalled: int = 0
    failure: str = ""
    made_with: str = MADE_WITH


def module_of(name: str) -> str:
    """The module of timm.models that has an architecture."""
    return _registry._model_to_module[name]


def on_meta(name: str, **kwargs: Any) -> nn.Module:
    """An architecture without values."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        return timm.create_model(name, **kwargs)


def structure(name: str) -> Structure:
    """Build an architecture on the meta device and count what torch_sap prunes of it."""
    try:
        model = on_meta(name)
        found = {id(weight): weight for weight in (getattr(*pair) for pair in torch_sap.prunable_parameters(model))}
        weights = sum(weight.numel() for weight in found.values())
        parameters = sum(parameter.numel() for parameter in model.parameters())
        modules = list(model.modules())
        return Structure(
            name,
            module_of(name),
            tensors=len(found),
            weights=weights,
            parameters=parameters,
            share=weights / parameters,
            standardized=sum(type(module) in STANDARDIZED for module in modules),
            uncalled=sum(hasattr(module, "qkv") and getattr(module, "q_bias", None) is not None for module in modules),
            failure="" if found else "nothing to prune",
        )
    except Exception as error:
        return Structure(name, module_of(name), failure=f"{type(error).__name__}: {error}".splitlines()[0])


def choose(rows: Iterable[Mapping[str, str]]) -> list[str]:
    """The smallest architecture of each module of timm, and of each kind of convolution and attention within it."""
    smallest: dict[tuple[str, bool, bool], tuple[int, str]] = {}
    for row in rows:
        if row["failure"]:
            continue
        kind = (row["module"], int(row["standardized"]) > 0, int(row["uncalled"]) > 0)
        size = (int(row["parameters"]), row["model"])
        smallest[kind] = min(size, smallest.get(kind, size))
    return [name for _, name in sorted(smallest.values())]
