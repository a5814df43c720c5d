"""Does the computation receive the zeros that the masks promise? An answer for each pruned weight of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from torch_sap.distributed.replicas import unwrap
from torch_sap.distributed.sharded import is_dtensor
from torch_sap.inspect.dataflow import KEPT, PRUNED, Follow, Received
from torch_sap.masks.parameters import Prunable, resolve


@dataclass(frozen=True)
class VerifiedWeight:
    """One pruned weight.

    Attributes:
        name: Dotted path of the parameter before it was pruned.
        module: Class of the module that has it.
        mask_sparsity: Share of its entries that are pruned.
        effective_sparsity: Share of its entries that are zero in the tensors that convolutions, matrix products,
            look-ups and other operations on activations receive; None if none received it.
        revived: Pruned entries that are not zero there, added up over these tensors.
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
    """What :func:`verify` found, a record for each pruned weight in the model's order.

    Attributes:
        weights: The records.
    """

    weights: tuple[VerifiedWeight, ...]

    @property
    def effective(self) -> bool:
        """Whether no operation received another number than zero at a pruned entry."""
        return not any(weight.revived for weight in self.weights)

    @property
    def differing(self) -> tuple[VerifiedWeight, ...]:
        """The weights whose sparsity in the mask is not the one that the computation receives."""
        return tuple(weight for weight in self.weights if weight.reason)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {"effective": self.effective, "weights": [asdict(weight) for weight in self.weights]}

    def __str__(self) -> str:
        """A line in total and a line for each weight that differs."""
        width = max((len(weight.name) for weight in self.differing), default=0)
        head = f"{len(self.weights)} pruned weights, {len(self.differing)} received with another sparsity"
        lines = [
            f"  {w.name:<{width}} mask {w.mask_sparsity:6.1%}, received "
            + ("  never" if w.effective_sparsity is None else f"{w.effective_sparsity:6.1%}")
            + f": {w.reason} ({w.module})"
            for w in self.differing
        ]
        return "\n".join([head, *lines])


def verify(model: nn.Module, example_input: Any) -> Verification:
    """Compare the sparsity of each pruned weight in its mask with that in the tensor the computation really receives.

    The model computes the example in eval mode, without gradients, under the autocast of the caller, and is left
    exactly as it was: modes, buffers, attributes of modules, random numbers. (As any forward, it restores zeros of
    masked weights that somebody has overwritten.)

    Args:
        model: A pruned model. In a weight without a mask, as :func:`remove` leaves it, the zeros count as pruned.
        example_input: A tensor, a tuple of positional arguments or a dict of keyword arguments for the model.

    Returns:
        A record for each pruned weight. Reasons are: a standardised weight, re-parametrised, shared with a module
        that is not masked, read without the mask, not used by this example, unpruned entries that are zero.

    Raises:
        TypeError: if the model is no module.
        ValueError: if it has no pruned weight.
        NotImplementedError: if a weight is sharded.
        Exception: whatever the model raises for the example.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> _ = global_unstructured(model)
        >>> verify(model, torch.ones(2, 8)).effective
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    model = unwrap(model)
    pruned = [(prunable, kept) for prunable in resolve(model) if not (kept := _kept(prunable)).all()]
    if not pruned:
        raise ValueError("model must have a pruned weight, but no mask and no weight of it has a zero; prune it first")
    places = [(prunable.weight, torch.where(kept, KEPT, PRUNED).to(torch.uint8)) for prunable, kept in pruned]
    with as_it_was(model), torch.no_grad():
        args, kwargs = arguments_of(example_input)
        tensors = [leaf for leaf in tree_leaves(example_input) if isinstance(leaf, Tensor)]
        with Follow(places, tensors) as follow:
            model(*args, **kwargs)
    found = zip(pruned, follow.received, strict=True)
    return Verification(tuple(_record(prunable, kept, received) for (prunable, kept), received in found))


def _kept(prunable: Prunable) -> Tensor:
    """Where a weight is not pruned, by its mask or, without one, by its zeros."""
    if is_dtensor(prunable.weight):
        raise NotImplementedError(
            f"{prunable.name} is sharded (a DTensor), which verify cannot follow; load the full state_dict into a "
            "model on one process and verify that"
        )
    mask = prunable.mask
    return prunable.weight.detach() != 0 if mask is None else mask


def arguments_of(example: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Positional and keyword arguments of an example: a tensor, a tuple or a dict."""
    if isinstance(example, Mapping):
        return (), example
    return (example if isinstance(example, tuple) else (example,)), {}


def _record(prunable: Prunable, kept: Tensor, received: Received) -> VerifiedWeight:
    total = max(kept.numel(), 1)
    in_mask = (total - int(kept.sum())) / total
    return VerifiedWeight(
        name=prunable.name,
        module=type(prunable.holders[0][0]).__name__,
        mask_sparsity=in_mask,
        effective_sparsity=received.zeros / received.entries if received.entries else None,
        revived=received.revived,
        reason=_reason(prunable, received),
    )


def _reason(prunable: Prunable, received: Received) -> str:
    if not received.entries:
        return "not used"
    if received.revived:
        operations = ", ".join(sorted(received.changed_by))
        if any("norm" in name or name in ("sub", "var_mean", "std") for name in received.changed_by):
            return f"standardised weight ({operations})"
        if received.changed_by:
            return f"re-parametrised ({operations})"
        return "shared with a module that is not masked" if len(prunable.holders) > 1 else "read without the mask"
    return "zeros among unpruned entries" if received.zeros > received.pruned else ""


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Eval mode, after which modes, attributes, buffers and random numbers are as before."""
    modules = list(model.modules())
    modes = [module.training for module in modules]  # of TorchScript's modules this is no attribute
    attributes = [dict(vars(module)) for module in modules]
    buffers = [{name: (b, b.clone()) for name, b in m._buffers.items() if b is not None} for m in modules]
    accelerators = sorted({p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}, key=str)
    kind = accelerators[0].type if accelerators else "cuda"
    with torch.random.fork_rng([device.index for device in accelerators], device_type=kind):
        try:
            for module in modules:
                module.training = False
            yield
        finally:
            for module, mode, own, held in zip(modules, modes, attributes, buffers, strict=True):
                vars(module).clear()
                vars(module).update(own)
                module.training = mode
                for name, (buffer, before) in held.items():
                    module._buffers[name] = buffer
                    if not torch.equal(buffer, before):
                        buffer.copy_(before)
