"""Prune a whole model in place with one call, and make the pruning permanent with another."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import nn

from torch_sap.arguments import check_model
from torch_sap.decide.bounds import Hyperparameters
from torch_sap.decide.groups import Scope
from torch_sap.decide.step import prune_step
from torch_sap.distributed.fsdp import reshard
from torch_sap.masks.guards import guard, unguard
from torch_sap.masks.kinds import ZERO
from torch_sap.masks.mask import check_copies, check_not_offloaded, hold_masks, remove_masks
from torch_sap.masks.parameters import (
    ImportanceScores,
    LeftOut,
    Pair,
    Patterns,
    entries_of,
    resolve,
    warn_of_left_out,
)
from torch_sap.masks.reparametrized import warn_of_reparametrized
from torch_sap.masks.standardized import fold_
from torch_sap.records.report import PruningReport, tensor_records

Model = TypeVar("Model", bound=nn.Module)
Target = nn.Module | Iterable[Pair]


def global_unstructured(
    model: Target,
    p: float = 0.5,
    q: float = 1.0,
    *,
    eta_r: float = 0.0,
    gamma: float = 1.0,
    beta: float = 0.9,
    exclude: Patterns = (),
    include: Patterns = (),
    importance_scores: ImportanceScores | None = None,
) -> PruningReport:
    """Prune the weights of a model in place by SAP, all of them as one group.

    A group of d unpruned weights with PQ Index I loses exactly ``c = floor(min(gamma * (d - r), beta * d))``,
    smallest magnitudes first, ties in order of position. Pruned weights stay pruned and do not count. The pruned
    model has the format of torch.nn.utils.prune: ``weight_orig``, ``weight_mask``, a pruning hook.

    Args:
        model: A module, or an iterable of (module, name) pairs as torch.nn.utils.prune takes it. In a module, the
            parameters that :func:`prunable_parameters` names are pruned.
        p: The smaller norm, ``0 < p < q``.
        q: The larger norm.
        eta_r: Share of the p-th power mass that may be lost; 0 or more. Larger prunes more.
        gamma: Factor on the prunable number ``d - r``; 0 or more. Larger prunes more.
        beta: The largest share of a group that is pruned at once, in [0, 1].
        exclude: Patterns of what not to prune, see :func:`prunable_parameters`. Only with a module.
        include: Patterns of what to prune, too, such as lookup tables. Only with a module.
        importance_scores: Dict from (module, name) to a tensor of the parameter's shape whose magnitudes replace those
            of the weights, in the PQ Index and in the order, as in torch.nn.utils.prune.global_unstructured. Or a
            callable from the model to such a dict, as those of :mod:`torch_sap.scores`. Magnitudes rank what a dict
            leaves out, as there; a callable must return a tensor for each.

    Returns:
        d, I, r, c per group, and the remaining weights per tensor.

    Raises:
        ValueError: if an argument is out of range, weights are NaN or infinite, or there is nothing to prune.
        TypeError: if an argument or a weight has a wrong type.
            The model is as before if anything is raised.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> report = global_unstructured(model, p=0.5, q=1.0)
        >>> report.remaining == model[0].weight_mask.sum() + model[2].weight_mask.sum()
        tensor(True)

    Source: Algorithm 1 of the paper.
    """
    return _prune("global", model, Hyperparameters(p, q, eta_r, gamma, beta), exclude, include, importance_scores)


def layer_unstructured(
    model: Target,
    p: float = 0.5,
    q: float = 1.0,
    *,
    eta_r: float = 0.0,
    gamma: float = 1.0,
    beta: float = 0.9,
    exclude: Patterns = (),
    include: Patterns = (),
    importance_scores: ImportanceScores | None = None,
) -> PruningReport:
    """Prune as :func:`global_unstructured` does, but each tensor is a group; of stacked experts each matrix.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> list(layer_unstructured(model, exclude="2").groups)
        ['0.weight']
    """
    return _prune("layer", model, Hyperparameters(p, q, eta_r, gamma, beta), exclude, include, importance_scores)


def neuron_unstructured(
    model: Target,
    p: float = 0.5,
    q: float = 1.0,
    *,
    eta_r: float = 0.0,
    gamma: float = 1.0,
    beta: float = 0.9,
    exclude: Patterns = (),
    include: Patterns = (),
    importance_scores: ImportanceScores | None = None,
) -> PruningReport:
    """Prune as :func:`global_unstructured` does, but each output channel is a group.

    Output channels are dimension 0; dimension 1 within each group of a transposed convolution, and where a module
    stores (input, output), as transformers' Conv1D; of stacked experts each output channel of each expert.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> neuron_unstructured(model).groups["2.weight"].c.shape
        (10,)
    """
    return _prune("neuron", model, Hyperparameters(p, q, eta_r, gamma, beta), exclude, include, importance_scores)


def _prune(
    scope: Scope,
    model: Target,
    rule: Hyperparameters,
    exclude: Patterns,
    include: Patterns,
    scores: ImportanceScores | None,
) -> PruningReport:
    prunables, left_out = found = resolve(model, exclude, include)
    if isinstance(model, nn.Module):
        warn_of_reparametrized(model, stacklevel=3)
        warn_of_left_out(model, found, stacklevel=3)
    entries = entries_of(prunables, scores, model)
    with torch.no_grad():
        result = prune_step(entries, scope, rule)
        check_copies(model, prunables, result.masks)
        records = tensor_records(prunables, result.remaining)
        left_out += [LeftOut(one.name, one.shape, ZERO) for one in records if one.name in result.sums.zero]
        report = PruningReport(scope, rule.to_dict(), result.groups, records, left_out)
        try:
            hold_masks(prunables, result.masks)
        finally:
            if isinstance(model, nn.Module):
                guard(model)
    return report


def remove(model: Model) -> Model:
    """Make the pruning of a model permanent, in place: plain parameters with zeros where weights were pruned.

    The Parameter objects, their names and their order are those from before the pruning, so optimizers keep working.
    Tensors pruned by PyTorch's methods are made permanent too. A model without pruning stays as it is. What a
    conversion has left is taken away: hooks on layers that were replaced, weights and masks without their hooks.

    Args:
        model: Any module.

    Returns:
        The model itself.

    Raises:
        TypeError: if the model is not a module.
        RuntimeError: if accelerate has offloaded weights; nothing is changed.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> _ = global_unstructured(model)
        >>> list(remove(model).state_dict())
        ['0.weight', '0.bias']
    """
    check_model(model)
    check_not_offloaded(model)
    with torch.no_grad():
        reshard(model.modules())
        for module in model.modules():
            fold_(module)
            remove_masks(module)
        unguard(model)
    return model
