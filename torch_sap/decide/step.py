"""The SAP step: entries -> groups -> I -> r -> c -> masks. It reads tensors and makes new masks; it changes nothing.

Source: Algorithm 1 of Diao et al., ICLR 2023 (arXiv 2302.05601).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from torch_sap.decide.bounds import Hyperparameters
from torch_sap.decide.groups import Entry, Scope, split
from torch_sap.decide.measures import PowerSums, measure_groups, power_sums
from torch_sap.decide.threads import map_pieces


@dataclass(frozen=True, eq=False)
class GroupValues:
    """What a step found out about one group, or about the rows of one tensor: arrays with one value a group."""

    d: NDArray[np.int64]
    """Unpruned entries before the step."""
    index: NDArray[np.float64]
    """PQ Index I; NaN where the group is empty or all zero."""
    r: NDArray[np.float64]
    """Lower bound on the entries to retain."""
    c: NDArray[np.int64]
    """Entries that the step prunes."""


class StepResult(NamedTuple):
    """What a step decided.

    Attributes:
        masks: New masks of the entries, in their order; None: nothing of the tensor is pruned.
        groups: The values of each group by its name.
        sums: What the pass over the entries found before the pruning, in all scopes.
        remaining: Unpruned entries of each whole tensor after the pruning.
    """

    masks: list[Tensor | None]
    groups: dict[str, GroupValues]
    sums: PowerSums
    remaining: list[int]


def prune_step(entries: Sequence[Entry], scope: Scope, rule: Hyperparameters) -> StepResult:
    """Decide what one round prunes.

    Args:
        entries: Tensors in order of position.
        scope: How they are split into groups.
        rule: The five numbers, and how many entries of a group they prune.

    Returns:
        New masks and the values that led to them.

    Raises:
        ValueError: if an entry holds NaN or infinity, or has no rows to prune; it is named.
    """
    for entry in entries:
        if scope == "neuron" and len(entry.shape) < 2:
            raise ValueError(
                f"{entry.name} must have more than one dimension to have rows, got shape {entry.shape}; "
                "leave it out, or take another scope"
            )
    groups = split(entries, scope)
    for group in groups:
        group.expect(rule)
    measured = measure_groups(groups, rule.p, rule.q)
    values = {
        group.name: GroupValues(d, index, rule.retain(index, d), rule.count(index, d))
        for group, (d, index) in zip(groups, measured, strict=True)
    }
    work = [(group, found.c, found.d) for group, found in zip(groups, values.values(), strict=True)]
    apart = all(group.on_host and not any(group.parts) for group in groups)  # threads must not mix up exchanges
    masks = map_pieces(lambda group, c, d: group.masks(c, d), work, on_host=apart)
    every = [mask for of_group in masks for mask in of_group]
    remaining = [e.scores.numel() if m is None else int(m.sum()) for e, m in zip(entries, every, strict=True)]
    return StepResult(every, values, power_sums(entries, rule.p, rule.q), remaining)


def zero_step(
    entries: Sequence[Entry], scope: Scope, rule: Hyperparameters
) -> tuple[dict[str, GroupValues], list[int]]:
    """STUB: prune tensors in place, without a mask per entry: pruned entries are set to +0.0.

    The entries have no masks; their scores (CPU tensors, also mapped files) are written to after all is decided.

    Returns:
        The values of each group by its name, and the remaining entries of each tensor.
    """
    result = prune_step(entries, scope, rule)
    for entry, mask in zip(entries, result.masks, strict=True):
        if mask is not None:
            entry.scores.masked_fill_(~mask, 0.0)
    return result.groups, result.remaining
