"""Backends: the arithmetic on many numbers, for the CPU (NumPy) and for other devices (PyTorch).

:func:`torch_sap.decide.triton_backend.backend_of` chooses once per step; nothing else asks where a tensor lies. NumPy's
loops on pieces that fit the cache are several times faster than PyTorch's on a CPU. On a device everything is queued,
and read once at the end.

The tie rule stands in ``keep``: of equal magnitudes those go that come first in order of position. It makes the result
the same on every device, in every thread and process, and for every size of the pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import starmap
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_sap.decide.groups import SLICES
from torch_sap.decide.keys import INTEGER_OF, as_array, key_bits
from torch_sap.decide.threads import map_pieces, scratch

BLOCK = 2**12
"""Entries that are summed in one go. Pieces are a whole number of blocks, so that sums do not depend on their size."""

LONG_ROW = 2**10
"""Row length above which a partition beats a sort, if few entries go."""


class NumPy:
    """Arithmetic on arrays of CPU tensors, in several threads."""

    chunk = 2**19
    """Fewer would keep float64 copies closer to the core, but each NumPy call takes the GIL for a moment, and a thread
    that has to wait for it sleeps: some 80 microseconds on a virtual machine, as long as a call on 2 ** 18 entries."""
    bin_bits = 16

    view = staticmethod(as_array)
    map = staticmethod(map_pieces)

    def keys(self, scores: Any, mask: Any, dtype: torch.dtype) -> Any:
        """Keys of scores in a type, flat, 0 where the mask is False; the next call may overwrite them."""
        source = self._bits(scores, dtype)
        out = scratch("keys", source.shape, source.dtype)
        np.bitwise_and(source, 2 ** key_bits(dtype) - 1, out=out)
        if mask is not None:
            np.multiply(out, mask.view(np.int8), out=out)
        return out.reshape(-1)

    def _bits(self, scores: NDArray[Any], dtype: torch.dtype) -> Any:
        if scores.dtype == np.int16:  # the bits of bfloat16
            if dtype is torch.bfloat16:
                return scores
            scores = self._floats(scores, torch.bfloat16)
        return scores.astype(f"f{dtype.itemsize}", copy=False).view(f"i{dtype.itemsize}")

    def _floats(self, keys: NDArray[Any], dtype: torch.dtype) -> Any:
        if dtype is not torch.bfloat16:
            return keys.view(f"f{dtype.itemsize}")
        out = scratch("floats", keys.shape, np.int32)  # bfloat16 is the upper half of a float32
        np.copyto(out, keys)
        np.left_shift(out, 16, out=out)
        return out.view(np.float32)

    def magnitudes(self, keys: NDArray[Any], dtype: torch.dtype) -> Any:
        """The float64 magnitudes that keys stand for; the next call overwrites them."""
        out = scratch("magnitudes", keys.shape, np.float64)
        if dtype is torch.float16:  # NumPy converts half precision bit by bit
            return np.take(_half_magnitudes(), keys, out=out, mode="clip")
        np.copyto(out, self._floats(keys, dtype))
        return out

    def row_counts(self, mask: Any, shape: tuple[int, int, int]) -> Any:
        """Unpruned entries of each row, by a mask of shape (A, C, K) with rows in dimension 1; shape (C,)."""
        if mask is None:
            return np.full(shape[1], shape[0] * shape[2])
        entries = mask.reshape(shape).view(np.uint8)
        counts = np.add.reduce(entries, axis=2, dtype=np.uint16 if shape[2] < 2**16 else np.int64)
        return np.add.reduce(counts, axis=0, dtype=np.int64)

    def block_sums(
        self, keys: Any, dtype: torch.dtype, shape: tuple[int, int, int], exponents: Sequence[float], shift: Any
    ) -> Any:
        """Sums of ``(|w| * 2 ** -shift) ** exponent`` of blocks of each row: float64 of shape (exponents, blocks, C).

        The keys are of a type and of shape (A, C, K), flat; ``shift`` is int64 of shape (C,), or None for 0.
        """
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            values = self.magnitudes(keys, dtype).reshape(shape)
            if shift is not None:
                for half in (shift // 2, shift - shift // 2):  # 2.0 ** 1074 overflows
                    values *= np.exp2(-half.astype(np.float64))[:, None]
            sums: list[Any] = [None] * len(exponents)
            order = sorted(range(len(exponents)), key=lambda i: exponents[i] != 1)  # 1 changes nothing: first
            for i in order:
                out = values if i == order[-1] else scratch("powers", shape, np.float64)
                sums[i] = _sums_of_blocks(_power(values, exponents[i], out))
            return np.stack(sums)

    def largest(self, keys: Any, dtype: torch.dtype, shape: tuple[int, int, int]) -> Any:
        """Largest magnitude of each row, float64 of shape (C,); NaN if there is one."""
        values = self.magnitudes(keys, dtype).reshape(shape)
        return values.max(axis=(0, 2), initial=0.0)

    def kth(self, keys: Any, rank: Any) -> tuple[Any, Any]:
        """For each row of keys (R, L) the rank-th smallest (from 1) and how many are smaller; -1 and 0 for rank 0."""
        ordered = scratch("ordered", keys.shape, keys.dtype)
        ordered[...] = keys
        end = int(rank.max(initial=1))
        if keys.shape[1] >= LONG_ROW and end <= keys.shape[1] // 2:
            ordered.partition(end - 1, axis=1)
            ordered = ordered[:, :end]
        ordered.sort(axis=1)
        rank = rank[:, None]
        key = np.where(rank > 0, np.take_along_axis(ordered, np.maximum(rank - 1, 0), 1), -1).astype(keys.dtype)
        return key, np.where(rank > 0, (ordered == key).argmax(axis=1, keepdims=True), 0)

    def keep(self, keys: Any, key: Any, left: Any, mask: Any, out: Any) -> int:
        """Write which entries stay: those above a key, and those equal to it except the first ``left`` unpruned ones.

        Keys and mask have shape (R, L); ``key`` and ``left`` (None: all ties go) are numbers or (R, 1); ``out``
        is bool with as many entries, of any shape. Returns how many entries stay.
        """
        key, in_place = np.asarray(key, keys.dtype), out.flags.c_contiguous
        keep = out.reshape(keys.shape) if in_place else scratch("keep", keys.shape, np.bool_)
        np.greater(keys, key, out=keep)
        if mask is not None:
            np.logical_and(keep, mask, out=keep)
        if left is not None:
            self._keep_late_ties(keys, key, left, mask, keep)
        if not in_place:
            out[...] = keep.reshape(out.shape)
        return int(np.count_nonzero(keep))

    def _keep_late_ties(self, keys: Any, key: Any, left: Any, mask: Any, keep: Any) -> None:
        equal = np.equal(keys, key, out=scratch("equal", keys.shape, np.bool_))
        if mask is not None:
            np.logical_and(equal, mask, out=equal)
        places = np.flatnonzero(equal)  # several times faster in one dimension
        if len(places):
            rows = places // keys.shape[1]
            rank = np.arange(len(rows)) - np.searchsorted(rows, np.arange(len(keys)))[rows]
            late = rank >= np.broadcast_to(left, (len(keys), 1))[rows, 0]
            keep.reshape(-1)[places[late]] = True

    def ties(self, keys: Any, mask: Any, key: Any) -> int:
        """How many unpruned entries of a piece equal a key."""
        equal = np.equal(keys, np.asarray(key, keys.dtype), out=scratch("equal", keys.shape, np.bool_))
        if mask is not None:
            np.logical_and(equal, mask.reshape(-1), out=equal)
        return int(np.count_nonzero(equal))

    def join(self, keys: Iterable[Any]) -> Any:
        """Keys of several pieces, one after the other, in new memory."""
        return np.concatenate([of_piece.copy() for of_piece in keys])

    def numbers(self, values: Any, like: Any) -> Any:
        """int64 numbers on the device of some keys."""
        return np.asarray(values, np.int64)

    def histogram(self, keys: Any, mask: Any, low: Any, shift: int) -> Tensor:
        """How many keys ``k`` of unpruned entries have ``(k - low) >> shift`` equal to 0, 1, ..."""
        if mask is not None and int(low) == 0:
            keys = keys[mask.reshape(-1)]
        places = (keys[keys >= int(low)].astype(np.int64) - int(low)) >> shift
        counts = np.bincount(places[places < 2**self.bin_bits], minlength=2**self.bin_bits)
        return torch.from_numpy(counts)

    def read(self, tables: Sequence[Any]) -> list[NDArray[Any]]:
        """Values on the CPU, with one wait per device."""
        return list(tables)


class Torch:
    """The same methods on tensors of any device, without waiting for it."""

    chunk = 2**22
    """Large enough to hide the launches."""
    bin_bits = 11
    """As many bins as a GPU's multiprocessor can count in its own memory."""

    @staticmethod
    def view(tensor: Tensor) -> Any:
        return tensor

    @staticmethod
    def map(work: Callable[..., Any], pieces: Sequence[tuple[Any, ...]]) -> list[Any]:
        return list(starmap(work, pieces))

    def keys(self, scores: Any, mask: Any, dtype: torch.dtype) -> Any:
        keys = scores.reshape(-1).to(dtype).view(INTEGER_OF[dtype]) & (2 ** key_bits(dtype) - 1)
        return keys if mask is None else keys.mul_(mask.reshape(-1))

    def row_counts(self, mask: Any, shape: tuple[int, int, int]) -> Any:
        return np.full(shape[1], shape[0] * shape[2]) if mask is None else mask.reshape(shape).sum((0, 2))

    def block_sums(
        self, keys: Any, dtype: torch.dtype, shape: tuple[int, int, int], exponents: Sequence[float], shift: Any
    ) -> Any:
        values = keys.view(dtype).double().view(shape)
        if shift is not None:
            for half in (shift // 2, shift - shift // 2):
                values = values * torch.exp2(-torch.as_tensor(half, device=keys.device).double())[:, None]
        return torch.stack([_power(values, exponent, None).sum(2).sum(0, keepdim=True) for exponent in exponents])

    def largest(self, keys: Any, dtype: torch.dtype, shape: tuple[int, int, int]) -> Any:
        values = keys.view(dtype).double().view(shape)
        return values.amax((0, 2)) if values.numel() else values.new_zeros(shape[1])

    def kth(self, keys: Any, rank: Any) -> tuple[Any, Any]:
        ordered, rank = keys.sort(dim=1).values, rank[:, None]
        key = torch.where(rank > 0, ordered.gather(1, (rank - 1).clamp_min(0)), -1).to(keys.dtype)
        return key, (keys < key).sum(1, keepdim=True)

    def keep(self, keys: Any, key: Any, left: Any, mask: Any, out: Any) -> Any:
        left = keys.shape[1] if left is None else left
        key, left = (torch.as_tensor(number, device=keys.device) for number in (key, left))
        keep, equal = keys > key, keys == key
        if mask is not None:
            keep, equal = keep & mask, equal & mask
        keep |= equal & (equal.cumsum(1) > left)
        out.copy_(keep.view(out.shape))
        return keep.sum()

    def ties(self, keys: Any, mask: Any, key: Any) -> Any:
        equal = keys == key.to(keys.device)
        return (equal if mask is None else equal & mask.reshape(-1)).sum()

    def join(self, keys: Iterable[Any]) -> Any:
        return torch.cat(list(keys))

    def numbers(self, values: Any, like: Any) -> Any:
        return torch.as_tensor(values, dtype=torch.int64, device="cpu").to(like.device, non_blocking=True)

    def histogram(self, keys: Any, mask: Any, low: Any, shift: int) -> Any:
        bins = 2**self.bin_bits
        places = (keys - low.to(keys.device, keys.dtype)) >> shift
        if mask is not None:
            places = torch.where(mask.reshape(-1), places, -1)
        if keys.is_cuda and not torch.are_deterministic_algorithms_enabled():  # old versions refuse histc then
            return torch.histc(places.clamp_(-1, bins).int(), bins, 0, bins - 1).long()
        places = torch.where((places < 0) | (places >= bins), bins, places.long())
        counts = torch.zeros(bins + 1, dtype=torch.int64, device=keys.device)
        return counts.scatter_add_(0, places, torch.ones_like(places))[:-1]

    def read(self, tables: Sequence[Any]) -> list[NDArray[Any]]:
        found: dict[int, NDArray[Any]] = {}
        for device in {t.device for t in tables if isinstance(t, Tensor)}:
            here = [t for t in tables if isinstance(t, Tensor) and t.device == device]
            flat = _read(torch.cat([t.reshape(-1).double() for t in here]))
            for t, values in zip(here, np.split(flat, np.cumsum([t.numel() for t in here])[:-1]), strict=True):
                found[id(t)] = values.reshape(tuple(t.shape))
        return [found[id(t)] if isinstance(t, Tensor) else t for t in tables]


Backend = NumPy | Torch
NUMPY, TORCH = NumPy(), Torch()


def _read(tensor: Tensor) -> NDArray[np.float64]:
    """The values of a float64 tensor. Here the CPU waits for the device."""
    return np.asarray(tensor.cpu().numpy())


@lru_cache(maxsize=1)
def _half_magnitudes() -> NDArray[np.float64]:
    """The magnitude of each key of float16."""
    return np.arange(2**15, dtype=np.int16).view(np.float16).astype(np.float64)


def _power(x: Any, exponent: float, out: Any) -> Any:
    """``x ** exponent``, on the CPU in the memory of ``out`` (but for the exponent 1)."""
    if exponent == 1:
        return x
    if isinstance(x, Tensor):
        return x.sqrt() if exponent == 0.5 else x**exponent
    if exponent == 2:
        return np.multiply(x, x, out=out)
    if exponent == 0.5:  # sqrt is correctly rounded everywhere, a power is not
        return np.sqrt(x, out=out)
    return np.power(x, exponent, out=out)


def _sums_of_blocks(x: Any) -> Any:
    """Sums of the blocks of each row of values (A, C, K): shape (blocks, C)."""
    slices, count, length = x.shape
    if slices > 1:
        rows = x.reshape(slices, count) if length == 1 else _sum_rows(x.reshape(-1, length)).reshape(slices, count)
        starts = np.arange(0, slices, SLICES)
        return np.add.reduceat(rows, starts, axis=0)
    rows = x.reshape(count, length)
    return np.stack([_sum_rows(rows[:, start : start + BLOCK]) for start in range(0, max(1, length), BLOCK)])


def _sum_rows(rows: Any) -> Any:
    """The sum of each row. einsum is a third faster than sum, and as exact for rows of some thousand entries."""
    if len(rows) == 1:  # einsum adds up a long row in another order if it is alone
        return np.einsum("ij->i", np.broadcast_to(rows, (2, rows.shape[1])))[:1]
    return np.einsum("ij->i", rows)
