"""The paper's formulas written down literally in float64: slow, no chunks, nothing shared with the library."""

import math
from typing import NamedTuple

import mpmath
import numpy as np

PQ_PAIRS = [(0.5, 1.0), (1.0, 2.0), (0.1, 1.9), (0.3, 0.7)]


class Record(NamedTuple):
    """One group: entries counted from the mask, PQ Index, retention bound, entries to prune."""

    d: int
    index: float
    r: float
    c: int


def pq_index(values, p, q):
    """Definition 1 of the paper; NaN for an empty or an all-zero vector."""
    magnitudes = [abs(float(value)) for value in values]
    d = len(magnitudes)
    if not any(magnitudes):
        return math.nan
    norm_p = math.fsum(value**p for value in magnitudes) ** (1 / p)
    norm_q = math.fsum(value**q for value in magnitudes) ** (1 / q)
    return 1 - d ** (1 / q - 1 / p) * norm_p / norm_q


def pq_index_mp(values, p, q):
    """Definition 1 with 60 decimal digits."""
    with mpmath.workdps(60):
        p, q, d = mpmath.mpf(p), mpmath.mpf(q), mpmath.mpf(len(values))
        magnitudes = [abs(mpmath.mpf(float(value))) for value in values]
        norm_p = mpmath.fsum(value**p for value in magnitudes if value) ** (1 / p)
        norm_q = mpmath.fsum(value**q for value in magnitudes if value) ** (1 / q)
        return float(1 - d ** (1 / q - 1 / p) * norm_p / norm_q)


def gini_index(values):
    """Hurley and Rickard's Gini index: one minus twice the area under the Lorenz curve; NaN for all zeros."""
    magnitudes = sorted(abs(float(value)) for value in values)
    d, total = len(magnitudes), math.fsum(magnitudes)
    if total == 0:
        return math.nan
    shares = (value / total * (d - k + 0.5) / d for k, value in enumerate(magnitudes, start=1))
    return 1 - 2 * math.fsum(shares)


def retention_bound(index, d, p, q, eta_r):
    """Theorem 2: the entries to retain at least."""
    return d * (1 + eta_r) ** (-q / (q - p)) * (1 - index) ** (p * q / (q - p))


def prune_count(index, d, p, q, eta_r, gamma, beta):
    """Entries to prune: Algorithm 1 in the form of the contract; none of an empty or all-zero group."""
    if d == 0 or math.isnan(index):
        return 0
    r = retention_bound(index, d, p, q, eta_r)
    return max(0, math.floor(min(gamma * (d - r), beta * d)))


def channels(shape, transposed=0, dim=0):
    """Output channel of every entry; `transposed` is the number of groups of a transposed convolution."""
    index = np.indices(shape)
    if not transposed:
        return index[dim]
    return index[0] // (shape[0] // transposed) * shape[1] + index[1]


def split(weights, scope, transposed, dim, zero=()):
    """Entry by entry, the (name, row) of its group; tensors that are zero throughout are in no global group."""
    groups = {}
    for name, weight in weights.items():
        if scope == "global" and name in zero:
            continue
        if scope == "neuron":
            rows = channels(weight.shape, transposed.get(name, 0), dim).reshape(-1)
        else:
            rows = np.zeros(weight.size, dtype=int)
        for flat, row in enumerate(rows):
            groups.setdefault(("global" if scope == "global" else name, int(row)), []).append((name, flat))
    return groups


def prune(weights, masks, scope, p=0.5, q=1.0, eta_r=0.0, gamma=1.0, beta=0.9, transposed=None, dim=0, scores=None):
    """New masks and, for each name, the records of its groups.

    weights, masks, scores: dictionaries of numpy arrays in parameter order. scores take the weights' place.
    """
    weights = {**weights, **(scores or {})}
    flat_weights = {name: np.abs(weight.astype(np.float64)).reshape(-1) for name, weight in weights.items()}
    flat_masks = {name: masks[name].astype(bool).reshape(-1).copy() for name in weights}
    records = {}
    zero = {name for name, mask in flat_masks.items() if mask.any() and not flat_weights[name][mask].any()}
    zero = zero if len(zero) < len(weights) else ()
    for (name, _), entries in split(weights, scope, transposed or {}, dim, zero).items():
        alive = [(tensor, flat) for tensor, flat in entries if flat_masks[tensor][flat]]
        magnitudes = [flat_weights[tensor][flat] for tensor, flat in alive]
        index = pq_index(magnitudes, p, q)
        r = retention_bound(index, len(alive), p, q, eta_r)
        c = prune_count(index, len(alive), p, q, eta_r, gamma, beta)
        for place in np.argsort(magnitudes, kind="stable")[:c]:
            tensor, flat = alive[place]
            flat_masks[tensor][flat] = False
        records.setdefault(name, []).append(Record(len(alive), index, r, c))
    return {name: flat_masks[name].reshape(weights[name].shape) for name in weights}, records
