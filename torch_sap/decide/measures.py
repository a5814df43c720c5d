r"""Measures of sparsity: the PQ Index and the Gini index, of a tensor and of groups of tensors.

Sources: Definition 1 of Diao et al., ICLR 2023 (arXiv 2302.05601); Hurley and Rickard, "Comparing measures of
sparsity", IEEE Transactions on Information Theory 55 (2009), for the Gini index.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_sap.arguments import check_norms
from torch_sap.decide.groups import Entry, Scope, split
from torch_sap.decide.keys import check_dtype, check_whole
from torch_sap.decide.sums import check_finite, power_sums

Float64 = NDArray[np.float64]


def pq_index(
    w: Tensor, p: float = 0.5, q: float = 1.0, *, dim: int | None = None, mask: Tensor | None = None
) -> Tensor:
    r"""PQ Index of a tensor: 0 if all magnitudes are equal, the larger the sparser, below 1.

    .. math:: I_{p,q}(w) = 1 - d^{1/q-1/p} \frac{\|w\|_p}{\|w\|_q}

    Args:
        w: Real floating-point tensor of any shape, type and device. The sums are taken in float64.
        p: The smaller norm, ``0 < p < q``.
        q: The larger norm.
        dim: Dimension to measure along; None measures all entries together.
        mask: Tensor of w's shape; entries where it is 0 are left out (they do not count in d). None counts all.

    Returns:
        float64 tensor on w's device, without gradient: 0-dimensional, or of w's shape without ``dim``. NaN where
        there is no entry or all are zero, since the index is not defined there (Remark 1 of the paper).

    Raises:
        ValueError: if not ``0 < p < q``, if w has NaN or infinite entries, or if mask has another shape.
        TypeError: if w is not a real floating-point tensor, mask not a tensor, or dim not an int.
        IndexError: if w has no such dimension.

    Example:
        >>> pq_index(torch.tensor([3.0, 3.0, 3.0])).item()
        0.0
        >>> pq_index(torch.tensor([1.0, 0.0, 0.0, 0.0])).item()  # one of four: 1 - 4 ** (1/q - 1/p)
        0.75

    Source: Definition 1 and Theorem 1 of the paper.
    """
    check_norms(p, q)
    entry = _entry(w, dim, mask)
    index = power_sums([entry], p, q).index("global" if dim is None else "neuron")
    return _result(index, w, dim)


def gini_index(w: Tensor, *, dim: int | None = None, mask: Tensor | None = None) -> Tensor:
    r"""Gini index of a tensor's magnitudes: 0 if all are equal, the larger the sparser, below 1.

    .. math:: G(w) = 1 - 2 \sum_{k=1}^{d} \frac{w_{(k)}}{\|w\|_1} \, \frac{d - k + 1/2}{d}

    with magnitudes in ascending order, :math:`w_{(1)} \le \dots \le w_{(d)}`.

    Args:
        w: Real floating-point tensor of any shape, type and device. A copy is sorted, the sum is taken in float64.
        dim: As of :func:`pq_index`.
        mask: As of :func:`pq_index`.

    Returns:
        float64 tensor on w's device, as of :func:`pq_index`, which raises the same errors.

    Example:
        >>> gini_index(torch.tensor([1.0, 0.0, 0.0, 0.0])).item()
        0.75

    Source: Hurley and Rickard (2009), table I.
    """
    entry = _entry(w, dim, mask)
    return _result(gini([entry], "global" if dim is None else "neuron"), w, dim)


def _entry(w: Tensor, dim: int | None, mask: Tensor | None) -> Entry:
    if not isinstance(w, Tensor):
        raise TypeError(f"w must be a tensor, got {type(w).__name__}")
    check_dtype(w, "w")
    check_whole(w, "w")
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a tensor or None, got {type(mask).__name__}")
        if mask.shape != w.shape:
            raise ValueError(f"mask must have the shape of w, {tuple(w.shape)}, got {tuple(mask.shape)}")
        mask = mask.detach().to(w.device) != 0
    if dim is None:
        return Entry("w", w.detach(), mask)
    if not isinstance(dim, int):
        raise TypeError(f"dim must be an int or None, got dim={dim!r}")
    if not -w.dim() <= dim < w.dim():
        raise IndexError(f"dim must be a dimension of w, of shape {tuple(w.shape)}, got dim={dim}")
    return Entry("w", _as_rows(w.detach(), dim), None if mask is None else _as_rows(mask, dim))


def _as_rows(tensor: Tensor, dim: int) -> Tensor:
    rows = tensor.movedim(dim, -1)
    return rows.reshape(math.prod(rows.shape[:-1]), rows.shape[-1])


def _result(found: Mapping[str, Float64], w: Tensor, dim: int | None) -> Tensor:
    shape = list(w.shape)
    if dim is None:
        shape = []
    else:
        del shape[dim]
    (values,) = found.values()
    return torch.from_numpy(values).reshape(shape).to(w.device)


def gini(entries: Sequence[Entry], scope: Scope) -> dict[str, Float64]:
    """Compute the Gini index of each group of a scope, by name; arrays with one value per group.

    A float64 copy of every group is sorted.

    Raises:
        ValueError: if an entry holds NaN or infinity; it is named.
        NotImplementedError: if an entry is sharded.
    """
    if sharded := [entry.name for entry in entries if entry.part is not None]:
        raise NotImplementedError(f"the Gini index needs whole tensors, but {sharded[0]} is sharded; leave out gini")
    check_finite(entries)
    if scope == "global":  # which leaves out tensors that are zero throughout, as PowerSums does
        alive = [
            entry for entry in entries if (entry.scores if entry.mask is None else entry.scores * entry.mask).any()
        ]
        entries = alive or entries
    found: dict[str, list[Float64]] = {}
    for group in split(entries, scope):
        values_of_tensor = found.setdefault(group.name, [np.zeros(0)])
        if group.by_row:
            values_of_tensor += _gini_of_blocks(group.entries[0])
        else:
            home = group.entries[0].scores.device
            kept = [e.scores.reshape(-1) if e.mask is None else e.scores[e.mask] for e in group.entries]
            values = torch.cat([each.double().abs().to(home) for each in kept])
            values_of_tensor.append(_gini_of_rows(values[None], values.new_tensor([len(values)])))
    return {name: np.concatenate(values) for name, values in found.items()}


def _gini_of_blocks(entry: Entry) -> Iterator[Float64]:
    """Gini indices of some rows at a time."""
    masks = repeat(None) if entry.mask is None else entry.rows(entry.mask)
    for rows, mask in zip(entry.rows(entry.scores), masks, strict=False):
        step = max(1, 2**22 // max(1, math.prod(rows.shape[1:])))
        for start in range(0, len(rows), step):
            values = rows[start : start + step].flatten(1).double().abs()
            keep = torch.ones_like(values) if mask is None else mask[start : start + step].flatten(1)
            yield _gini_of_rows(values * keep, keep.sum(1))


def _gini_of_rows(values: Tensor, d: Tensor) -> Float64:
    """Gini indices of rows. Pruned entries, zeros in front of the others, add nothing to the sums."""
    size = values.shape[1]
    scale = values.amax(1, keepdim=True) if size else values.new_ones(len(values), 1)  # sums of 1e308 overflow
    ordered = values.div(scale.where(scale > 0, 1.0)).sort(dim=1).values
    weight = size - torch.arange(1, size + 1, dtype=torch.float64, device=values.device) + 0.5
    total = ordered.sum(1)
    index = 1 - 2 * (ordered * weight).sum(1) / (total * d)
    return np.asarray(index.where(total > 0, torch.nan).cpu().numpy())
