"""Backend for GPUs: a step in a fixed number of launches, whatever the number of tensors.

:class:`Launches` describes all tensors of a step in one table, which is sent to the device once, and runs the kernels
of :mod:`torch_sap.decide.kernels` on it. Of three tables of numbers the CPU waits for two: the sums of all rows, from
which it computes how many entries go, and how many stay of each tensor.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from itertools import repeat
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_sap.decide import backends
from torch_sap.decide.backends import NUMPY, TORCH, Backend, Torch
from torch_sap.decide.groups import Entry, Group
from torch_sap.decide.keys import INTEGER_OF, common_dtype, key_bits

Int64 = NDArray[np.int64]

_log = logging.getLogger(__name__)

ROWS, WIDTH, STEPS = 16, 128, 16
"""A program measures up to this many rows, and columns in this many steps."""

BLOCK, BLOCKS = 2**11, 2**5
"""Entries that a program counts or writes at once, and how often."""

ROW_BLOCK = 2**10
"""Entries of one row that a program works on at once."""


OLDEST = (3, 5)
"""The oldest Triton that the kernels are tested with, that of PyTorch 2.9; they fail their tests with PyTorch 2.5's."""


class Counts(Protocol):
    """Of one group, or of the rows of one tensor (arrays with one value per group); see step.GroupValues."""

    @property
    def d(self) -> Int64:
        """Unpruned entries."""

    @property
    def c(self) -> Int64:
        """Entries to prune."""


class Triton(Torch):
    """The methods of :class:`Torch` for the rare cases, and :meth:`start` for all tensors at once."""

    def start(self, groups: Sequence[Group]) -> Launches:
        """Prepare the launches on some groups, whose entries are whole tensors on one device."""
        return Launches(groups)


TRITON = Triton()


def backend_of(entries: Sequence[Entry]) -> Backend:
    """NumPy if all tensors are on the CPU, Triton if they are whole and on a GPU where it runs, otherwise PyTorch."""
    if all(entry.scores.is_cpu for entry in entries):
        return NUMPY
    device = entries[0].scores.device
    plain = all(type(e.scores) is Tensor and e.part is None and e.scores.device == device for e in entries)
    return TRITON if plain and usable(device) else TORCH


@lru_cache
def usable(device: torch.device) -> bool:
    """Whether Triton's kernels run on a device. They need the package, OLDEST or newer, and usually a C compiler."""
    if not (device.type == "cuda" and torch.cuda.is_available() and find_spec("triton")):
        return False
    values = torch.ones(2, device=device)
    table = [[values.data_ptr(), torch.zeros(2, dtype=torch.bool, device=device).data_ptr(), 2, 4, 0]]
    try:
        if is_too_old(version := import_module("triton").__version__):
            raise ImportError(f"Triton {version} is older than those that are tested")
        kernels = import_kernels()
        run(kernels.store_zeros, 1, *send([np.array(table), np.zeros(1, np.int32)], device), BLOCK=BLOCK)
        return not values.any()
    except Exception as error:  # of many kinds: an old GPU, no compiler, a driver that does not fit
        _log.info("Triton does not run on %s, PyTorch's operations take its place: %s", device, error)
        return False


def is_too_old(version: str) -> bool:
    """Whether a version of Triton is older than OLDEST."""
    return tuple(map(int, version.split(".")[:2])) < OLDEST


def import_kernels() -> Any:
    """The module of kernels, which imports Triton."""
    from torch_sap.decide import kernels

    return kernels


