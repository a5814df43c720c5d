"""Entries to measure and prune, the groups that a scope makes of them, and the pieces they are read in.

:func:`split` knows the scopes. Behind it there are two kinds of groups: whole tensors taken together, and the rows
(output channels) of one tensor, each for itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
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
        channel_dim: Dimension of the output channels, the rows of the neuron scope, in each part: 0 or 1.
        channel_groups: Parts that dimension 0 is cut into, each with output channels of its own (transposed
            convolutions).
        experts: Matrices that are stacked along dimension 0, of a tensor with 2 or 3 dimensions (mixture of experts);
            0 for a tensor that is not a stack. Each is a part, and a group of its own in the layer scope.
        part: Where the scores lie in a tensor that is cut over several processes; None if they are all of it.
        out: What a step writes to, of the shape of the scores: a new mask, or the weights themselves.
    """

    name: str
    scores: Tensor
    mask: Tensor | None = None
    source: str = "weights"
    channel_dim: int = 0
    channel_groups: int = 1
    experts: int = 0
    part: Shard | None = None
    out: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tuple(self.scores.shape) if self.part is None else self.part.shape

    @property
    def row_count(self) -> int:
        """Output channels of the local tensor; 1 for a tensor of one dimension."""
        if self.scores.dim() < 2:
            return 1
        lead, *rest = self.scores.shape
        if self.experts and len(rest) > 1:
            return int(lead * rest[self.channel_dim])
        return int(lead if self.channel_dim == 0 else rest[0] * (self.experts or self.channel_groups))

    @property
    def matrix_count(self) -> int:
        """Matrices of the whole tensor: 1, or those of a stack."""
        if not self.experts:
            return 1
        return self.shape[0] if len(self.shape) > 2 else self.experts

    @property
    def cuts_rows(self) -> bool:
        """Whether other processes have parts of the same rows, or of the same matrices of a stack."""
        if self.part is None:
            return False
        if self.experts:
            return self.part.dim != 0 or len(self.shape) == 2
        return not (self.part.dim == self.channel_dim == 0 and self.channel_groups == 1)

    @property
    def first_matrix(self) -> int:
        """The number of the first matrix that is here, among those of the whole tensor."""
        return self.part.bounds(self.part.rank)[0] if self.experts and self.part is not None else 0

    @property
    def own_rows(self) -> slice:
        """The rows that are here, among those of the whole tensor; all of them if rows are cut."""
        if self.part is None or self.cuts_rows:
            return slice(None)
        start, end = self.part.bounds(self.part.rank)
        rows = self.shape[1 + self.channel_dim] if self.experts else 1
        return slice(start * rows, end * rows)

    def parts(self, tensor: Tensor) -> list[Tensor]:
        """Views of a tensor of the same shape, each with output channels of its own, in order of position."""
        if self.experts and tensor.dim() > 2:
            return list(tensor.unbind())
        return list(tensor.chunk(self.experts or self.channel_groups))

    def rows(self, tensor: Tensor) -> list[Tensor]:
        """Views of a tensor of the same shape with the output channels in dimension 0."""
        if tensor.dim() < 2:
            return [tensor.reshape(1, -1)]
        return [part.movedim(self.channel_dim, 0) for part in self.parts(tensor)]

    def matrices(self) -> list[Entry]:
        """The entry itself, or one per matrix of a stack, which must be whole here."""
        if not self.experts:
            return [self]
        tensors = (self.scores, self.mask, self.out)
        cut = zip(*(repeat(None) if tensor is None else self.parts(tensor) for tensor in tensors), strict=False)
        return [replace(self, scores=s, mask=mask, out=out, experts=0, part=None) for s, mask, out in cut]

    def with_whole_rows(self) -> Entry:
        """The entry itself, or the whole tensor from all processes if they have parts of its rows."""
        if self.part is None or not self.cuts_rows:
            return self
        mask = None if self.mask is None else self.part.gather_along(self.mask)
        return replace(self, scores=self.part.gather_along(self.scores), mask=mask, part=None)

    def made_whole(self, scope: Scope) -> Entry:
        """The entry itself, or the whole tensor if processes have parts of what a scope takes together."""
        return self.with_whole_rows() if scope == "neuron" or self.experts else self


class Group(NamedTuple):
    """Entries with one d, I, r and c together, or one entry with its own for each row (``by_row``)."""

    name: str
    """ "global", or the name of the tensor."""
    entries: Sequence[Entry]
    by_row: bool
    dtype: torch.dtype
    """Type in which the magnitudes of all entries compare."""
    place: int = 0
    """Of its values among those with its name: the number of a stacked matrix."""

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

    "global": one group of all; "layer": one per tensor, or per matrix of a stack; "neuron": one per output channel, of
    which those of a tensor are one Group with ``by_row``. What the scope takes together must not be cut over processes,
    see :meth:`Entry.made_whole`.

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
    if scope == "neuron":
        return [Group(entry.name, [entry], True, entry.scores.dtype) for entry in entries]
    return [
        Group(entry.name, [matrix], False, matrix.scores.dtype, number)
        for entry in entries
        for number, matrix in enumerate(entry.matrices(), entry.first_matrix)
    ]


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
    tensors = (entry.scores, entry.mask, entry.out)
    rows_lead = by_row or entry.channel_dim == 0 or entry.scores.dim() < 2
    cut: Callable[[Tensor], list[Tensor]] = entry.rows if rows_lead else entry.parts
    if entry.experts and entry.channel_dim == 0 and all(t is None or t.is_contiguous() for t in tensors):
        cut = _rows_of_all  # fewer and larger pieces
    parts: Any = zip(*(repeat(None) if t is None else cut(t) for t in tensors), strict=False)
    for number, chunk in enumerate(parts):
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


def _rows_of_all(stack: Tensor) -> list[Tensor]:
    """The rows of all matrices of a stack, as one."""
    return [stack.flatten(0, -2)]
