"""Power sums in float64, and the PQ Index from them: all that SAP needs to know about a group.

One accumulator serves tensors, shards, files and all scopes: a pass adds the pieces of each row (output channel), the
processes' tables are merged, and the rows of a tensor and the tensors of a model are joined without rounding.

Source: Definition 1 of Diao et al., ICLR 2023 (arXiv 2302.05601).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from torch_sap.decide.backends import Backend
from torch_sap.decide.groups import Entry, Group, Piece, Scope, Shard, pieces, split
from torch_sap.decide.keys import INTEGER_OF
from torch_sap.decide.triton_backend import Triton, backend_of

Float64 = NDArray[np.float64]

Visit = Callable[[Piece, Any, Any, Any], Any]
"""Called with a piece, its keys, and d and the block sums of its rows, while the keys are in the cache."""

SAFE = 1e290
"""Row sums from 1 / SAFE to SAFE cannot overflow, nor lose digits to underflow, when they are joined."""


class PowerSums:
    """What one pass found in the unpruned entries of some tensors.

    Args:
        names: The names of the tensors.
        p: The smaller norm.
        q: The larger norm.
        tables: Of each tensor float64 of shape (4, rows): d, the sum of (|w| / s)^p, that of (|w| / s)^q, and log2(s).
        matrices: Matrices that the rows of each tensor belong to, as many each.

    Attributes:
        remaining: Unpruned entries of each whole tensor.
        zero: Names of the tensors whose unpruned entries are all zero. They have not been trained yet (LoRA's B, zero
            convolutions), so the global scope leaves them out, unless there are no others.
    """

    def __init__(
        self, names: Sequence[str], p: float, q: float, tables: Sequence[Float64], matrices: Sequence[int]
    ) -> None:
        self.p, self.q, self._matrices = p, q, dict(zip(names, matrices, strict=True))
        layers = [
            self._join(table) if count == 1 else np.hstack([self._join(rows) for rows in np.split(table, count, 1)])
            for table, count in zip(tables, matrices, strict=True)
        ]
        self.remaining = [int(layer[0].sum()) for layer in layers]
        self.zero = {name for name, layer in zip(names, layers, strict=True) if layer[0].any() and not layer[2].any()}
        counted = [layer for name, layer in zip(names, layers, strict=True) if name not in self.zero]
        self._tables: dict[str, dict[str, Float64]] = {
            "neuron": dict(zip(names, tables, strict=True)),
            "layer": dict(zip(names, layers, strict=True)),
            "global": {"global": self._join(np.hstack(counted or layers))},
        }

    def _join(self, table: Float64) -> Float64:
        """The table of one group of all rows, of shape (4, 1), added without rounding."""
        scale, sums = 0.0, table[1:3]
        if table[3].any() and np.isfinite(largest := table[3].max(initial=-np.inf, where=table[2] > 0)):
            scale = largest
            with np.errstate(under="ignore"):
                sums = sums * np.exp2(np.minimum(table[3] - scale, 0) * np.array([[self.p], [self.q]]))
        return np.array([[table[0].sum()], [math.fsum(sums[0].tolist())], [math.fsum(sums[1].tolist())], [scale]])

    def updated(self, other: PowerSums) -> PowerSums:
        """The same with the tables of another one in the place of those of its tensors."""
        tables = {**self._tables["neuron"], **other._tables["neuron"]}
        return PowerSums(list(tables), self.p, self.q, list(tables.values()), list(self._matrices.values()))

    def d(self, scope: Scope) -> dict[str, NDArray[np.int64]]:
        """Unpruned entries of each group of a scope, by the group's name; arrays with one value per group."""
        return {name: table[0].astype(np.int64) for name, table in self._tables[scope].items()}

    def index(self, scope: Scope) -> dict[str, Float64]:
        """PQ Index of each group of a scope, by the group's name; NaN where a group is empty or all zero."""
        return {
            name: index_from_sums(table[1], table[2], table[0], p=self.p, q=self.q)
            for name, table in self._tables[scope].items()
        }


def power_sums(entries: Sequence[Entry], p: float, q: float) -> PowerSums:
    """Measure the unpruned entries of tensors in one pass.

    Raises:
        ValueError: if an entry holds NaN or infinity; it is named.
    """
    whole = [entry.made_whole("layer") for entry in entries]
    return visit_sums(whole, split(whole, "layer"), p, q, backend_of(whole))[0]


