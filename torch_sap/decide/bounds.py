"""Bounds: r of the paper's Theorem 2 and the count c of its Algorithm 1, from the PQ Index.

Source: Diao et al., "Pruning Deep Neural Networks from a Sparsity Perspective", ICLR 2023 (arXiv 2302.05601).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, TypeVar

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

    def retain(self, index: NDArray[np.float64], d: NDArray[Any]) -> NDArray[np.float64]:
        """r of groups with these PQ Indices and sizes."""
        p, q = self.p, self.q
        return np.asarray(d * (1 + self.eta_r) ** (-q / (q - p)) * (1 - index) ** (p * q / (q - p)))

    def count(self, index: NDArray[np.float64], d: NDArray[Any]) -> NDArray[np.int64]:
        """c of groups with these PQ Indices and sizes."""
        c = np.floor(np.minimum(self.gamma * (d - self.retain(index, d)), self.beta * d))
        return np.maximum(np.where(np.isnan(c), 0.0, c), 0.0).astype(np.int64)


@dataclass(frozen=True)
class FixedRatio(Hyperparameters):
    """A fixed share of every group, however sparse it is: what Lottery Ticket and One Shot prune.

    Attributes:
        ratio: Share P of the unpruned entries that one round prunes, in [0, 1].
    """

    ratio: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("ratio", self.ratio, low=0, high=1)

    def to_dict(self) -> dict[str, float]:
        """The numbers that it uses, by name."""
        return {"p": self.p, "q": self.q, "ratio": self.ratio}

    def count(self, index: NDArray[np.float64], d: NDArray[Any]) -> NDArray[np.int64]:
        """``round(ratio * d)``, as torch.nn.utils.prune rounds an amount; 0 for groups of zeros, as in SAP."""
        return np.where(np.isnan(index), 0, np.rint(self.ratio * d)).astype(np.int64)


Values = TypeVar("Values", float, NDArray[Any], Tensor)
"""One value per group."""


def retention_bound(index: Values, d: Values | int, *, p: float = 0.5, q: float = 1.0, eta_r: float = 0.0) -> Values:
    r"""Lower bound r on the number of entries to retain in a group with a given PQ Index.

    .. math:: r = d\,(1+\eta_r)^{-q/(q-p)}\,(1-I)^{pq/(q-p)}

    Args:
        index: PQ Index I of the group: a number, or an array or tensor with one value per group.
        d: Number of unpruned entries of the group: one number, or of the same shape.
        p: The smaller norm that ``index`` was computed with.
        q: The larger norm.
        eta_r: Share of the p-th power mass that may be lost; 0 or more.

    Returns:
        r as a real number (not rounded): float for numbers, float64 array or tensor of the inputs' shape otherwise.
        NaN where the index is NaN.

    Raises:
        ValueError: if not ``0 < p < q``, if ``eta_r`` or d is negative, or if an index is larger than 1.
        TypeError: if one of them is not a number.

    Example:
        >>> retention_bound(0.0, 100)  # all entries equal: keep all
        100.0
        >>> retention_bound(0.5, 100)
        50.0

    Source: Theorem 2 of the paper.
    """
    rule = Hyperparameters(p, q, eta_r)
    return _like(rule.retain(*_arrays(index, d)), index, d)  # type: ignore[no-any-return]


def prune_count(
    index: Values,
    d: Values | int,
    *,
    p: float = 0.5,
    q: float = 1.0,
    eta_r: float = 0.0,
    gamma: float = 1.0,
    beta: float = 0.9,
) -> Values:
    r"""Number c of entries of a group that SAP prunes in one round.

    .. math:: c = \lfloor \min(\gamma (d - r),\; \beta d) \rfloor

    with r from :func:`retention_bound`.

    Args:
        index: As of :func:`retention_bound`, and so are d, p, q, eta_r.
        d: Number of unpruned entries of the group.
        p: The smaller norm.
        q: The larger norm.
        eta_r: Share of the p-th power mass that may be lost.
        gamma: Factor on the prunable number ``d - r``; 0 or more.
        beta: The largest share of the group that may be pruned, in [0, 1].

    Returns:
        c, ``0 <= c <= d``: int for numbers, int64 array or tensor of the inputs' shape otherwise. 0 where the index
        is NaN (a group of zeros, or an empty one).

    Raises:
        ValueError, TypeError: as of :func:`retention_bound`.

    Example:
        >>> prune_count(0.5, 100)
        50
        >>> prune_count(0.5, 100, gamma=10.0)  # beta limits a round to 90 %
        90

    Source: Algorithm 1 of the paper; the floor is taken of the whole minimum, so that no entry is lost to rounding.
    """
    rule = Hyperparameters(p, q, eta_r, gamma, beta)
    return _like(rule.count(*_arrays(index, d)), index, d)  # type: ignore[no-any-return]


def _arrays(index: Any, d: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """PQ Indices (or NaN) and sizes of groups as float64 arrays, checked."""
    arrays = [np.asarray(v.detach().cpu() if isinstance(v, Tensor) else v) for v in (index, d)]
    for name, given, values in zip(("index", "d"), (index, d), arrays, strict=True):
        if values.dtype.kind not in "iuf":
            raise TypeError(f"{name} must be a real number, or an array or tensor of them, got {given!r}")
    indices, sizes = (values.astype(np.float64) for values in arrays)
    for name, given, rule, broken in (
        ("index", index, "not be larger than 1", indices > 1),
        ("index", index, "be finite or NaN (not defined)", np.isinf(indices)),
        ("d", d, "not be negative", sizes < 0),
        ("d", d, "be finite", ~np.isfinite(sizes)),
    ):
        if broken.any():
            raise ValueError(f"{name} must {rule}, got {name}={given}")
    if () not in (indices.shape, sizes.shape) and indices.shape != sizes.shape:
        raise ValueError(f"d must be one number or have the shape of index, {indices.shape}, got {sizes.shape}")
    return indices, sizes


def _like(result: NDArray[Any], index: Any, d: Any) -> Any:
    """A result as a tensor on the device of an argument that is one; a bare number if both are numbers."""
    for given in (index, d):
        if isinstance(given, Tensor):
            return torch.from_numpy(np.asarray(result)).to(given.device)
    return result if result.ndim else result.item()
