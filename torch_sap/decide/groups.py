"""Entries to measure and prune, the groups that a scope makes of them, and the pieces they are read in.

:func:`split` knows the scopes. Behind it there are two kinds of groups: whole tensors taken together, and the rows
(output channels) of one tensor, each for itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from torch_sap.arguments import check_choice
from torch_sap.decide.keys import common_dtype

Scope = Literal["global", "layer", "neuron"]

SLICES = 64
"""Slices of dimension 0 that are summed in one go where the output channels are dimension 1."""


class Shard(Protocol):
    """A local tensor's place in a whole that several processes hold, and their exchanges of small tables.

    The methods are documented at :class:`torch_sap.distributed.sharded.Part`.
    """

    @property
    def dim(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def rank(self) -> int: ...
    def bounds(self, rank: int) -> tuple[int, int]: ...
    def gather(self, tensor: Tensor) -> list[Tensor]: ...
    def gather_along(self, tensor: Tensor) -> Tensor: ...
    def add_up(self, tensor: Tensor) -> Tensor: ...
    def own(self, whole: Tensor) -> Tensor: ...
    def same_processes(self, other: Any) -> bool: ...


@dataclass(frozen=True)
class Entry:
    """A tensor to measure and prune.

    Attributes:
        name: Dotted path of the parameter.
        scores: What ranks the entries by magnitude (the weights, unless the user gave scores), any shape, no gradient.
        mask: Bool tensor of the same shape, False where pruned; None if nothing is.
        source: What the scores are, for messages.
        channel_dim: Dimension of the output channels, the rows of the neuron scope: 0 or 1.
        channel_groups: Parts that dimension 0 is cut into, each with output channels of its own (transposed
            convolutions).
        part: Where the scores lie in a tensor that is cut over several processes; None if they are all of it.
        out: What a step writes to, of the shape of the scores: a new mask, or the weights themselves.
    """

    name: str
    scores: Tensor
    mask: Tensor | None = None
    source: str = "weights"
    channel_dim: int = 0
    channel_groups: int = 1
    part: Shard | None = None
    out: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tuple(self.scores.shape) if self.part is None else self.part.shape

    @property
    def row_count(self) -> int:
        """Output channels of the local tensor; 1 for a tensor of one dimension."""
        shape = self.scores.shape
        if len(shape) < 2:
            return 1
        return int(shape[0] if self.channel_dim == 0 else shape[1] * self.channel_groups)

    @property
    def cuts_rows(self) -> bool:
        """Whether other processes have parts of the same rows."""
        part = self.part
        return part is not None and not (part.dim == self.channel_dim == 0 and self.channel_groups == 1)

    def rows(self, tensor: Tensor) -> list[Tensor]:
        """Views of a tensor of the same shape with the output channels in dimension 0."""
        if tensor.dim() < 2:
            return [tensor.reshape(1, -1)]
        return [chunk.movedim(self.channel_dim, 0) for chunk in tensor.chunk(self.channel_groups)]

    def with_whole_rows(self) -> Entry:
        """The entry itself, or the whole tensor from all processes if they have parts of its rows."""
        if self.part is None or not self.cuts_rows:
            return self
        mask = None if self.mask is None else self.part.gather_along(self.mask)
        return replace(self, scores=self.part.gather_along(self.scores), mask=mask, part=None)


class Group(NamedTuple):
    """Entries with one d, I, r and c together, or one entry with its own for each row (``by_row``)."""

    name: str
    """ "global", or the name of the tensor."""
    entries: Sequence[Entry]
    by_row: bool
    dtype: torch.dtype
    """Type in which the magnitudes of all entries compare."""

    @property
    def part(self) -> Shard | None:
        """A part that stands for the processes that hold the group; None if nothing of it is sharded.

        Raises:
            NotImplementedError: if its tensors are sharded over different processes.
        """
        parts = [entry.part for entry in self.entries if entry.part is not None]
        if any(not part.same_processes(parts[0]) for part in parts):
            raise NotImplementedError(
                "parameters of one group must be sharded over the same processes; use scope 'layer' or 'neuron'"
            )
        return parts[0] if parts else None

    @property
    def size(self) -> int:
        """Local entries, pruned or not."""
        return sum(entry.scores.numel() for entry in self.entries)


def split(entries: Sequence[Entry], scope: Scope) -> list[Group]:
    """Split entries, in order of position, into the groups of a scope.

    "global": one group of all; "layer": one per tensor; "neuron": one per output channel, of which those of a tensor
    are one Group with ``by_row``.

    Raises:
        ValueError: if there is no such scope, or a tensor has no rows; it is named.
    """
    check_scope(scope)
    if scope == "global":
        return [Group("global", entries, False, common_dtype(entry.scores for entry in entries))]
    for entry in entries:
        if scope == "neuron" and len(entry.shape) < 2:
            raise ValueError(
                f"{entry.name} must have more than one dimension to have rows, got shape {entry.shape}; "
                "leave it out, or take another scope"
            )
    return [Group(entry.name, [entry], scope == "neuron", entry.scores.dtype) for entry in entries]


def check_scope(scope: object) -> None:
    """Raise a ValueError unless there is such a scope."""
    check_choice("scope", scope, get_args(Scope))


class Piece(NamedTuple):
    """A part of an entry's scores, mask and output to work on at once; arrays on the CPU."""

    rows: slice
    """Its rows in the entry."""
    shape: tuple[int, int, int]
    """(A, C, K): C rows, whose entries are dimensions 0 and 2. The parts have any shape with as many entries."""
    scores: Any
    mask: Any
    out: Any


def pieces(entry: Entry, size: int, view: Callable[[Tensor], Any], *, by_row: bool = False) -> Iterator[Piece]:
    """Cut an entry into pieces of at most ``size`` entries, a multiple of ``backends.BLOCK``.

    ``view`` turns a tensor into what a backend works on. With ``by_row`` pieces are whole rows; otherwise they are in
    order of position (of the flat index), and long rows are cut.
    """
    tensors, groups = (entry.scores, entry.mask, entry.out), entry.channel_groups
    rows_lead = by_row or entry.channel_dim == 0 or entry.scores.dim() < 2
    cut = entry.rows if rows_lead else lambda tensor: list(tensor.chunk(groups))
    for number, chunk in enumerate(zip(*([None] * groups if t is None else cut(t) for t in tensors), strict=True)):
        lead, *rest = chunk[0].shape
        inner = math.prod(rest)
        if rows_lead and inner > size and not by_row and all(t is None or t.is_contiguous() for t in chunk):
            flat = [None if t is None else view(t.reshape(lead, -1)) for t in chunk]
            for row in range(lead):
                here = slice(number * lead + row, number * lead + row + 1)
                for start in range(0, inner, size):
                    parts = (None if t is None else t[row, start : start + size] for t in flat)
                    yield Piece(here, (1, 1, min(size, inner - start)), *parts)
            continue
        step = max(1, size // max(1, inner)) if rows_lead else max(1, size // max(1, inner) // SLICES) * SLICES
        opened = [None if t is None else view(t) for t in chunk]
        for start in range(0, lead, step):
            count = min(step, lead - start)
            parts = (None if t is None else t[start : start + step] for t in opened)
            if rows_lead:
                first = number * lead + start
                yield Piece(slice(first, first + count), (1, count, inner), *parts)
            else:
                channels = rest[0]
                rows = slice(number * channels, (number + 1) * channels)
                yield Piece(rows, (count, channels, inner // max(1, channels)), *parts)
