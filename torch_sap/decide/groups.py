"""Scope: how the entries of tensors are split into the groups that one I, r and c are computed over.

Only :func:`split` knows the scopes. Behind it there are two kinds of groups, whole tensors pooled and the rows of one
tensor, that can do the same two things: give their power sums, and give masks without their smallest entries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_sap.decide.across import keep_largest_across
from torch_sap.decide.bounds import Hyperparameters
from torch_sap.decide.device import batch_sums
from torch_sap.decide.exact import keep_largest, keep_largest_in_rows
from torch_sap.decide.keys import as_array, chunk_size, common_dtype, count_true, flatten_all, keys_of, sort_rows
from torch_sap.decide.sieve import Sieve, Sifted, expect
from torch_sap.decide.sums import flat_sums, index_from_sums, row_sums
from torch_sap.decide.threads import Job, map_pieces
from torch_sap.distributed.sharded import Part, gather_along, is_dtensor

Scope = Literal["global", "layer", "neuron"]


@dataclass(frozen=True)
class Entry:
    """A tensor to measure and prune.

    Attributes:
        name: Dotted path of the parameter.
        scores: What ranks the entries by magnitude (the weights, unless the user gave scores), any shape, no gradient.
        mask: Bool tensor of the scores' shape, False where pruned; None if nothing is.
        source: What the scores are, for messages.
        channel_dim: Dimension of the output channels, the rows of the neuron scope.
        channel_groups: Parts that dimension 0 is cut into, each with output channels of its own (transposed
            convolutions).
        part: Where the scores lie in a tensor that is cut over several processes; None: they are all of it.
    """

    name: str
    scores: Tensor
    mask: Tensor | None = None
    source: str = "weights"
    channel_dim: int = 0
    channel_groups: int = 1
    part: Part | None = None

    def __post_init__(self) -> None:
        if is_dtensor(self.scores):
            raise TypeError(
                f"{self.name} is a DTensor, whose parts only the whole-model functions and SAP can measure and prune; "
                "use its full_tensor() here"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tuple(self.scores.shape) if self.part is None else self.part.shape

    @property
    def on_host(self) -> bool:
        """Whether the entries are on the CPU, where numpy works on them."""
        return self.scores.is_cpu

    def rows(self, tensor: Tensor) -> list[Tensor]:
        """Views of a tensor of the scores' shape that have the output channels in dimension 0."""
        return [part.movedim(self.channel_dim, 0) for part in tensor.chunk(self.channel_groups)]

    def with_whole_rows(self) -> Entry:
        """The entry itself, or the whole tensor from all processes if they have pieces of its output channels."""
        part = self.part
        if part is None or (part.dim == self.channel_dim and self.channel_groups == 1):
            return self
        mask = None if self.mask is None else gather_along(self.mask, part)
        return replace(self, scores=gather_along(self.scores, part), mask=mask, part=None)


