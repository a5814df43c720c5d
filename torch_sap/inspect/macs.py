"""How many multiplications and additions a computation does with each of some weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import flop_registry

from torch_sap.inspect.dataflow import KEPT, NOT_OURS, Follow, Origin


class _Count(Follow):
    """While it is active, gives the operations that a kept formula counts to the weights that they receive."""

    def __init__(self, weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        super().__init__([(weight, torch.full_like(weight, KEPT, dtype=torch.uint8)) for weight in weights], inputs)
        self.macs = [0] * len(weights)
        self.other = 0
        self._operands: list[tuple[Tensor, Origin]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        self._operands = []
        out = super().__torch_dispatch__(func, types, args, kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            macs = formula(*args, **(kwargs or {}), out_val=out) // 2
            shares = self._shares()
            for source, share in shares.items():
                self.macs[source] += round(macs * share)
            self.other += macs - sum(round(macs * share) for share in shares.values())
        return out

    def _receive(self, operand: Tensor, origin: Origin) -> None:
        self._operands.append((operand, origin))

    def _shares(self) -> dict[int, float]:
        """How much of the received operands each weight is."""
        shares: dict[int, float] = {}
        for operand, origin in self._operands:
            entries = float((origin.places != NOT_OURS).sum()) / operand.numel()
            shares[origin.source] = shares.get(origin.source, 0.0) + entries
        whole = max(1.0, sum(shares.values()))  # more than one if a product of weights is made
        return {source: share / whole for source, share in shares.items()}


def count_macs(
    compute: Callable[[], object], weights: Sequence[Tensor], inputs: Sequence[Tensor]
) -> tuple[list[int], int]:
    """Count the multiply-accumulate operations of a computation by the formulas of torch.utils.flop_counter.

    Args:
        compute: Does it, without gradients.
        weights: Parameters, of any shapes.
        inputs: Tensors that the computed example consists of.

    Returns:
        The operations in which each weight takes part, and all others. An operation with a tensor that several
        weights were joined to is divided in proportion to their entries.
    """
    with _plainly(), _Count(weights, inputs) as counter:
        compute()
    return counter.macs, counter.other


@contextmanager
def _plainly() -> Iterator[None]:
    """Let attention and recurrent modules compute by operations that have a formula, and not by one for all."""
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
