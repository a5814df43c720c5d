"""Check that a computation receives zeros where the masks have pruned, weight by weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torch_sap.distributed.replicas import unwrap
from torch_sap.inspect.dataflow import KEPT, PRUNED, Follow, Received
from torch_sap.inspect.example import arguments_of, as_it_was, tensors_of, whole_weights
from torch_sap.masks.parameters import Prunable
from torch_sap.records.codec import to_plain
from torch_sap.records.html import table


@dataclass(frozen=True)
class VerifiedWeight:
    """Sparsity of one pruned weight, in its mask and in the computation.

    Attributes:
        name: Dotted path of the parameter before pruning.
        module: Class of the module that has it.
        mask_sparsity: Share of its entries that are pruned.
        effective_sparsity: Share of its entries that are zero in the tensors that convolutions, matrix products,
            lookups, and other operations on activations receive; None if none received it.
        revived: Pruned entries that are not zero there, summed over these tensors.
        reason: Why the two sparsities differ; empty if they do not.
    """

    name: str
    module: str
    mask_sparsity: float
    effective_sparsity: float | None
    revived: int
    reason: str


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found.

    Attributes:
        weights: One record per pruned weight, in the model's order.
    """

    weights: tuple[VerifiedWeight, ...]

    @property
    def effective(self) -> bool:
        """Whether every operation received zeros at all pruned entries."""
        return not any(weight.revived for weight in self.weights)

    @property
    def differing(self) -> tuple[VerifiedWeight, ...]:
        """The weights that the computation receives with another sparsity than their mask has."""
        return tuple(weight for weight in self.weights if weight.reason)

    def to_dict(self) -> dict[str, Any]:
        """Convert to values that JSON can hold."""
        return {"effective": self.effective, **to_plain(self)}

    def __str__(self) -> str:
        """Format one line in total, and one line per weight that differs, with what remains of it."""
        width = max((len(weight.name) for weight in self.differing), default=0)
        lines = [
            f"  {name:<{width}} {of_mask:>6} in the mask, {received:>6} received: {reason} ({module})"
            for name, module, of_mask, received, reason in self._rows(self.differing)
        ]
        return "\n".join([self._head(), *lines])

    def _repr_html_(self) -> str:
        titles = ["weight", "module", "remaining in the mask", "received by the computation", "reason"]
        return table(self._head(), titles, self._rows(self.weights))

    def _head(self) -> str:
        return f"{len(self.weights)} pruned weights, {len(self.differing)} received with another sparsity"

    @staticmethod
    def _rows(weights: Sequence[VerifiedWeight]) -> list[tuple[str, ...]]:
        """Name, module, what remains in the mask and in the computation, and the reason."""
        rows: list[tuple[str, ...]] = []
        for w in weights:
            received = "never" if w.effective_sparsity is None else f"{1 - w.effective_sparsity:.1%}"
            rows.append((w.name, w.module, f"{1 - w.mask_sparsity:.1%}", received, w.reason))
        return rows


def verify(model: nn.Module, example_input: Any) -> Verification:
    """Compare the sparsity of each pruned weight in its mask with its sparsity in the computation.

    The model runs the example in eval mode, without gradients, under the caller's autocast, and is exactly as before
    afterwards: modes, buffers, attributes of modules, random numbers. Like any forward, the run restores zeros.

    Args:
        model: A pruned model. In a weight without a mask (after :func:`remove`) the zeros count as pruned.
        example_input: A tensor, a tuple of positional arguments, or a dict of keyword arguments for the model.

    Returns:
        One record per pruned weight, with a reason where the two differ.

    Raises:
        TypeError: if the model is not a module.
        ValueError: if no weight is pruned.
        NotImplementedError: if a weight is sharded.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> _ = global_unstructured(model)
        >>> verify(model, torch.ones(2, 8)).effective
        True
    """
    model = unwrap(model)
    kept = [(p, p.weight.detach() != 0 if p.mask is None else p.mask) for p in whole_weights(model, "verify")]
    pruned = [(prunable, mask) for prunable, mask in kept if not mask.all()]
    if not pruned:
        raise ValueError("model must have a pruned weight, but no mask and no weight of it has a zero; prune it first")
    places = [(prunable.weight, torch.where(mask, KEPT, PRUNED).to(torch.uint8)) for prunable, mask in pruned]
    tables = {index for index, (prunable, _) in enumerate(pruned) if prunable.is_table}
    args, kwargs = arguments_of(example_input)
    with as_it_was(model), torch.no_grad(), Follow(places, tensors_of(example_input), tables) as follow:
        model(*args, **kwargs)
    found = [
        VerifiedWeight(
            name=prunable.name,
            module=type(prunable.holders[0][0]).__name__,
            mask_sparsity=1 - int(mask.sum()) / mask.numel(),
            effective_sparsity=received.zeros / received.entries if received.entries else None,
            revived=received.revived,
            reason=_reason(prunable, received),
        )
        for (prunable, mask), received in zip(pruned, follow.received, strict=True)
    ]
    return Verification(tuple(found))


def _reason(prunable: Prunable, received: Received) -> str:
    if not received.entries:
        return "not used"
    if received.revived:
        operations = ", ".join(sorted(received.changed_by))
        if any("norm" in name or name in ("sub", "var_mean", "std") for name in received.changed_by):
            return f"standardized weight ({operations})"
        if received.changed_by:
            return f"reparametrized ({operations})"
        return "shared with a module that is not masked" if len(prunable.holders) > 1 else "read without the mask"
    return "zeros among unpruned entries" if received.zeros > received.pruned else ""