class Pool:
    """One group of all entries of one or more tensors."""

    def __init__(self, name: str, entries: Sequence[Entry]) -> None:
        self.name, self.entries = name, entries
        self.dtype = common_dtype(entry.scores for entry in entries)
        self.on_host = all(entry.on_host for entry in entries)
        self.parts = [entry.part for entry in entries]
        self.tensors = [(entry.scores, entry.mask) for entry in entries]
        self.expected: Hyperparameters | None = None
        self.sieve: Sieve | None = None
        self.sifted: list[Sifted] = []

    def expect(self, rule: Hyperparameters) -> None:
        """Let the pass over the weights that gives the sums prepare the masks of a rule too, on the host."""
        if self.on_host and not any(self.parts):
            self.expected = rule

    def sums(self, exponents: Sequence[float], scale: float) -> Job:
        """The making of float64 tables of shape (1 + exponents, 1) of the group's parts: d, then the power sums."""
        flats: list[Any] = flatten_all(self.tensors)
        if not self.on_host:  # parts are put together with those of other processes one by one
            apart = [[flat] for flat in flats]
            joined = [list(of_one) for _, of_one in groupby(flats, key=lambda flat: flat[0].device)]
            return batch_sums(apart if any(self.parts) else joined, self.dtype, exponents, scale)
        how: dict[str, Any] = {}
        self.sieve = None if self.expected is None else expect(self.tensors, self.dtype, self.expected)
        if self.sieve is not None:
            how["visit"] = self.sieve.sift
            flats = [(*flat, keep) for flat, keep in zip(flats, self.sieve.flats, strict=True)]
        job = flat_sums(flats, self.dtype, exponents, scale=scale, **how)

        def gather(found: list[Any]) -> list[Any]:
            sums, self.sifted = job.gather(found)
            d = [scores.numel() if mask is None else count_true(mask) for scores, mask in self.tensors]
            return [_with_count(here, table) for here, table in zip(d, sums, strict=True)]

        return job._replace(gather=gather)

    def join(self, tables: list[NDArray[np.float64]]) -> NDArray[np.float64]:
        """The table of the group from those of its tensors and their parts, added without rounding."""
        if len(tables) == 1:
            return tables[0]
        rows = np.hstack(tables)
        return np.array([[math.fsum(row) if np.isfinite(row).all() else np.inf] for row in rows])

    def ordered(self) -> Iterator[Any]:
        """All keys in ascending order, pruned ones (0) first, shape (1, entries)."""
        keys = [keys_of(e.scores, e.mask, self.dtype, on_host=self.on_host).reshape(-1) for e in self.entries]
        yield sort_rows(np.concatenate(keys)[None] if self.on_host else torch.cat(keys)[None])

    def masks(self, counts: NDArray[np.int64], unpruned: NDArray[np.int64]) -> list[Tensor | None]:
        """New masks without the ``counts[0]`` smallest entries, one a tensor; None where nothing is pruned."""
        if counts[0] == 0:
            return [entry.mask for entry in self.entries]
        count, sieve, self.sieve = int(counts[0]), self.sieve, None
        if sieve is not None and (masks := sieve.finish(self.sifted, count, int(unpruned[0]))) is not None:
            return list(masks)
        pruned = sum(math.prod(entry.shape) for entry in self.entries) - int(unpruned[0])
        if any(self.parts):
            return list(keep_largest_across(self.tensors, self.parts, count, pruned, on_host=self.on_host))
        return list(keep_largest(self.tensors, count, pruned, on_host=self.on_host))


