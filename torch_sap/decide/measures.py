r"""Measures of sparsity: the PQ Index and the Gini index, of a tensor and of groups of tensors.

Sources: Definition 1 of Diao et al., ICLR 2023 (arXiv 2302.05601); Hurley and Rickard, "Comparing measures of
sparsity", IEEE Transactions on Information Theory 55 (2009), for the Gini index.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_sap.arguments import check_norms
from torch_sap.decide.groups import Entry, Group, Scope, split
from torch_sap.decide.keys import check_dtype, magnitudes
from torch_sap.decide.sums import index_from_sums
from torch_sap.decide.threads import run_jobs
from torch_sap.distributed.sharded import Part, common_part, gather

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
        TypeError: if w is no real floating-point tensor, mask no tensor, or dim no int.
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
    return _result(measure([entry], "global" if dim is None else "neuron", p, q), w, dim)


def gini_index(w: Tensor, *, dim: int | None = None, mask: Tensor | None = None) -> Tensor:
    r"""Gini index of a tensor's magnitudes: 0 if all are equal, the larger the sparser, below 1.

    .. math:: G(w) = 1 - 2 \sum_{k=1}^{d} \frac{w_{(k)}}{\|w\|_1} \, \frac{d - k + 1/2}{d}

    with magnitudes in ascending order, :math:`w_{(1)} \le \dots \le w_{(d)}`.

    Args:
        w: Real floating-point tensor of any shape, type and device. A copy is sorted, the sum is taken in float64.
        dim: Dimension to measure along; None measures all entries together.
        mask: Tensor of w's shape; entries where it is 0 are left out (they do not count in d). None counts all.

    Returns:
        float64 tensor on w's device, as of :func:`pq_index`.

    Raises:
        ValueError: if w has NaN or infinite entries, or if mask has another shape.
        TypeError: if w is no real floating-point tensor, mask no tensor, or dim no int.
        IndexError: if w has no such dimension.

    Example:
        >>> gini_index(torch.tensor([1.0, 0.0, 0.0, 0.0])).item()
        0.75

    Source: Hurley and Rickard (2009), table I.
    """
    entry = _entry(w, dim, mask)
    return _result(measure_gini([entry], "global" if dim is None else "neuron"), w, dim)


def _entry(w: Tensor, dim: int | None, mask: Tensor | None) -> Entry:
    if not isinstance(w, Tensor):
        raise TypeError(f"w must be a tensor, got {type(w).__name__}")
    check_dtype(w, "w")
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


def _result(found: dict[str, Float64], w: Tensor, dim: int | None) -> Tensor:
    shape = list(w.shape)
    if dim is None:
        shape = []
    else:
        del shape[dim]
    (values,) = found.values()
    return torch.from_numpy(values).reshape(shape).to(w.device)


def measure(entries: Sequence[Entry], scope: Scope, p: float, q: float) -> dict[str, Float64]:
    """PQ Index of each group of a scope, by name; arrays with one value a group.

    Raises:
        ValueError: if an entry holds NaN or infinity; it is named.
    """
    groups = split(entries, scope)
    found = measure_groups(groups, p, q)
    return {group.name: index for group, (_, index) in zip(groups, found, strict=True)}


class PowerSums:
    """STUB: what one pass over some entries found. To be replaced by the accumulator; the interface stays."""

    def __init__(self, entries: Sequence[Entry], p: float, q: float) -> None:
        self._found = {}
        for scope in ("global", "layer", "neuron"):
            groups = split(entries, scope)
            pairs = measure_groups(groups, p, q)
            self._found[scope] = {group.name: pair for group, pair in zip(groups, pairs, strict=True)}
        self.remaining = [int(d[0]) for d, _ in self._found["layer"].values()]

    def d(self, scope: Scope) -> dict[str, NDArray[np.int64]]:
        """Unpruned entries of each group of a scope, by the group's name; arrays with one value per group."""
        return {name: d for name, (d, _) in self._found[scope].items()}

    def index(self, scope: Scope) -> dict[str, Float64]:
        """PQ Index of each group of a scope, by the group's name; NaN where it is undefined."""
        return {name: index for name, (_, index) in self._found[scope].items()}


def power_sums(entries: Sequence[Entry], p: float, q: float) -> PowerSums:
    """One pass over the unpruned entries of tensors: d and the PQ Index in all scopes.

    Raises:
        ValueError: if an entry holds NaN or infinity; it is named.
    """
    return PowerSums(entries, p, q)


def measure_groups(groups: Sequence[Group], p: float, q: float) -> list[tuple[NDArray[np.int64], Float64]]:
    """d and I of each group. All sums are made before the first is read, so that a device is waited for once.

    Raises:
        ValueError: if an entry holds NaN or infinity; it is named.
    """
    on_host = all(group.on_host for group in groups)
    jobs = [group.sums((p, q), 1.0) for group in groups]
    tables = _to_host(groups, run_jobs(jobs, on_host=on_host))
    for i, (group, table) in enumerate(zip(groups, tables, strict=True)):
        if _out_of_range(group, table, q):
            again = run_jobs([group.sums((p, q), _safe_scale(group))], on_host=group.on_host)
            (tables[i],) = _to_host([group], again)
    return [(table[0].astype(np.int64), index_from_sums(table[1], table[2], table[0], p=p, q=q)) for table in tables]


