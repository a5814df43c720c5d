"""Power sums in float64, and the PQ Index from them: all that SAP needs to know of a group's weights.

Source: Definition 1 of Diao et al., ICLR 2023 (arXiv 2302.05601).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_sap.decide.histogram import count_keys, empty_bins
from torch_sap.decide.keys import chunk_size, chunks, keys_of, magnitudes
from torch_sap.decide.threads import Job, scratch

BLOCK = 2**12
"""Entries that are summed in one go. A chunk is a whole number of blocks and the sums of blocks are added exactly, so
that a sum does not depend on the size of the chunks."""


def _power(x: Any, exponent: float, out: Any) -> Any:
    """``x ** exponent``, on the host in the memory of ``out`` (but for the exponent 1)."""
    if exponent == 1:
        return x
    if isinstance(x, Tensor):
        return x.sqrt() if exponent == 0.5 else x**exponent
    if exponent == 2:
        return np.multiply(x, x, out=out)
    if exponent == 0.5:  # sqrt is correctly rounded everywhere, a power is not
        return np.sqrt(x, out=out)
    return np.power(x, exponent, out=out)


def power_sums(
    keys: Any, dtype: torch.dtype, exponents: Sequence[float], scale: float, add: Callable[[Any], Any]
) -> list[Any]:
    """What ``add`` makes of the powers of the magnitudes, for each exponent.

    Args:
        keys: Of any shape, array or tensor. On the host what they are turned into overwrites this thread's scratch.
        dtype: Type that they are keys of.
        exponents: Positive exponents.
        scale: Factor on the magnitudes before they are raised.
        add: Called with float64 powers of the keys' shape, in memory that the next call overwrites.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        values = magnitudes(keys, dtype, reuse=True)
        if scale != 1:
            values *= scale
        sums: list[Any] = [None] * len(exponents)
        order = sorted(range(len(exponents)), key=lambda i: exponents[i] != 1)  # those that change nothing first
        for i in order:
            in_place = i == order[-1] or isinstance(values, Tensor)
            out = values if in_place else scratch("powers", values.shape, np.float64)
            sums[i] = add(_power(values, exponents[i], out))
        return sums


