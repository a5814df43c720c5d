"""Power sums in float64, and the PQ Index from them: all that SAP needs to know of a group's weights.

Source: Definition 1 of Diao et al., ICLR 2023 (arXiv 2302.05601).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_sap.host import map_pieces, scratch
from torch_sap.keys import chunks, magnitudes_of

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


def _powers(x: Any, exponents: Sequence[float]) -> Iterator[Any]:
    """``x ** exponent`` for each exponent, one after the other in the same memory on the host."""
    for i, exponent in enumerate(exponents):
        last = i == len(exponents) - 1
        yield _power(x, exponent, x if last or isinstance(x, Tensor) else scratch("powers", x.shape, np.float64))


def _block_sums(x: Any) -> list[Any]:
    whole = len(x) // BLOCK * BLOCK
    return [x[:whole].reshape(-1, BLOCK).sum(1), x[whole:].sum().reshape(1)]


def _exact_sum(parts: Sequence[NDArray[np.float64]]) -> float:
    try:
        return math.fsum(np.concatenate(parts)) if parts else 0.0
    except OverflowError:
        return math.inf


def flat_sums(
    scores: Tensor,
    mask: Tensor | None,
    dtype: torch.dtype,
    exponents: Sequence[float],
    *,
    on_host: bool,
    scale: float = 1.0,
) -> Any:
    """Sums of ``|scale * w| ** exponent`` over the unpruned entries of a tensor.

    Args:
        scores: One-dimensional tensor.
        mask: Bool tensor of the same length, False where pruned, or None.
        dtype: Type that the keys are made in; the arithmetic is float64.
        exponents: Positive exponents.
        on_host: Whether to work with numpy. The tensors must be on the CPU then.
        scale: Factor that keeps sums within the range of float64.

    Returns:
        float64, shape (exponents, 1), array or tensor; not finite if a score is not finite or a sum overflows.
    """

    def sums_of(piece: Tensor, piece_mask: Tensor | None) -> list[list[Any]]:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            values = magnitudes_of(piece, piece_mask, dtype, on_host=on_host)
            if scale != 1:
                values *= scale
            return [_block_sums(powers) for powers in _powers(values, exponents)]

    found = map_pieces(sums_of, list(chunks(scores, mask, on_host=on_host)), on_host=on_host)
    parts = [[block for piece in found for block in piece[i]] for i in range(len(exponents))]
    if on_host:
        return np.array([[_exact_sum(sums)] for sums in parts])
    empty = [scores.new_zeros(1, dtype=torch.float64)]
    return torch.stack([torch.cat(sums or empty).sum().reshape(1) for sums in parts])


def row_sums(
    rows: Tensor,
    mask: Tensor | None,
    dtype: torch.dtype,
    exponents: Sequence[float],
    *,
    on_host: bool,
    scale: float = 1.0,
) -> Any:
    """As :func:`flat_sums`, for each row of a two-dimensional block: float64, shape (exponents, rows)."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        values = magnitudes_of(rows, mask, dtype, on_host=on_host)
        if scale != 1:
            values *= scale
        sums = [powers.sum(1) for powers in _powers(values, exponents)]
    return np.stack(sums) if on_host else torch.stack(sums)


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
