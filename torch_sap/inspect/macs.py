"""Count the multiply-accumulate operations (MACs) that a computation does with each of its weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import flop_registry

from torch_sap.inspect.dataflow import KEPT, NOT_OURS, Follow, Origin
from torch_sap.inspect.example import arguments_of, as_it_was, tensors_of


class _Count(Follow):
    """While active, assign the MACs of each operation to the weights that it receives."""

    def __init__(self, weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        super().__init__([(weight, torch.full_like(weight, KEPT, dtype=torch.uint8)) for weight in weights], inputs)
        self.macs = [0] * len(weights)
        self.other = 0
        self._operands: list[tuple[Tensor, Origin]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        self._operands = []
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            macs = formula(*args, **(kwargs or {}), out_val=out) // 2
            counts = {source: round(macs * share) for source, share in self._shares().items()}
            for source, count in counts.items():
                self.macs[source] += count
            self.other += macs - sum(counts.values())
        return out

    def _receive(self, operand: Tensor, origin: Origin) -> None:
        self._operands.append((operand, origin))

    def _shares(self) -> dict[int, float]:
        """Share of each weight in the received operands."""
        shares: dict[int, float] = defaultdict(float)
        for operand, origin in self._operands:
            shares[origin.source] += float((origin.places != NOT_OURS).sum()) / max(operand.numel(), 1)
        whole = max(1.0, sum(shares.values()))  # above 1 where an operation multiplies weights by weights
        return {source: share / whole for source, share in shares.items()}


def count_macs(model: nn.Module, example: Any, weights: Sequence[Tensor]) -> tuple[list[int], int]:
    """Count MACs per weight, and those without a weight, by the formulas of torch.utils.flop_counter.

    An operation on several joined weights is divided in proportion to their entries.
    """
    args, kwargs = arguments_of(example)
    with as_it_was(model), in_counted_operations(), _Count(weights, tensors_of(example)) as counter:
        model(*args, **kwargs)
    return counter.macs, counter.other


@contextmanager
def in_counted_operations() -> Iterator[None]:
    """Make attention and recurrent modules run in operations that have a formula, not in fused ones."""
    onednn: Any = torch.backends.mkldnn
    fast, enabled = torch.backends.mha.get_fastpath_enabled(), onednn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    onednn.enabled = False
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        onednn.enabled = enabled
