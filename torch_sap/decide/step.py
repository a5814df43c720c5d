"""The SAP step: entries -> groups -> I -> r -> c -> masks. It reads tensors and makes new masks; it changes nothing.

Source: Algorithm 1 of Diao et al., ICLR 2023 (arXiv 2302.05601).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import starmap
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_sap.decide.backends import NUMPY, Backend
from torch_sap.decide.bounds import Hyperparameters
from torch_sap.decide.groups import Entry, Group, Piece, Scope, pieces, split
from torch_sap.decide.sums import (
    PowerSums,
    Visit,
    distinct,
    index_from_sums,
    join_blocks,
    joined_sums,
    out_of_range,
    visit_sums,
)
from torch_sap.decide.threads import scratch
from torch_sap.decide.threshold import NOTHING, Window, apply, expected_window, find, last_to_go
from torch_sap.decide.triton_backend import Triton, backend_of

DEVICE_ERROR = 1e-13
"""Relative difference between sums of the CPU and of a device, at most."""

Store = Callable[[Piece, Any, Any, Any], Any]
"""Called with a piece, its keys as rows, the last key to go of each row, and how many entries with just that key go
(None: all); stores what stays and returns its number of entries."""


@dataclass(frozen=True, eq=False)
class GroupValues:
    """What a step found in one group, or in the rows of one tensor: arrays with one value per group."""

    d: NDArray[np.int64]
    """Unpruned entries before the step."""
    index: NDArray[np.float64]
    """PQ Index I; NaN where the group is empty or all zero."""
    r: NDArray[np.float64]
    """Lower bound on the entries to retain."""
    c: NDArray[np.int64]
    """Entries that the step prunes."""


class StepResult(NamedTuple):
    """What a step decided."""

    masks: list[Tensor | None]
    """New masks of the entries, in their order; None where nothing of the tensor is pruned."""
    groups: dict[str, GroupValues]
    """The values of each group by its name."""
    sums: PowerSums
    """What the pass over the entries found before the pruning, in all scopes."""
    remaining: list[int]
    """Unpruned entries of each whole tensor after the pruning."""


def prune_step(
    entries: Sequence[Entry], scope: Scope, rule: Hyperparameters, *, backend: Backend | None = None
) -> StepResult:
    """Decide what one round prunes of entries in order of position.

    The rule gives the count of each group; the backend is by default the one that fits the tensors.

    Raises:
        ValueError: if an entry holds NaN or infinity, or has no rows to prune; it is named.
    """
    backend = backend_of(entries) if backend is None else backend
    whole = [entry.made_whole(scope) for entry in entries]
    given = [replace(entry, out=torch.empty_like(entry.scores, dtype=torch.bool)) for entry in whole]

    def write(piece: Piece, keys: Any, key: Any, left: Any) -> Any:
        return backend.keep(keys, key, left, None if piece.mask is None else piece.mask.reshape(keys.shape), piece.out)

    groups, sums, kept = _step(given, scope, rule, backend, write)
    masks = [entry.mask if number is None else entry.out for entry, number in zip(given, kept, strict=True)]
    remaining = _count(given, sums, kept, backend)
    for i, (before, entry) in enumerate(zip(entries, whole, strict=True)):
        if before is not entry and before.part is not None and (mask := masks[i]) is not None:
            masks[i] = before.part.own(mask).contiguous()
    return StepResult(masks, groups, sums, remaining)


def zero_step(
    entries: Sequence[Entry], scope: Scope, rule: Hyperparameters, advance: Callable[[int], object] | None = None
) -> tuple[dict[str, GroupValues], PowerSums, list[int]]:
    """Prune unmasked CPU tensors in place, without a mask per entry: what goes is set to +0.0.

    For tensors larger than memory, in files that are mapped. ``advance`` is called with the number of entries that were
    measured, and again when they were written, from several threads. Returns the values of each group by its name, what
    the pass before the pruning found, and the unpruned entries of each tensor. Raises as :func:`prune_step` does; some
    tensors may have been written to then.
    """

    def zero(piece: Piece, keys: Any, key: Any, left: Any) -> Any:
        keep = scratch("stays", keys.shape, np.bool_)
        kept = NUMPY.keep(keys, key, left, None, keep)
        bits = piece.out.view(f"i{piece.out.itemsize}")
        np.multiply(bits, keep.view(np.int8).reshape(bits.shape), out=bits)
        if advance is not None:
            advance(keys.size)
        return kept

    given = [replace(entry, out=entry.scores) for entry in entries]
    groups, sums, kept = _step(given, scope, rule, NUMPY, zero, advance)
    return groups, sums, _count(entries, sums, kept, NUMPY)


def _step(
    entries: Sequence[Entry],
    scope: Scope,
    rule: Hyperparameters,
    backend: Backend,
    store: Store,
    advance: Callable[[int], object] | None = None,
) -> tuple[dict[str, GroupValues], PowerSums, list[Any]]:
    """Measure, decide, and store what stays; the last result is the kept entries per tensor, None if nothing goes."""
    groups = split(entries, scope)
    if isinstance(backend, Triton):
        return _step_at_once(entries, groups, scope, rule, backend)
    visits: list[Visit | None] = [None] * len(groups)
    windows: list[Window | None] = [None] * len(groups)
    apart = all(entry.part is None for entry in entries)
    if backend is NUMPY and apart and groups and groups[0].by_row:
        visits = [_row_visit(rule, group.dtype, backend, store) for group in groups]
    elif backend is NUMPY and apart:
        windows = [expected_window(group, rule) for group in groups]
        visits = [None if window is None else window.look for window in windows]
    if advance is not None:
        visits = [_counted(visit, advance) for visit in visits]
    sums, seen = visit_sums(entries, groups, rule.p, rule.q, backend, visits)
    values = group_values(sums, scope, rule)
    if scope == "global" and (alive := [e for e in entries if e.name not in sums.zero]):
        groups = [groups[0]._replace(entries=alive)]

    def store_group(group: Group, window: Window | None) -> list[Any]:
        """How many entries of each tensor stay, None if nothing goes."""
        found = values[group.name]
        if not found.c.any():
            return [None] * len(group.entries)
        looks = [look for entry in group.entries for look in seen[id(entry)]]
        if group.by_row:
            return [_store_rows(group.entries[0], found, backend, store, looks)]
        count, d = int(found.c[group.place]), int(found.d[group.place])
        cut = find(group, count, d, backend, window, looks) if count else NOTHING
        return apply(group, cut, backend, store)

    jobs = list(zip(groups, windows, strict=True))  # threads must not mix up exchanges between processes
    stored = backend.map(store_group, jobs) if apart else list(starmap(store_group, jobs))
    kept: dict[str, Any] = dict.fromkeys(entry.name for entry in entries)
    for group, numbers in zip(groups, stored, strict=True):
        for entry, number in zip(group.entries, numbers, strict=True):
            kept[entry.name] = number if kept[entry.name] is None else kept[entry.name] + number
    return values, sums, list(kept.values())


def _step_at_once(
    entries: Sequence[Entry], groups: Sequence[Group], scope: Scope, rule: Hyperparameters, backend: Triton
) -> tuple[dict[str, GroupValues], PowerSums, list[Any]]:
    """The same on a device, with one launch for all tensors in each pass; what stays is stored as masks."""
    launches = backend.start(groups)
    sums = joined_sums(entries, groups, launches.tables(rule.p, rule.q), rule.p, rule.q, backend)
    values = group_values(sums, scope, rule)
    if unsure := _undecided(values, rule):
        here = entries if scope == "global" else [entry for entry in entries if entry.name in unsure]
        on_cpu = [replace(e, scores=e.scores.cpu(), mask=e.mask if e.mask is None else e.mask.cpu()) for e in here]
        exact, _ = visit_sums(on_cpu, split(on_cpu, scope), rule.p, rule.q, NUMPY)
        sums = sums.updated(exact)
        values = group_values(sums, scope, rule)
    left_out = sums.zero if scope == "global" and len(sums.zero) < len(entries) else set()
    counted = dict(zip((entry.name for entry in entries), sums.remaining, strict=True))
    kept = launches.write(values, {name: counted[name] for name in left_out})
    return values, sums, [kept[entry.name] for entry in entries]


def _undecided(values: Mapping[str, GroupValues], rule: Hyperparameters) -> set[str]:
    """Names of groups whose count may depend on the last bits of their sums, which differ between devices."""
    found = set()
    for name, group in values.items():
        error = DEVICE_ERROR * (1 / rule.p + 1 / rule.q) + 1e-9 / np.maximum(group.d, 1)  # relative, of 1 - I
        number = rule.gamma * (group.d - group.r)
        error_of_number = rule.gamma * group.r * error * 2 * rule.p * rule.q / (rule.q - rule.p)
        near = np.flatnonzero(np.abs(number - np.rint(number)) <= error_of_number)
        index, d, error = group.index[near], group.d[near], error[near]
        few, many = (rule.count(1 - (1 - index) * (1 + sign * error), d) for sign in (1, -1))
        if (few != many).any():
            found.add(name)
    return found


def group_values(sums: PowerSums, scope: Scope, rule: Hyperparameters) -> dict[str, GroupValues]:
    """d, I, r and c of the groups of a scope, by their names."""
    return {
        name: GroupValues(d, index, rule.retain(index, d), rule.count(index, d))
        for (name, d), index in zip(sums.d(scope).items(), sums.index(scope).values(), strict=True)
    }


def _counted(visit: Visit | None, advance: Callable[[int], object]) -> Visit:
    """Visit, and report how many entries that were."""

    def counted(piece: Piece, keys: Any, d: Any, sums: Any) -> Any:
        advance(keys.size)
        return None if visit is None else visit(piece, keys, d, sums)

    return counted


def _row_visit(rule: Hyperparameters, dtype: torch.dtype, backend: Backend, store: Store) -> Visit:
    """Decide rows while their keys are in the cache: each is a group of its own, so its count is known at once."""

    def visit(piece: Piece, keys: Any, d: Any, sums: Any) -> tuple[Any, Any]:
        sum_p, sum_q = join_blocks(sums)
        if out_of_range(np.stack([sum_p, sum_q]), d, dtype, rule.q).any():
            return None, 0
        count = rule.count(index_from_sums(sum_p, sum_q, d, p=rule.p, q=rule.q), d)
        return count, _store_row_piece(piece, keys, count, d, backend, store)

    return visit


def _store_row_piece(piece: Piece, keys: Any, count: Any, d: Any, backend: Backend, store: Store) -> Any:
    if 0 in piece.shape:
        return 0
    rows = keys.reshape(piece.shape[1:])
    return store(piece, rows, *last_to_go(backend, rows, count, piece.shape[2] - d))


def _store_rows(
    entry: Entry, found: GroupValues, backend: Backend, store: Store, seen: Sequence[tuple[Any, Any] | None]
) -> Any:
    """Store what stays of the rows of an entry, unless it was stored while they were measured; how many stay."""
    count, d = found.c[entry.own_rows], found.d[entry.own_rows]

    def store_piece(piece: Piece, stored: tuple[Any, Any] | None) -> Any:
        if stored is not None and stored[0] is not None:
            return stored[1]
        keys = backend.keys(piece.scores, piece.mask, entry.scores.dtype)
        return _store_row_piece(piece, keys, count[piece.rows], d[piece.rows], backend, store)

    cut = pieces(entry, backend.chunk, backend.view, by_row=True)
    return sum(backend.map(store_piece, list(zip(cut, seen, strict=True))))


def _count(entries: Sequence[Entry], sums: PowerSums, kept: Sequence[Any], backend: Backend) -> list[int]:
    """Unpruned entries of each whole tensor, from what was kept of it here."""
    read = iter(backend.read([number for number in kept if number is not None]))
    here = [None if number is None else int(next(read)) for number in kept]
    table = np.array([[number or 0 for number in here]])
    totals = [(part, part.add_up(torch.from_numpy(table))[0]) for part in distinct([entry.part for entry in entries])]
    remaining = []
    for i, (entry, number) in enumerate(zip(entries, here, strict=True)):
        if number is None:
            number = sums.remaining[i]
        elif entry.part is not None:
            number = next(int(total[i]) for part, total in totals if part.same_processes(entry.part))
        remaining.append(number)
    return remaining