def visit_sums(
    entries: Sequence[Entry],
    groups: Sequence[Group],
    p: float,
    q: float,
    backend: Backend,
    visits: Sequence[Visit | None] | None = None,
) -> tuple[PowerSums, dict[int, list[Any]]]:
    """Measure entries in one pass, split into groups, and visit the keys in the same pass.

    ``visits`` has one function per group, or None. Returned are the sums and, by the id of each entry of a group, what
    its visits returned, in order of position. Raises a ValueError that names an entry with NaN or infinity.
    """
    if isinstance(backend, Triton):
        return joined_sums(entries, groups, backend.start(groups).tables(p, q), p, q, backend), {}
    work = [
        (number, entry, piece)
        for number, group in enumerate(groups)
        for entry in group.entries
        for piece in pieces(entry, backend.chunk, backend.view, by_row=group.by_row)
    ]

    def add(number: int, entry: Entry, piece: Piece) -> tuple[Any, Any, Any]:
        dtype, visit = groups[number].dtype, visits[number] if visits else None
        keys, d = backend.keys(piece.scores, piece.mask, dtype), backend.row_counts(piece.mask, piece.shape)
        sums = backend.block_sums(keys, dtype, piece.shape, (p, q), None)
        return d, sums, None if visit is None else visit(piece, keys, d, sums)

    found = backend.map(add, work)
    read = backend.read([table for d, sums, _ in found for table in (d, sums)])
    in_groups = [entry for group in groups for entry in group.entries]
    parts: dict[int, list[tuple[Piece, Any, Any]]] = {id(entry): [] for entry in in_groups}
    seen: dict[int, list[Any]] = {id(entry): [] for entry in in_groups}
    for (_, entry, piece), d, sums, (*_, result) in zip(work, read[::2], read[1::2], found, strict=True):
        parts[id(entry)].append((piece, d, sums))
        seen[id(entry)].append(result)
    of_parts = {id(entry): _table(entry.row_count, parts[id(entry)]) for entry in in_groups}
    return joined_sums(entries, groups, of_parts, p, q, backend), seen


def joined_sums(
    entries: Sequence[Entry],
    groups: Sequence[Group],
    of_parts: Mapping[int, Float64],
    p: float,
    q: float,
    backend: Backend,
) -> PowerSums:
    """Join the tables of the entries of groups (by their ids), of this process and all others.

    Raises:
        ValueError: if an entry has NaN or infinity; it is named.
    """
    of_tensor: dict[str, list[Float64]] = {entry.name: [np.zeros((4, 0))] for entry in entries}
    for group in groups:
        for entry in group.entries:
            of_tensor[entry.name].append(of_parts[id(entry)])
    tables = _merged(entries, [np.hstack(of_tensor[entry.name]) for entry in entries])
    for entry, table in zip(entries, tables, strict=True):
        if (unsafe := out_of_range(table[1:3], table[0], entry.scores.dtype, q)).any():
            table[:, unsafe] = _scaled_table(entry, p, q, backend)[:, unsafe]
    return PowerSums([e.name for e in entries], p, q, tables, [e.matrix_count for e in entries])


def _table(row_count: int, parts: Sequence[tuple[Piece, Any, Any]]) -> Float64:
    """Put the rows of a local tensor together from its pieces, the blocks of each row in order."""
    table, blocks = np.zeros((4, row_count)), {}  # type: ignore[var-annotated]
    for piece, d, sums in parts:
        blocks.setdefault((piece.rows.start, piece.rows.stop), []).append((d, sums))
    for (start, stop), found in blocks.items():
        table[0, start:stop] = sum(d for d, _ in found)
        table[1:3, start:stop] = join_blocks(
            found[0][1] if len(found) == 1 else np.concatenate([sums for _, sums in found], 1)
        )
    return table


def join_blocks(sums: Float64) -> Float64:
    """Sums of rows from those of their blocks in order, (exponents, blocks, rows) -> (exponents, rows)."""
    return sums[:, 0] if sums.shape[1] == 1 else np.ascontiguousarray(sums.transpose(0, 2, 1)).sum(2)


def _merged(entries: Sequence[Entry], tables: list[Float64]) -> list[Float64]:
    """The tables of whole tensors. Processes exchange theirs once for all entries that the same processes hold."""
    merged = list(tables)
    for part in distinct([entry.part for entry in entries]):
        here = [i for i, entry in enumerate(entries) if entry.part is not None and part.same_processes(entry.part)]
        widths = part.gather(torch.tensor([[tables[i].shape[1] for i in here]], device="cpu"))
        values = part.gather(torch.from_numpy(np.hstack([tables[i] for i in here])))
        cut = [v.split(row[0].tolist(), 1) for v, row in zip(values, widths, strict=True)]
        for i, of_entry in zip(here, zip(*cut, strict=True), strict=True):
            every = [table.numpy() for table in of_entry]
            merged[i] = np.sum(every, axis=0) if entries[i].cuts_rows else np.concatenate(every, 1)
    return merged