def read(tensor: Tensor) -> Float64:
    """A float64 tensor's values on the host. Here, once a step, the host waits for the device."""
    return np.asarray(tensor.cpu().numpy())


def _to_host(groups: Sequence[Group], tables: list[list[Any]]) -> list[Float64]:
    """The tables of each group's tensors, read from each device and process at once, and put together by group."""
    on_device = [t for group in tables for t in group if isinstance(t, Tensor)]
    found: dict[int, Float64] = {}
    for device in {t.device for t in on_device}:
        here = [t for t in on_device if t.device == device]
        flat = read(torch.cat([t.reshape(-1) for t in here]))
        for t, values in zip(here, np.split(flat, np.cumsum([t.numel() for t in here])[:-1]), strict=True):
            found[id(t)] = values.reshape(tuple(t.shape))
    on_host = [[found[id(t)] if isinstance(t, Tensor) else t for t in group] for group in tables]
    gathered = _from_all_processes(on_host, [group.parts for group in groups])
    return [group.join(tables) for group, tables in zip(groups, gathered, strict=True)]


def _from_all_processes(tables: list[list[Float64]], parts: list[list[Part | None]]) -> list[list[Float64]]:
    """The tables of groups that are cut over several processes, from all of them. The others are left as they are."""
    ones = [common_part(group) for group in parts]
    gathered = list(tables)
    for ranks in dict.fromkeys(one.ranks for one in ones if one is not None):
        here = [i for i, one in enumerate(ones) if one is not None and one.ranks == ranks]
        one = ones[here[0]]
        assert one is not None
        received = iter(zip(*gather([table for i in here for table in tables[i]], one), strict=True))
        for i in here:  # of what every process has whole the first one's counts
            found = [(part, next(received)) for part in parts[i]]
            gathered[i] = [table for part, all_of_them in found for table in all_of_them[: None if part else 1]]
    return gathered


def _out_of_range(group: Group, table: Float64, q: float) -> bool:
    """Whether sums overflowed or a weight is not finite, or whether sums vanished though weights may not be zero."""
    if not np.isfinite(table).all():
        return True
    may_vanish = group.dtype is torch.float64 or q > 6
    return may_vanish and bool((table[1:] < 1e-290).any())


def _safe_scale(group: Group) -> float:
    """A power of two that brings the largest magnitude of a group near 1.

    Raises:
        ValueError: if a weight is NaN or infinite.
    """
    tops = [np.array([_largest(entry)]) for entry in group.entries]
    if (part := common_part(group.parts)) is not None:
        tops = [np.concatenate(every) for every in zip(*gather(tops, part), strict=True)]
    for entry, top in zip(group.entries, tops, strict=True):
        if not np.isfinite(top).all():
            kind = "NaN" if np.isnan(top).any() else "infinite"
            raise ValueError(
                f"{entry.source} must be finite, but {entry.name} of shape {entry.shape} has {kind} entries"
            )
    largest = float(max(top.max() for top in tops))
    return 2.0 ** -math.frexp(largest)[1] if largest else 1.0


def _largest(entry: Entry) -> float:
    scores = entry.scores if entry.mask is None else entry.scores.masked_fill(~entry.mask, 0)
    return float(scores.abs().max()) if scores.numel() else 0.0


def measure_gini(entries: Sequence[Entry], scope: Scope) -> dict[str, Float64]:
    """Gini index of each group of a scope, by name; arrays with one value a group. A copy of every group is sorted.

    Raises:
        ValueError: if an entry holds NaN or infinity; it is named.
    """
    groups = split(entries, scope)
    if sharded := [entry.name for entry in entries if entry.part is not None]:
        raise NotImplementedError(f"the Gini index needs whole tensors, but {sharded[0]} is sharded; leave out gini")
    found = measure_groups(groups, 0.5, 1.0)
    return {
        group.name: np.concatenate([np.zeros(0), *_gini(group, d)]) for group, (d, _) in zip(groups, found, strict=True)
    }


def _gini(group: Group, d: NDArray[np.int64]) -> list[Float64]:
    """Gini indices of the blocks of a group. Pruned entries, zeros in front of the others, add nothing to the sums."""
    blocks = []
    for keys in group.ordered():
        values = torch.as_tensor(magnitudes(keys, group.dtype))
        here, d = d[: len(values)], d[len(values) :]
        size = values.shape[1]
        weight = size - torch.arange(1, size + 1, dtype=torch.float64, device=values.device) + 0.5
        sums = torch.stack([(values * weight).sum(1), values.sum(1)]).cpu().numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            gini = 1 - 2 * sums[0] / (sums[1] * here)
        blocks.append(np.where(sums[1] > 0, gini, np.nan))
    return blocks
