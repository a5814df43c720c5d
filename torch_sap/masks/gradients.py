"""Gradients of a pruned weight: zero at its pruned entries before anybody can read them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import unserializable_hook

from torch_sap.distributed.sharded import same_placement
from torch_sap.masks.stamps import Stamp
from torch_sap.masks.zeros import restore_zeros_


class GradientMask:
    """Masks what backward accumulates, in place, and what torch.autograd.grad returns, in new memory.

    Args:
        weight: The Parameter.
        find: Gives the weight and the mask that are held now, or None.
    """

    def __init__(self, weight: Tensor, find: Callable[[], tuple[Tensor, Tensor] | None]) -> None:
        self._weight, self._find = weakref.ref(weight), find
        self._masked: Stamp | None = None
        accumulated: Any = weight.register_post_accumulate_grad_hook
        asked_for: Any = weight.register_hook
        self._handles = [accumulated(self._mask_accumulated), asked_for(self._mask_asked_for)]

    @property
    def weight(self) -> Tensor | None:
        """The Parameter, None if it is gone."""
        return self._weight()

    def is_masked(self, gradient: Tensor, mask: Tensor) -> bool:
        """Whether this gradient was masked with this mask, and nobody has written to them since."""
        return self._masked is not None and self._masked.holds(gradient, mask)

    def release(self) -> None:
        """Let the gradients be."""
        for handle in self._handles:
            handle.remove()

    def _mask_accumulated(self, weight: Tensor) -> None:
        found, gradient = self._find(), weight.grad
        if found is None or gradient is None:
            return
        mask = found[1]
        if gradient.is_sparse or not same_placement(gradient, mask):
            weight.grad = gradient * mask.to(gradient.dtype)
            self._masked = None
        else:
            restore_zeros_(gradient, mask)
            self._masked = Stamp(gradient, mask) if gradient.is_cpu else None  # of use on the host alone

    @unserializable_hook  # type: ignore[untyped-decorator]  # the hook of a copied module makes one of its own
    def _mask_asked_for(self, gradient: Tensor) -> Tensor | None:
        found = None if _will_accumulate() else self._find()
        return None if found is None else gradient * found[1].to(gradient.dtype)


_asked: tuple[int, bool] = (-1, True)
"""The last backward of which :func:`_will_accumulate` asked the engine, and the answer."""


def _will_accumulate() -> bool:
    """Whether the engine, which runs a leaf's hook now, adds to its ``grad`` next; torch.autograd.grad does not.

    One answer for all leaves of one backward: asking costs more than the rest of the hook.
    """
    global _asked
    backward, (known, adds) = torch._C._current_graph_task_id(), _asked
    if backward == -1 or backward != known:
        adds = _adds(torch._C._current_autograd_node())
        _asked = backward, adds
    return adds


def _adds(node: torch.autograd.graph.Node | None) -> bool:
    try:
        return node is not None and bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # how it says that the engine runs torch.autograd.grad for this very tensor
        return False
