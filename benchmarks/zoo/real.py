"""A real test of one architecture: pruned in each scope, trained beside a model masked by hand, verified, reloaded."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers.padding import pad_same
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import torch_sap
from zoo.structure import MADE_WITH, STANDARDIZED, module_of

SCOPES = {
    "global": torch_sap.global_unstructured,
    "layer": torch_sap.layer_unstructured,
    "neuron": torch_sap.neuron_unstructured,
}
SIZES = (32, 48, 64, 96, 128, 160, 192, 224, 256, 288, 336, 384, 448, 512)
STEPS = 3
ROUNDING = 1e-5
"""How far losses and outputs may lie apart, relative to the larger. Recorded is how far they do."""


@dataclass(frozen=True)
class Real:
    """What was found of one architecture.

    Attributes:
        model: Its name in timm, "+multihead" with a nn.MultiheadAttention behind it.
        module: The module of timm that has it.
        image: Side of the images, the smallest with which it works and its numbers stay finite.
        tensors: Weights that were pruned.
        remaining_global, remaining_layer, remaining_neuron: Share of their entries that remains in each scope.
        zeros_received: Share of all pruned entries, in all scopes, that were zero where the computation received them.
        unused: Weights that the computation of an image does not use.
        loss_difference: Largest relative difference of a loss to the model masked by hand, in all scopes.
        reload_difference: The same for outputs of a fresh model that loaded the removed model's state.
        seconds: For all of it.
        failure: Empty, or what went wrong.
        made_with: Versions.
    """

    model: str
    module: str
    image: int = 0
    tensors: int = 0
    remaining_global: float = 0.0
    remaining_layer: float = 0.0
    remaining_neuron: float = 0.0
    zeros_received: float = 0.0
    unused: int = 0
    loss_difference: float = 0.0
    reload_difference: float = 0.0
    seconds: float = 0.0
    failure: str = ""
    made_with: str = MADE_WITH


class Attending(nn.Module):
    """A timm model whose features a nn.MultiheadAttention pools: no architecture of timm has one itself."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.attention = nn.MultiheadAttention(backbone.num_features, 4, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        """Attended features (N, tokens, width)."""
        tokens = self.backbone.forward_features(images).flatten(2).transpose(1, 2)
        return self.attention(tokens, tokens, tokens)[0]


def real(name: str) -> Real:
    """Test one architecture."""
    started = time.perf_counter()
    found = Real(name, module_of(name.partition("+")[0]))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = next(_tests(found))
    except Exception as error:
        found = replace(found, failure=f"{type(error).__name__}: {error}".splitlines()[0])
    return replace(found, seconds=round(time.perf_counter() - started, 1))


def create(name: str, **kwargs: Any) -> nn.Module:
    """A timm model with the same weights at every call; of float64 if it standardizes weights.

    Normalizing again and again multiplies differences of rounding, in the dense model as well.
    """
    torch.manual_seed(0)
    name, _, head = name.partition("+")
    model = timm.create_model(name, num_classes=10, **kwargs)
    if any(type(module) in STANDARDIZED for module in model.modules()):
        model = model.double()
    return Attending(model) if head == "multihead" else model


def workable(name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Sides of images with which the architecture trains and evaluates, smallest first, and the arguments for them."""
    errors = []
    for size in SIZES:
        for kwargs in ({}, {"img_size": size}):
            try:
                with torch.device("meta"):
                    model = create(name, **kwargs)
                    images = torch.empty(2, 3, size, size, dtype=dtype_of(model))
                    loss_of(model.train()(images)).backward()
                    model.eval()(images[:1])
            except Exception as error:
                errors += [] if kwargs else [error]
            else:
                yield size, kwargs
                break
    if errors:
        raise errors[-1]


def dtype_of(model: nn.Module) -> torch.dtype:
    """The type of the model's weights, and so of its images."""
    return next(model.parameters()).dtype


def loss_of(output: Any) -> Tensor:
    """A loss of every tensor that a model returns."""
    floating = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return torch.stack([(leaf - 1).square().mean() for leaf in floating]).sum()


def train(model: nn.Module, size: int, masks: Mapping[str, Tensor] | None = None) -> list[float]:
    """The losses of three steps. A dense model with masks is masked by hand, after every step."""
    torch.manual_seed(1)  # of dropout too
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    by_hand = {} if masks is None else {name: model.get_parameter(name) for name in masks}
    losses = []
    model.train()
    for _ in range(STEPS):
        loss = loss_of(model(torch.randn(2, 3, size, size, dtype=dtype_of(model))))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for name, parameter in by_hand.items():
                parameter.mul_(masks[name])
        losses.append(loss.item())
    return losses


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """The masks by the names of the parameters before pruning."""
    state = model.state_dict()
    return {
        name.removesuffix("_orig"): state[name.removesuffix("_orig") + "_mask"] for name in state if "_orig" in name
    }