def block_sums(x: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Sums of the blocks of one dimension of powers: those of whole ones, and of the rest if there is one."""
    whole = len(x) // BLOCK * BLOCK
    sums = [_sum(x[:whole].reshape(-1, BLOCK))]
    return sums if whole == len(x) else [*sums, _sum(x[whole:].reshape(1, -1))]


def _sum(rows: Any) -> Any:
    """The sum of each row. einsum is a third faster than sum, and as exact for rows of some thousand entries."""
    if isinstance(rows, Tensor):
        return rows.sum(1)
    if len(rows) == 1:  # einsum adds up a long row in another order if it is alone
        return np.einsum("ij->i", np.broadcast_to(rows, (2, rows.shape[1])))[:1]
    return np.einsum("ij->i", rows)


class Bins:
    """How often each key of a 16-bit type occurs in a tensor; its sums are made of that, four times as fast.

    Args:
        dtype: float16 or bfloat16.
        pieces: How many pieces are to be added.
    """

    def __init__(self, dtype: torch.dtype, pieces: int = 0) -> None:
        self.dtype, self.pieces = dtype, pieces
        self.counts: NDArray[np.int64] | None = None
        self.adding = Lock()

    def add(self, keys: NDArray[Any]) -> bool:
        """Count the keys of a piece, in any thread; whether it was the last one."""
        counts = count_keys(keys, self.dtype)
        with self.adding:
            self.counts = counts if self.counts is None else np.add(self.counts, counts, out=self.counts)
            self.pieces -= 1
            return self.pieces == 0

    def sums(self, exponents: Sequence[float], scale: float = 1.0) -> list[float]:
        """The sum of each power of the magnitudes; the counts are given up."""
        counts, self.counts = empty_bins(self.dtype) if self.counts is None else self.counts, None
        return bin_sums(counts, self.dtype, exponents, scale)


def bin_sums(
    bins: NDArray[np.int64], dtype: torch.dtype, exponents: Sequence[float], scale: float = 1.0
) -> list[float]:
    """Power sums of a tensor of a 16-bit type from how often each of its keys occurs."""
    places = np.flatnonzero(bins)
    counts = bins[places].astype(np.float64)
    return power_sums(places.astype(np.int16), dtype, exponents, scale, lambda powers: float((powers * counts).sum()))


def exact_sum(parts: Sequence[NDArray[np.float64]]) -> float:
    """The sum of all numbers in some arrays, rounded once; infinite if it overflows."""
    try:
        return math.fsum(np.concatenate(parts)) if parts else 0.0
    except OverflowError:
        return math.inf


def flat_sums(
    tensors: Sequence[tuple[Any, ...]],
    dtype: torch.dtype,
    exponents: Sequence[float],
    *,
    scale: float = 1.0,
    visit: Callable[..., Any] = lambda keys, *others: None,
) -> Job:
    """Sums of ``|scale * w| ** exponent`` over the unpruned entries of each tensor, on the host.

    Args:
        tensors: Scores, bool mask (False where pruned) or None, and what else ``visit`` needs, of one dimension and
            of one length each.
        dtype: Type that the keys are made in; the arithmetic is float64.
        exponents: Positive exponents.
        scale: Factor that keeps sums within the range of float64.
        visit: Called with the keys of each piece, while they are in the cache, and the piece of what it needs.

    Returns:
        A job that gives for each tensor a float64 array of shape (exponents, 1); not finite if a score is not finite
        or a sum overflows. And what ``visit`` gave for each piece, in order.
    """
    types = [scores.dtype for scores, *_ in tensors]
    counted = {
        i: Bins(types[i], -(-scores.numel() // chunk_size(on_host=True)))
        for i, (scores, *_) in enumerate(tensors)
        if types[i].itemsize == 2
    }

    def work(number: int, scores: Any, mask: Any, *others: Any) -> tuple[int, list[list[Any]], Any]:
        keys = keys_of(scores, mask, dtype, on_host=True, reuse=True)
        visited = visit(keys, *others)
        if number not in counted:
            return number, power_sums(keys, dtype, exponents, scale, block_sums), visited
        if types[number] != dtype:
            keys = keys_of(scores, mask, types[number], on_host=True, reuse=True)
        is_last = counted[number].add(keys)
        sums = counted[number].sums(exponents, scale) if is_last else []
        return number, [[np.array([value])] for value in sums] or [[] for _ in exponents], visited

    def gather(found: list[tuple[int, list[list[Any]], Any]]) -> tuple[list[Any], list[Any]]:
        blocks: list[list[list[Any]]] = [[[] for _ in exponents] for _ in tensors]
        for number, sums, _ in found:
            for all_blocks, more in zip(blocks[number], sums, strict=True):
                all_blocks += more
        tables = [np.array([[exact_sum(parts)] for parts in of_tensor]) for of_tensor in blocks]
        return tables, [result for _, _, result in found]

    pieces = [(i, *piece) for i, flats in enumerate(tensors) for piece in chunks(*flats, on_host=True)]
    return Job(work, pieces, gather)


def row_sums(keys: Any, dtype: torch.dtype, exponents: Sequence[float], *, scale: float = 1.0) -> Any:
    """As :func:`flat_sums`, for each row of keys of two dimensions: float64, shape (exponents, rows)."""
    sums = power_sums(keys, dtype, exponents, scale, _sum)
    return torch.stack(sums) if isinstance(keys, Tensor) else np.stack(sums)


def index_from_sums(
    sum_p: NDArray[np.float64], sum_q: NDArray[np.float64], d: NDArray[Any], *, p: float, q: float
) -> NDArray[np.float64]:
    r"""PQ Index of groups from their power sums, NaN where a group is empty or all zero.

    .. math:: I = 1 - d^{1/q-1/p} \frac{\|w\|_p}{\|w\|_q} = 1 - \frac{(\sum|w|^p / d)^{1/p}}{(\sum|w|^q / d)^{1/q}}

    The form on the right, a ratio of power means, overflows for no d.

    Args:
        sum_p: :math:`\sum |w|^p` of each group.
        sum_q: :math:`\sum |w|^q` of each group.
        d: Number of unpruned entries of each group.
        p: The smaller norm.
        q: The larger norm.

    Returns:
        float64 array of the inputs' shape.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        index = 1 - (sum_p / d) ** (1 / p) / (sum_q / d) ** (1 / q)
    return np.where((d > 0) & (sum_q > 0), np.maximum(index, 0.0), np.nan)