def run(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Launch a kernel on the device of its first argument, a tensor, unless there is nothing to do."""
    if programs:
        with torch.cuda.device_of(arguments[0]):
            kernel[(programs,)](*arguments, **constants)


def send(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Copy arrays of numbers to a device in one go, each aligned to 16 bytes."""
    ends = np.cumsum([-(-array.nbytes // 16) * 16 for array in arrays]).tolist()
    buffer = np.zeros(max(16, ends[-1]), np.uint8)  # an empty tensor has no strides
    for start, array in zip([0, *ends], arrays, strict=False):
        buffer[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    sent = torch.from_numpy(buffer).to(device, non_blocking=True)
    return [
        sent[start : start + array.nbytes].view(torch.from_numpy(array[:0]).dtype)
        for start, array in zip([0, *ends], arrays, strict=False)
    ]


class Launches:
    """One pass after the other over the entries of some groups.

    Columns of a table are numbered as in :mod:`torch_sap.decide.kernels`: 3 to 5 are the sizes (for a table of rows, 3
    is their number), 17 the first program, 18 the place of the sums, 19 the first row.

    Args:
        groups: Groups of one step, all by row or none.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = groups
        self.entries = [(number, entry) for number, group in enumerate(groups) for entry in group.entries]
        self.device = self.entries[0][1].scores.device
        self.by_row = groups[0].by_row
        self._kernels = import_kernels()
        self._kept_alive: list[Tensor] = []
        self._copies: list[tuple[Tensor, Tensor]] = []
        dtype = common_dtype(entry.scores for _, entry in self.entries)
        self._kinds = {dtype: int(getattr(self._kernels, str(dtype)[6:].upper())) for dtype in INTEGER_OF}
        kinds = {self._kinds[entry.scores.dtype] for _, entry in self.entries}
        bits = 13 if dtype is torch.float64 and len(groups) == 1 and not self.by_row else 8
        self._types = {
            "SOURCE": kinds.pop() if len(kinds) == 1 else self._kernels.MIXED,
            "TARGET": self._kinds[dtype],
            "PASSES": -(-key_bits(dtype) // bits),
        }
        self._bits = {"BITS": bits}

    def tables(self, p: float, q: float) -> dict[int, NDArray[np.float64]]:
        """The tables of :class:`torch_sap.decide.sums.PowerSums` of all entries, by their ids, without scaling.

        If the entries have an output and are not rows, they are counted for the search in the same pass.
        """
        found = [(entry, items) for number, entry in self.entries for items in [self._row_items(entry, number)]]
        rows = self._table([item for _, items in found for item in items])
        self._owners = [id(entry) for entry, items in found for _ in items]
        tiles, segments = -(-rows[:, 3] // ROWS), -(-rows[:, 4] * rows[:, 5] // (WIDTH * STEPS))
        rows[:, 17], rows[:, 18] = starts(tiles * segments), starts(rows[:, 3] * segments)
        rows[:, 19] = starts(rows[:, 3])
        total = int((rows[:, 3] * segments).sum())
        arrays = [np.array([p, q]), rows, numbers(tiles * segments)]
        search = not self.by_row and all(entry.out is not None for _, entry in self.entries)
        if search:
            flat = self._table([self._flat_item(entry, number) for number, entry in self.entries if size(entry)])
            flat_programs = -(-flat[:, 3] * flat[:, 4] * flat[:, 5] // (BLOCK * BLOCKS))
            flat[:, 17] = starts(flat_programs)
            arrays += [flat, numbers(flat_programs)]
            self._flat_programs = flat_programs
        exponents, self._rows, item_of, *self._flat = send(arrays, self.device)
        self._row_counts = rows[:, 3]
        self._zeros = torch.zeros(self._scratch_size() if search else 0, dtype=torch.int64, device=self.device)
        sums = torch.empty((3, total), dtype=torch.float64, device=self.device)
        run(
            self._kernels.measure,
            len(arrays[2]),
            self._rows,
            item_of,
            sums,
            total,
            exponents,
            self._zeros,
            **self._types,
            **(self._bits if search else {"BITS": 0}),
            P=self._exponent(p),
            Q=self._exponent(q),
            ROWS=ROWS,
            WIDTH=WIDTH,
            STEPS=STEPS,
        )
        read, place, number = backends._read(sums), 0, 0
        tables = {}
        for entry, items in found:
            parts = []
            for item in items:
                end = place + item[3] * int(segments[number])
                parts.append(read[:, place:end].reshape(3, int(segments[number]), item[3]).sum(1))
                place, number = end, number + 1
            table = np.zeros((4, entry.row_count))
            table[:3] = np.hstack(parts) if parts else 0
            tables[id(entry)] = table
        return tables

    def _exponent(self, exponent: float) -> int:
        special = {0.5: self._kernels.ROOT, 1.0: self._kernels.SAME, 2.0: self._kernels.SQUARE}
        return int(special.get(exponent, self._kernels.POWER))

    def _scratch_size(self) -> int:
        """Histograms of all groups and passes, and two numbers per program."""
        histograms = len(self.groups) * self._types["PASSES"] * 2 ** self._bits["BITS"]
        return int(histograms + 2 * aligned(self._flat_programs.sum()))

    def write(self, values: Mapping[str, Counts], left_out: Mapping[str, int]) -> dict[str, int | None]:
        """Write what stays to the outputs, after :meth:`tables`; how many entries stay by name, None if nothing goes.

        ``left_out`` are tensors that are left alone though they were counted, and their unpruned entries, all zeros.
        """
        going = {group.name for group in self.groups if values[group.name].c.any()}
        owners = [(number, entry) for number, entry in self.entries if size(entry)]
        kept: dict[str, int | None] = {
            entry.name: 0 if self.groups[number].name in going and not size(entry) else None
            for number, entry in self.entries
        }
        if not going:
            return kept
        alive = [self.groups[n].name in going and entry.name not in left_out for n, entry in owners]
        if self.by_row:
            self._write_rows(values, owners, alive)
            for (_, entry), lives in zip(owners, alive, strict=True):
                if lives:
                    kept[entry.name] = int((values[entry.name].d - values[entry.name].c).sum())
        else:
            stay = self._write_groups(values, owners, alive, sum(left_out.values()))
            for (_, entry), lives, number in zip(owners, alive, stay, strict=True):
                if lives:
                    kept[entry.name] = (kept[entry.name] or 0) + int(number)
        for out, copy in self._copies:
            out.copy_(copy)
        return kept

    def _write_rows(self, values: Mapping[str, Counts], owners: Any, alive: Sequence[bool]) -> None:
        count = np.concatenate([values[entry.name].c for _, entry in owners])
        lives = dict(zip((id(entry) for _, entry in owners), alive, strict=True))
        chosen = np.array([0 if lives[owner] else -1 for owner in self._owners])
        item_of, groups, to_go = send([numbers(self._row_counts), chosen, count], self.device)
        types = {**self._types, "BLOCK": ROW_BLOCK}
        run(self._kernels.write_rows, len(item_of), self._rows, item_of, groups, to_go, **types)

    def _write_groups(
        self, values: Mapping[str, Counts], owners: Any, alive: Sequence[bool], foreign: int
    ) -> NDArray[np.int64]:
        table, item_of = self._flat
        programs, passes, bins = self._flat_programs, self._types["PASSES"], 2 ** self._bits["BITS"]
        per_program = aligned(len(item_of))
        histograms, kept, ties = self._zeros.split([len(self.groups) * passes * bins, per_program, per_program])
        group_of = np.array([number for number, _ in owners])
        chosen = np.zeros((len(self.groups), 3), np.int64)
        chosen[:, 0] = [int(values[group.name].c[group.place]) for group in self.groups]
        chosen[:, 1] = foreign
        chosen[group_of[::-1], 2] = starts(programs)[::-1]  # the first item of a group counts
        groups, sent = send([np.where(alive, group_of, -1), chosen], self.device)
        types = {**self._types, **self._bits, "BLOCK": BLOCK, "STEPS": BLOCKS}
        given = table, item_of, groups, sent, histograms
        for done in range(1, passes):
            run(self._kernels.narrow, len(item_of), *given, done, **types)
        run(self._kernels.write, len(item_of), *given, kept, ties, **types)
        run(self._kernels.take_ties, len(item_of), *given, kept, ties, **types)
        return np.add.reduceat(backends._read(kept)[: len(item_of)], starts(programs))

    def _table(self, items: Sequence[tuple[int, ...]]) -> Int64:
        table = np.zeros((len(items), self._kernels.COLUMNS), np.int64)
        if items:
            table[:, :17] = items
        return table

    def _flat_item(self, entry: Entry, number: int) -> tuple[int, ...]:
        """An entry in order of position."""
        tensors = entry.scores, entry.mask, entry.out
        if all(t is None or t.is_contiguous() for t in tensors):
            return self._contiguous_item(tensors, number, 1)
        return self._item(tensors, number, rows=0)

    def _row_items(self, entry: Entry, number: int) -> list[tuple[int, ...]]:
        """The rows of an entry, in one item if the memory is in their order."""
        if not size(entry):
            return []
        tensors = entry.scores, entry.mask, entry.out if self.by_row else None
        if (entry.channel_dim == 0 or entry.scores.dim() < 2) and all(t is None or t.is_contiguous() for t in tensors):
            return [self._contiguous_item(tensors, number, entry.row_count)]
        parts = zip(*(repeat(None) if t is None else entry.rows(t) for t in tensors), strict=False)
        return [self._item(part, number, rows=1) for part in parts]

    def _contiguous_item(self, tensors: Any, number: int, rows: int) -> tuple[int, ...]:
        """The same as :meth:`_item` for rows one after the other, in less time."""
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        columns = tensors[0].numel() // rows
        return (*addresses, rows, 1, columns, *(columns, 0, 1) * 3, self._kinds[tensors[0].dtype], number)

    def _item(self, tensors: Any, number: int, rows: int) -> tuple[int, ...]:
        """The columns of an item that do not depend on others, with the first ``rows`` dimensions on their own."""
        scores, mask, out = tensors
        dims = list(joined_dims(tensors, rows))
        if len(dims) > 3:
            scores, mask = scores.contiguous(), None if mask is None else mask.contiguous()
            if out is not None and not out.is_contiguous():
                self._copies.append((out, out := torch.empty_like(out, memory_format=torch.contiguous_format)))
            self._kept_alive += [scores] if mask is None else [scores, mask]
            dims = list(joined_dims((scores, mask, out), rows))
        ones = [(1, 0, 0, 0)] * (3 - len(dims))
        dims = [*dims[:rows], *ones, *dims[rows:]]
        addresses = (0 if t is None else t.data_ptr() for t in (scores, mask, out))
        kind = self._kinds[scores.dtype]
        return (*addresses, *(step for of_all in zip(*dims, strict=True) for step in of_all), kind, number)


def joined_dims(tensors: Sequence[Tensor | None], rows: int) -> Iterator[tuple[int, int, int, int]]:
    """Size, and stride in each of three tensors, of the dimensions that are left when neighbors are joined.

    The first ``rows`` dimensions stay on their own.
    """
    first = tensors[0]
    assert first is not None
    strides = ((0,) * first.dim() if t is None else t.stride() for t in tensors)
    last: tuple[int, ...] | None = None
    for place, dim in enumerate(zip(first.shape, *strides, strict=True)):
        if place < rows:
            yield dim
        elif dim[0] == 1:
            continue
        elif last is None:
            last = dim
        elif all(outer == inner * dim[0] for outer, inner in zip(last[1:], dim[1:], strict=True)):
            last = (last[0] * dim[0], *dim[1:])
        else:
            yield last  # type: ignore[misc]
            last = dim
    if last is not None:
        yield last  # type: ignore[misc]


def aligned(count: int) -> int:
    """As many int64 numbers or one more, a multiple of 16 bytes: Triton compiles anew for another alignment."""
    return count + count % 2


def size(entry: Entry) -> int:
    """Entries of the local tensor."""
    return math.prod(entry.scores.shape)


def starts(counts: Int64) -> Int64:
    """Where each of some runs of these lengths begins."""
    return np.cumsum(counts) - counts


def numbers(counts: Int64) -> NDArray[np.int32]:
    """0, 1, ..., each as often as it counts."""
    return np.repeat(np.arange(len(counts), dtype=np.int32), counts)