def masked_by_hand(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """A dense model with its weights multiplied by masks; standardized convolutions get a literal formula."""
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
            module = model.get_submodule(name.rpartition(".")[0])
            if type(module) in STANDARDIZED:
                module.forward = partial(_standardized_by_hand, module, mask)
    return model


def _standardized_by_hand(module: Any, mask: Tensor, x: Tensor) -> Tensor:
    """Center the unpruned entries of channels that lost some, standardize as timm does, multiply by the mask."""
    if getattr(module, "same_pad", False):
        x = pad_same(x, module.kernel_size, module.stride, module.dilation)
    rows, kept = module.weight.flatten(1), mask.flatten(1)
    means = rows.masked_fill(~kept, 0).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)
    rows = torch.where(kept.all(1, keepdim=True), rows, (rows - means).masked_fill(~kept, 0))
    rows = (rows - rows.mean(1, keepdim=True)) / (rows.var(1, unbiased=False, keepdim=True) + module.eps).sqrt()
    weight = rows.masked_fill(~kept, 0).view_as(module.weight)
    if hasattr(module, "gain"):
        weight = weight * module.gain * module.scale
    return F.conv2d(x, weight, module.bias, module.stride, module.padding, module.dilation, module.groups)


def difference(one: Any, other: Any) -> float:
    """The largest difference of two results, relative to the largest value."""
    found = 0.0
    for a, b in zip(tree_leaves(one), tree_leaves(other), strict=True):
        a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
        found = max(found, float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)))
        if not (a.isfinite().all() and b.isfinite().all()):
            raise FloatingPointError("a loss or an output is not finite")
    return found


def _tests(found: Real) -> Iterator[Real]:
    """A test a size, but for sizes so small that batch statistics of two images let the dense model overflow."""
    for size, kwargs in workable(found.model):
        with suppress(FloatingPointError):
            yield _test(found, size, kwargs)
    raise FloatingPointError("a loss or an output is not finite with images of any size")


def _test(found: Real, size: int, kwargs: Mapping[str, Any]) -> Real:
    dense = create(found.model, **kwargs)
    images = torch.randn(1, 3, size, size, dtype=dtype_of(dense))
    pruned_entries = revived = 0
    for scope, prune in SCOPES.items():
        model = copy.deepcopy(dense)
        report = prune(model, gamma=3.0)
        losses = train(model, size)
        masks = masks_of(model)
        verification = torch_sap.verify(model, images)
        pruned_entries += report.total - report.remaining
        revived += sum(weight.revived for weight in verification.weights)
        reload_difference = _reload(found.model, kwargs, model, masks, images)
        del model
        losses_by_hand = train(masked_by_hand(copy.deepcopy(dense), masks), size, masks)
        found = replace(
            found,
            image=size,
            tensors=len(report.tensors),
            **{f"remaining_{scope}": round(report.density, 4)},
            zeros_received=1 - revived / pruned_entries,
            unused=sum(weight.effective_sparsity is None for weight in verification.weights),
            loss_difference=max(found.loss_difference, difference(losses, losses_by_hand)),
            reload_difference=max(found.reload_difference, reload_difference),
        )
    return replace(found, failure=_judge(found))


def _reload(name: str, kwargs: Any, model: nn.Module, masks: Mapping[str, Tensor], images: Tensor) -> float:
    """Remove the pruning, load the state strictly into a fresh timm model, and compare its output with the pruned's."""
    with torch.no_grad():
        expected = model.eval()(images)
        state = torch_sap.remove(model).state_dict()
        for key, mask in masks.items():
            if torch.count_nonzero(state[key][~mask]):
                raise AssertionError(f"{key} of the removed model has pruned entries that are not zero")
        fresh = create(name, **kwargs)
        fresh.load_state_dict(state, strict=True)
        return difference(fresh.eval()(images), expected)


def _judge(found: Real) -> str:
    if found.zeros_received < 1:
        return "pruned entries are not zero where the computation receives them"
    if found.loss_difference > ROUNDING:
        return "losses are not those of the model masked by hand"
    if found.reload_difference > ROUNDING:
        return "the reloaded model computes something else"
    return ""
