"""Prune a whole model in place, with one call; make it permanent with another."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils import prune

from torch_sap.decide.bounds import Hyperparameters
from torch_sap.decide.groups import Scope
from torch_sap.decide.step import prune_step
from torch_sap.distributed.fsdp import reshard
from torch_sap.masks.guards import guard, unguard
from torch_sap.masks.mask import check_copies, hold_masks, load_hooks_of
from torch_sap.masks.parameters import ImportanceScores, Pair, entries_of, resolve
from torch_sap.masks.reparametrized import warn_of_reparametrized
from torch_sap.masks.standardized import fold_
from torch_sap.records.report import PruningReport, tensor_records

Model = TypeVar("Model", bound=nn.Module)


def global_unstructured(
    model: nn.Module | Iterable[Pair],
    p: float = 0.5,
    q: float = 1.0,
    *,
    eta_r: float = 0.0,
    gamma: float = 1.0,
    beta: float = 0.9,
    exclude: str | Iterable[str] = (),
    importance_scores: ImportanceScores | None = None,
) -> PruningReport:
    """Prune the weights of a model in place by SAP, all of them as one group.

    How many go follows from their PQ Index: ``c = floor(min(gamma * (d - r), beta * d))``. Those with the smallest
    magnitudes go, exactly c; of equal ones those that come first. Weights that are pruned already stay so and do not
    count. The model keeps PyTorch's form: ``weight_orig``, ``weight_mask``, a pruning hook.

    Args:
        model: A module, or an iterable of (module, name) pairs as torch.nn.utils.prune takes it. Of a module the
            parameters that :func:`prunable_parameters` names are pruned.
        p: The smaller norm, ``0 < p < q``.
        q: The larger norm.
        eta_r: Share of the p-th power mass that may be lost; 0 or more. Larger prunes more.
        gamma: Factor on the prunable number ``d - r``; 0 or more. Larger prunes more.
        beta: The largest share of a group that is pruned at once, in [0, 1].
        exclude: Patterns of what not to prune, see :func:`prunable_parameters`. Only with a module.
        importance_scores: From (module, name) to a tensor of the parameter's shape whose magnitudes take the place of
            the weights', in the PQ Index and in the order. As in torch.nn.utils.prune.global_unstructured.

    Returns:
        What was found and done: d, I, r, c of each group, remaining weights of each tensor.

    Raises:
        ValueError: if an argument is out of its range, weights are NaN or infinite, or there is nothing to prune.
        TypeError: if an argument or a weight is of a wrong type.
            The model is as before if anything is raised.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> report = global_unstructured(model, p=0.5, q=1.0)
        >>> report.remaining == model[0].weight_mask.sum() + model[2].weight_mask.sum()
        tensor(True)

    Source: Algorithm 1 of the paper, scope "global".
    """
    rule = Hyperparameters(p, q, eta_r, gamma, beta)
    return _prune(model, "global", rule, exclude, importance_scores)


def layer_unstructured(
    model: nn.Module | Iterable[Pair],
    p: float = 0.5,
    q: float = 1.0,
    *,
    eta_r: float = 0.0,
    gamma: float = 1.0,
    beta: float = 0.9,
    exclude: str | Iterable[str] = (),
    importance_scores: ImportanceScores | None = None,
) -> PruningReport:
    """Prune the weights of a model in place by SAP, each tensor as a group of its own.

    Arguments, result and errors are those of :func:`global_unstructured`.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> report = layer_unstructured(model, exclude="2")
        >>> list(report.groups)
        ['0.weight']

    Source: Algorithm 1 of the paper, scope "layer".
    """
    rule = Hyperparameters(p, q, eta_r, gamma, beta)
    return _prune(model, "layer", rule, exclude, importance_scores)


def neuron_unstructured(
    model: nn.Module | Iterable[Pair],
    p: float = 0.5,
    q: float = 1.0,
    *,
    eta_r: float = 0.0,
    gamma: float = 1.0,
    beta: float = 0.9,
    exclude: str | Iterable[str] = (),
    importance_scores: ImportanceScores | None = None,
) -> PruningReport:
    """Prune the weights of a model in place by SAP, each output channel of a tensor as a group of its own.

    Output channels are dimension 0, and dimension 1 within each group for transposed convolutions. Arguments, result
    and errors are those of :func:`global_unstructured`.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> report = neuron_unstructured(model)
        >>> report.groups["2.weight"].c.shape
        (10,)

    Source: Algorithm 1 of the paper, scope "neuron".
    """
    rule = Hyperparameters(p, q, eta_r, gamma, beta)
    return _prune(model, "neuron", rule, exclude, importance_scores)


def remove(model: Model) -> Model:
    """Make the pruning of a model permanent, in place: plain parameters again, with zeros where weights were pruned.

    The same Parameters under their old names and at their old places, so the keys are those of the model before
    pruning, and optimizers go on working. Tensors pruned by PyTorch's methods are made permanent too. A model without
    pruning stays as it is.

    Args:
        model: Any module.

    Returns:
        The model itself.

    Raises:
        TypeError: if it is no module.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> _ = global_unstructured(model)
        >>> list(remove(model).state_dict())
        ['0.weight', '0.bias']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    with torch.no_grad():
        reshard(model.modules())
        for module in model.modules():
            fold_(module)
            hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, prune.BasePruningMethod)]
            for hook in hooks:
                prune.remove(module, hook._tensor_name)
            for left in load_hooks_of(module):
                left.release(module)
        unguard(model)
    return model


def _prune(
    model: nn.Module | Iterable[Pair],
    scope: Scope,
    rule: Hyperparameters,
    exclude: str | Iterable[str],
    importance_scores: ImportanceScores | None,
) -> PruningReport:
    prunables = resolve(model, exclude)
    if isinstance(model, nn.Module):
        warn_of_reparametrized(model, stacklevel=3)
    with torch.no_grad():
        result = prune_step(entries_of(prunables, importance_scores), scope, rule)
        check_copies(model, prunables, result.masks)
        report = PruningReport(scope, rule.to_dict(), result.groups, tensor_records(prunables, result.remaining))
        try:
            hold_masks(prunables, result.masks)
        finally:
            if isinstance(model, nn.Module):
                guard(model)
    return report