class Rows:
    """The rows (output channels) of one tensor, each a group of its own."""

    def __init__(self, entry: Entry) -> None:
        self.name, self.given = entry.name, entry
        self.entry = entry.with_whole_rows()
        self.entries, self.parts = [self.entry], [self.entry.part]
        self.dtype, self.on_host = entry.scores.dtype, entry.on_host
        self.expected: Hyperparameters | None = None
        self.keep: Tensor | None = None
        self.counts = np.zeros(0, np.int64)

    def expect(self, rule: Hyperparameters) -> None:
        """Let the pass over the weights that gives the sums write the masks of a rule too, on the host."""
        if self.on_host and self.given.part is None:
            self.expected = rule

    def _blocks(self, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
        """Some rows of each tensor at a time, as views with the rows in dimension 0; arrays on the host."""
        for part in zip(
            *([None] * self.entry.channel_groups if t is None else self._rows(t) for t in tensors), strict=True
        ):
            first = next(t for t in part if t is not None)
            length = max(1, math.prod(first.shape[1:]))
            for start in range(0, len(first), size := max(1, chunk_size(self.on_host) // length)):
                yield tuple(None if t is None else t[start : start + size] for t in part)

    def _rows(self, tensor: Tensor) -> list[Any]:
        rows = self.entry.rows(tensor)
        return [as_array(part) for part in rows] if self.on_host else list(rows)

    def sums(self, exponents: Sequence[float], scale: float) -> Job:
        """The making of a float64 table of shape (1 + exponents, rows): d of each row, then its power sums."""
        rule, scores = self.expected, self.entry.scores
        self.keep = None if rule is None else torch.empty_like(scores, dtype=torch.bool)

        def table(scores: Any, mask: Any, keep: Any) -> Any:
            mask = _flat(mask)
            keys = keys_of(_flat(scores), mask, self.dtype, on_host=self.on_host, reuse=True)
            sums = row_sums(keys, self.dtype, exponents, scale=scale)
            d = _unpruned_in_rows(keys, mask)
            counts = None
            if rule is not None:  # each row is a group of its own: what goes is known, and the keys are at hand
                with np.errstate(over="ignore"):
                    index = index_from_sums(sums[0], sums[1], d, p=rule.p, q=rule.q)
                counts = rule.count(index, d)
                keep_largest_in_rows(keep, keys, mask, counts, d, on_host=True)
            return _with_count(d, sums), counts

        def gather(found: list[tuple[Any, Any]]) -> list[Any]:
            if not found:
                return [np.zeros((1 + len(exponents), 0))]
            tables, counts = zip(*found, strict=True)
            if rule is not None:
                self.counts = np.concatenate(counts)
            return [np.concatenate(tables, 1) if self.on_host else torch.cat(tables, 1)]

        return Job(table, list(self._blocks(scores, self.entry.mask, self.keep)), gather)

    def join(self, tables: list[NDArray[np.float64]]) -> NDArray[np.float64]:
        """The table of all rows from those of the parts."""
        return np.hstack(tables)

    def ordered(self) -> Iterator[Any]:
        """The keys of each row in ascending order, pruned ones (0) first, some rows at a time."""
        for scores, mask in self._blocks(self.entry.scores, self.entry.mask):
            keys = keys_of(scores, mask, self.dtype, on_host=self.on_host)
            yield sort_rows(_flat(keys))

    def masks(self, counts: NDArray[np.int64], unpruned: NDArray[np.int64]) -> list[Tensor | None]:
        """New mask without the ``counts[i]`` smallest entries of row i; None if nothing is pruned."""
        if self.entry.part is not None:
            here = slice(*self.entry.part.bounds(self.entry.part.rank))
            counts, unpruned = counts[here], unpruned[here]
        if not counts.any():
            return [self.given.mask]
        prepared, self.keep = self.keep, None
        if prepared is not None and np.array_equal(counts, self.counts):
            return [prepared]
        keep = torch.empty_like(self.entry.scores, dtype=torch.bool)
        blocks = list(self._blocks(keep, self.entry.scores, self.entry.mask))
        ends = np.cumsum([0] + [len(block[0]) for block in blocks]).tolist()
        numbers: list[Any] = [counts, unpruned]
        if not self.on_host:
            numbers = [torch.from_numpy(values).to(keep.device, non_blocking=True) for values in numbers]

        def write(out: Any, scores: Any, mask: Any, count: Any, d: Any) -> None:
            keys = keys_of(_flat(scores), None, self.dtype, on_host=self.on_host, reuse=True)
            keep_largest_in_rows(out, keys, _flat(mask), count, d, on_host=self.on_host)

        pieces = [
            (*block, *(values[start:end] for values in numbers))
            for block, (start, end) in zip(blocks, pairwise(ends), strict=True)
        ]
        map_pieces(write, pieces, on_host=self.on_host)
        if self.given.part != self.entry.part:
            assert self.given.part is not None
            keep = self.given.part.own(keep).contiguous()
        return [keep]


Group = Pool | Rows


def _flat(rows: Any) -> Any:
    """Rows in two dimensions."""
    return None if rows is None else rows.reshape(len(rows), -1)


def _unpruned_in_rows(keys: Any, mask: Any) -> Any:
    if isinstance(keys, Tensor):
        return torch.full((len(keys),), keys.shape[1], device=keys.device) if mask is None else mask.sum(1)
    if mask is None:
        return np.full(len(keys), keys.shape[1])
    return np.add.reduce(mask.view(np.uint8), axis=1, dtype=np.uint32)


def _with_count(d: Any, sums: Any) -> Any:
    """d as the first row of a table of sums."""
    if isinstance(sums, Tensor):
        return torch.cat([d.to(sums.dtype)[None], sums])
    return np.concatenate([np.asarray(d, np.float64).reshape(1, -1), sums])


def split(entries: Sequence[Entry], scope: Scope) -> list[Group]:
    """The groups of a scope.

    Args:
        entries: Tensors in order of position, at least one.
        scope: "global": one group of all; "layer": one a tensor; "neuron": one an output channel.

    Returns:
        Groups whose entries, taken together, are the given ones in their order.

    Raises:
        ValueError: if there is no such scope.
    """
    check_scope(scope)
    if scope == "global":
        return [Pool("global", entries)]
    if scope == "layer":
        return [Pool(entry.name, [entry]) for entry in entries]
    return [Rows(entry) for entry in entries]


def check_scope(scope: object) -> None:
    """Raise a ValueError unless there is such a scope."""
    if scope not in get_args(Scope):
        scopes = ", ".join(repr(known) for known in get_args(Scope))
        raise ValueError(f"scope must be one of {scopes}, got scope={scope!r}")
