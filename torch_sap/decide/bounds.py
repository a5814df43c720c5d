"""How many entries the PQ Index allows to prune: the paper's Theorem 2 and the count c of Algorithm 1.

Source: Diao et al., "Pruning Deep Neural Networks from a Sparsity Perspective", ICLR 2023 (arXiv 2302.05601).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_sap.arguments import check_norms, check_number


@dataclass(frozen=True)
class Hyperparameters:
    """The five numbers of SAP, checked once.

    Attributes:
        p: The smaller norm, ``0 < p < q``.
        q: The larger norm.
        eta_r: Share of the p-th power mass that may be lost, relative to what is kept; ``eta_r >= 0``. Larger prunes
            more.
        gamma: Factor on the prunable share ``d - r``; ``gamma >= 0``. Larger prunes more.
        beta: The largest share of a group that one round may prune, in ``[0, 1]``.
    """

    p: float = 0.5
    q: float = 1.0
    eta_r: float = 0.0
    gamma: float = 1.0
    beta: float = 0.9

    def __post_init__(self) -> None:
        check_norms(self.p, self.q)
        check_number("eta_r", self.eta_r, low=0)
        check_number("gamma", self.gamma, low=0)
        check_number("beta", self.beta, low=0, high=1)
        for name in ("p", "q", "eta_r", "gamma", "beta"):
            object.__setattr__(self, name, float(getattr(self, name)))

    def to_dict(self) -> dict[str, float]:
        """The numbers by name."""
        return asdict(self)

    def retain(self, index: NDArray[np.float64], d: NDArray[np.int64]) -> NDArray[np.float64]:
        """r of groups with these PQ Indices and sizes."""
        return np.asarray(_retain(index, np.asarray(d, np.float64), self))

    def count(self, index: NDArray[np.float64], d: NDArray[np.int64]) -> NDArray[np.int64]:
        """c of groups with these PQ Indices and sizes."""
        d = np.asarray(d, np.float64)
        c = np.floor(np.minimum(self.gamma * (d - self.retain(index, d)), self.beta * d))
        return np.maximum(np.where(np.isnan(c), 0.0, c), 0.0).astype(np.int64)


def _check_groups(index: Any, d: Any) -> None:
    """Raise unless these are PQ Indices (or NaN) and sizes of groups."""
    for name, values in (("index", index), ("d", d)):
        if not isinstance(values, Tensor) and np.asarray(values).dtype.kind not in "iuf":
            raise TypeError(f"{name} must be a real number, or an array or tensor of them, got {values!r}")
    if bool((torch.as_tensor(index) > 1).any()):
        raise ValueError(f"index must not be larger than 1, got index={index}")
    if bool((torch.as_tensor(d) < 0).any()):
        raise ValueError(f"d must not be negative, got d={d}")
    if bool(torch.as_tensor(index).isinf().any()):
        raise ValueError(f"index must be finite or NaN (not defined), got index={index}")
    if not bool(torch.as_tensor(d).isfinite().all()):
        raise ValueError(f"d must be finite, got d={d}")
    shapes = [tuple(values.shape) if isinstance(values, Tensor) else np.shape(values) for values in (index, d)]
    if () not in shapes and shapes[0] != shapes[1]:
        raise ValueError(f"d must be one number or have the shape of index, {shapes[0]}, got {shapes[1]}")


def _retain(index: Any, d: Any, rule: Hyperparameters) -> Any:
    """r, for float64 arrays or tensors."""
    p, q = rule.p, rule.q
    return d * (1 + rule.eta_r) ** (-q / (q - p)) * (1 - index) ** (p * q / (q - p))


@dataclass(frozen=True)
class FixedRatio(Hyperparameters):
    """A fixed share of every group, however sparse it is: what Lottery Ticket and One Shot prune.

    Attributes:
        ratio: Share P of the unpruned entries that one round prunes, in [0, 1].
    """

    ratio: float = 0.2

    def to_dict(self) -> dict[str, float]:
        """The numbers that it uses, by name."""
        return {"p": self.p, "q": self.q, "ratio": self.ratio}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("ratio", self.ratio, low=0, high=1)

    def count(self, index: NDArray[np.float64], d: NDArray[np.int64]) -> NDArray[np.int64]:
        """``round(ratio * d)``, as torch.nn.utils.prune rounds an amount; 0 for groups of zeros, as in SAP."""
        return np.where(np.isnan(index), 0, np.rint(self.ratio * d)).astype(np.int64)


@overload
def retention_bound(
    index: Tensor, d: Tensor | int, *, p: float = ..., q: float = ..., eta_r: float = ...
) -> Tensor: ...
@overload
def retention_bound(
    index: NDArray[Any], d: NDArray[Any] | int, *, p: float = ..., q: float = ..., eta_r: float = ...
) -> NDArray[np.float64]: ...
@overload
def retention_bound(index: float, d: int, *, p: float = ..., q: float = ..., eta_r: float = ...) -> float: ...
def retention_bound(index: Any, d: Any, *, p: float = 0.5, q: float = 1.0, eta_r: float = 0.0) -> Any:
    r"""Lower bound r on the number of entries to retain in a group with a given PQ Index.

    .. math:: r = d\,(1+\eta_r)^{-q/(q-p)}\,(1-I)^{pq/(q-p)}

    Args:
        index: PQ Index I of the group: a number, or an array or tensor with one value a group.
        d: Number of unpruned entries of the group, of the same shape.
        p: The smaller norm that ``index`` was computed with.
        q: The larger norm.
        eta_r: Share of the p-th power mass that may be lost; 0 or more.

    Returns:
        r as a real number (not rounded): float for numbers, float64 array or tensor of the inputs' shape otherwise.
        NaN where the index is NaN.

    Raises:
        ValueError: if not ``0 < p < q``, if ``eta_r`` or d is negative, or if an index is larger than 1.
        TypeError: if one of them is no number.

    Example:
        >>> retention_bound(0.0, 100)  # all entries equal: keep all
        100.0
        >>> retention_bound(0.5, 100)
        50.0

    Source: Theorem 2 of the paper.
    """
    rule = Hyperparameters(p, q, eta_r)
    _check_groups(index, d)
    if isinstance(index, Tensor) or isinstance(d, Tensor):
        device = index.device if isinstance(index, Tensor) else d.device
        index = torch.as_tensor(index, dtype=torch.float64, device=device)
        return _retain(index, torch.as_tensor(d, device=device).to(torch.float64), rule)
    r = rule.retain(np.asarray(index, np.float64), np.asarray(d))
    return r if r.ndim else float(r)


@overload
def prune_count(
    index: Tensor,
    d: Tensor | int,
    *,
    p: float = ...,
    q: float = ...,
    eta_r: float = ...,
    gamma: float = ...,
    beta: float = ...,
) -> Tensor: ...
@overload
def prune_count(
    index: NDArray[Any],
    d: NDArray[Any] | int,
    *,
    p: float = ...,
    q: float = ...,
    eta_r: float = ...,
    gamma: float = ...,
    beta: float = ...,
) -> NDArray[np.int64]: ...
@overload
def prune_count(
    index: float, d: int, *, p: float = ..., q: float = ..., eta_r: float = ..., gamma: float = ..., beta: float = ...
) -> int: ...
def prune_count(
    index: Any,
    d: Any,
    *,
    p: float = 0.5,
    q: float = 1.0,
    eta_r: float = 0.0,
    gamma: float = 1.0,
    beta: float = 0.9,
) -> Any:
    r"""Number c of entries of a group that SAP prunes in one round.

    .. math:: c = \lfloor \min(\gamma (d - r),\; \beta d) \rfloor

    with r from :func:`retention_bound`.

    Args:
        index: PQ Index I of the group: a number, or an array or tensor with one value a group.
        d: Number of unpruned entries of the group, of the same shape.
        p: The smaller norm that ``index`` was computed with.
        q: The larger norm.
        eta_r: Share of the p-th power mass that may be lost; 0 or more.
        gamma: Factor on the prunable number ``d - r``; 0 or more.
        beta: The largest share of the group that may be pruned, in [0, 1].

    Returns:
        c, ``0 <= c <= d``: int for numbers, int64 array or tensor of the inputs' shape otherwise. 0 where the index
        is NaN (a group of zeros, or an empty one).

    Raises:
        ValueError: if an argument is out of its range.
        TypeError: if one of them is no number.

    Example:
        >>> prune_count(0.5, 100)
        50
        >>> prune_count(0.5, 100, gamma=10.0)  # beta limits a round to 90 %
        90

    Source: Algorithm 1 of the paper; the floor is taken of the whole minimum, so that no entry is lost to rounding.
    """
    rule = Hyperparameters(p, q, eta_r, gamma, beta)
    _check_groups(index, d)
    if isinstance(index, Tensor) or isinstance(d, Tensor):
        r = retention_bound(index, d, p=p, q=q, eta_r=eta_r)
        d = torch.as_tensor(d, device=r.device).to(torch.float64)
        return torch.floor(torch.minimum(gamma * (d - r), beta * d)).nan_to_num(0.0).clamp_min(0).to(torch.int64)
    c = rule.count(np.asarray(index, np.float64), np.asarray(d))
    return c if c.ndim else int(c)