def distinct(parts: Sequence[Shard | None]) -> list[Shard]:
    """One part for each set of processes."""
    found: list[Shard] = []
    for part in parts:
        if part is not None and not any(part.same_processes(other) for other in found):
            found.append(part)
    return found


def out_of_range(sums: Float64, d: NDArray[Any], dtype: torch.dtype, q: float) -> NDArray[np.bool_]:
    """The rows whose sums overflowed or are not finite, or may have lost digits to underflow."""
    unsafe = np.asarray(~(sums < SAFE).all(0))  # NaN, too
    if dtype is torch.float64 or q > 6:
        unsafe |= (d > 0) & (sums < 1 / SAFE).any(0)
    return unsafe


def _scaled_table(entry: Entry, p: float, q: float, backend: Backend) -> Float64:
    """The table of an entry with magnitudes divided by a power of two near the largest of each row.

    Raises:
        ValueError: if a weight is NaN or infinite, in every process.
    """
    whole, dtype = entry.with_whole_rows(), entry.scores.dtype
    table = np.zeros((4, whole.row_count))
    for piece in pieces(whole, backend.chunk, backend.view, by_row=True):
        top = backend.largest(backend.keys(piece.scores, piece.mask, dtype), dtype, piece.shape)
        d, top = backend.read([backend.row_counts(piece.mask, piece.shape), top])
        shift = np.frexp(top)[1].astype(np.int64)
        keys = backend.keys(piece.scores, piece.mask, dtype)
        (sums,) = backend.read([backend.block_sums(keys, dtype, piece.shape, (p, q), shift)])
        table[:, piece.rows] = d, *np.where(np.isfinite(top), sums.sum(1), top), shift
    (table,) = _merged([whole], [table])
    if not np.isfinite(table).all():
        kind = "NaN" if np.isnan(table).any() else "infinite"
        raise ValueError(f"{entry.source} must be finite, but {entry.name} of shape {entry.shape} has {kind} entries")
    return table


def check_finite(entries: Sequence[Entry]) -> None:
    """Raise a ValueError that names the tensor if an unpruned entry is NaN or infinite, faster than the sums do."""
    backend = backend_of(entries)
    work = [
        (i, entry.scores.dtype, piece)
        for i, entry in enumerate(entries)
        for piece in pieces(entry, backend.chunk, backend.view)
        if math.prod(piece.shape)
    ]

    def is_bad(i: int, dtype: torch.dtype, piece: Piece) -> Any:
        infinity = int(torch.tensor(torch.inf, dtype=dtype, device="cpu").view(INTEGER_OF[dtype]))
        return backend.keys(piece.scores, piece.mask, dtype).max() >= infinity

    bad = np.zeros((1, len(entries)))
    for (i, *_), found in zip(work, backend.read(backend.map(is_bad, work)), strict=True):
        bad[0, i] += float(found)
    for part in distinct([entry.part for entry in entries]):
        bad = part.add_up(torch.from_numpy(bad)).numpy()
    for entry, found in zip(entries, bad[0], strict=True):
        if found:
            power_sums([entry], 0.5, 1.0)  # says whether it is NaN


def count_remaining(entries: Sequence[Entry]) -> list[int]:
    """Unpruned entries of each whole tensor, from the masks alone."""
    here = [entry.scores.numel() if entry.mask is None else int(entry.mask.sum()) for entry in entries]
    counts = torch.tensor([here], dtype=torch.int64, device="cpu")
    for part in distinct([entry.part for entry in entries]):
        cut = [i for i, entry in enumerate(entries) if entry.part is not None and part.same_processes(entry.part)]
        counts[:, cut] = part.add_up(counts[:, cut])
    return [int(count) for count in counts[0]]


def index_from_sums(sum_p: Float64, sum_q: Float64, d: NDArray[Any], *, p: float, q: float) -> Float64:
    r"""Compute the PQ Index of groups from their power sums, NaN where a group is empty or all zero.

    .. math:: I = 1 - d^{1/q-1/p} \frac{\|w\|_p}{\|w\|_q} = 1 - \frac{(\sum|w|^p / d)^{1/p}}{(\sum|w|^q / d)^{1/q}}

    The form on the right, a ratio of power means, overflows for no d.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        index = 1 - (sum_p / d) ** (1 / p) / (sum_q / d) ** (1 / q)
    return np.where((d > 0) & (sum_q > 0), np.maximum(index, 0.0), np.nan)
