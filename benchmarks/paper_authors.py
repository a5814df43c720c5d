"""Two things that the authors' code does in another way than torch_sap, one by one: to see what they change.

- It clips the norm of the gradient of all weights, and masks the gradient afterwards; here it is masked before.
- It computes the count c in float32, as floor(d * (1 - ceil(r) / d)), which is often one less than floor(d - r).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from torch_sap.decide.bounds import Hyperparameters
from torch_sap.iterate.pruner import Pruner


class AuthorsCount(Hyperparameters):
    """The five numbers of SAP, with the count as the authors' code computes it."""

    def count(self, index: NDArray[np.float64], d: NDArray[np.int64]) -> NDArray[np.int64]:
        """c of groups with these PQ Indices and sizes."""
        size = np.asarray(d, np.float32)
        kept = np.ceil(self.retain(index, d)).astype(np.float32) / size
        share = np.clip(np.float32(self.gamma) * (np.float32(1) - kept), np.float32(0), np.float32(self.beta))
        return np.where(np.isnan(index), 0, np.floor(size * share)).astype(np.int64)


class AuthorsSAP(Pruner):
    """SAP with :class:`AuthorsCount`."""

    def __init__(
        self, model: nn.Module, *, p: float, q: float, eta_r: float, gamma: float, beta: float, **settings: Any
    ) -> None:
        super().__init__(model, AuthorsCount(p, q, eta_r, gamma, beta), **settings)


@torch.no_grad()
def dense_twin(model: nn.Module, twin: nn.Module) -> Callable[[], None]:
    """Let a model without masks have the memory of a pruned one, so that training it trains both.

    Args:
        model: A model that torch_sap prunes.
        twin: One of the same architecture, never pruned. Its values are lost.

    Returns:
        What to call after clipping, before the optimizer's step: it masks the gradients of the twin.
    """
    own: dict[str, Any] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in [*twin.named_parameters(), *twin.named_buffers()]:
        tensor.data = own.get(name, own.get(f"{name}_orig")).data
    masked = [
        (twin.get_parameter(name), own[f"{name}_mask"]) for name, _ in twin.named_parameters() if f"{name}_mask" in own
    ]

    def mask_gradients() -> None:
        for weight, mask in masked:
            if weight.grad is not None:
                weight.grad.mul_(mask)

    return mask_gradients
