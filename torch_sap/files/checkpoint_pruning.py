"""SAP, once, on a checkpoint file: the same bytes again, but for the weights that are pruned, which are zero."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from torch_sap.decide.bounds import Hyperparameters
from torch_sap.decide.groups import Entry, Scope
from torch_sap.decide.keys import INTEGER_OF, chunks, count_true, flatten
from torch_sap.decide.step import GroupValues, prune_step
from torch_sap.decide.streaming import Guess, decide
from torch_sap.decide.threads import map_pieces
from torch_sap.files.checkpoint_reading import StoredPiece, as_pieces, pieces_of, sample_keys
from torch_sap.files.checkpoint_writing import Output
from torch_sap.files.weights import StoredTensor, open_checkpoint
from torch_sap.records.report import PruningReport, TensorRecord

WHOLE = 2**28
"""Bytes of a tensor at most that is held in memory as a whole. Three of them are, at times: one that is worked on, the
next one and the one before it."""


def prune_checkpoint(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    scope: Scope,
    rule: Hyperparameters,
    *,
    exclude: str | Iterable[str] = (),
    key: str | None = None,
    overwrite: bool = False,
) -> PruningReport:
    """Prune the weights of a checkpoint by SAP, once, and write a checkpoint of the same format.

    What goes is what the whole-model function of the scope prunes of the same weights in memory, where the order of
    position is that of the file. A file does not say which weights belong to transposed convolutions: the neurons are
    dimension 0 of each tensor. The weights are read twice in the scope "global" and once in "neuron", a few MB at a
    time, and once in "layer", a tensor at a time (those of more than WHOLE bytes are read twice, too).

    Args:
        path: A file, an index of several, or a folder with one checkpoint.
        out: The file to write; a folder if ``path`` is a folder or an index. All is written under other names first.
        scope: How weights are grouped.
        rule: The five numbers.
        exclude: Patterns of what not to prune, as of ``prunable_parameters``.
        key: Name of the state_dict among several in a PyTorch file.
        overwrite: Whether files that exist are replaced. The input may be among them.

    Returns:
        What was found and done.

    Raises:
        OSError: if a file cannot be read or written.
        ValueError: if a weight is NaN or infinite, there is none, or a file is damaged.
        TypeError: if a weight is not of a real floating-point type.
        Nothing is left of ``out`` if anything is raised, and what was there is as before.
    """
    if rule.q > 6:
        raise ValueError(f"q must be at most 6 for files, whose powers are not scaled, got q={rule.q}")
    checkpoint = open_checkpoint(path, key)
    weights = checkpoint.weights(exclude)
    with Output(checkpoint, Path(out), overwrite) as output:
        output.copy_all_but(weights)
        groups: dict[str, GroupValues] = {}
        remaining = dict.fromkeys((tensor.name for tensor in weights), 0)
        for piece, mask in _masks(weights, scope, rule, groups):
            remaining[piece.tensor.name] += count_true(mask)
            _zero_(piece, mask)
            output.write(piece.tensor.path, piece.offset, piece.memory)
        output.finish(weights)
    tensors = tuple(TensorRecord(t.name, t.shape, remaining[t.name], t.numel) for t in weights)
    return PruningReport(scope, rule.to_dict(), groups, tensors)


def _masks(
    weights: Sequence[StoredTensor], scope: Scope, rule: Hyperparameters, groups: dict[str, GroupValues]
) -> Iterator[tuple[StoredPiece, Tensor]]:
    """Each piece with its mask; fills the values of the groups in."""
    if scope == "global":
        yield from _pooled("global", weights, rule, groups)
        return
    for fits, some in groupby(weights, lambda tensor: scope == "neuron" or tensor.nbytes <= WHOLE):
        tensors = list(some)
        if fits:
            size = WHOLE if scope == "layer" else None
            yield from _alone(pieces_of(tensors, rows=True, size=size), scope, rule, groups)
        else:
            for tensor in tensors:
                yield from _pooled(tensor.name, [tensor], rule, groups)


def _alone(
    pieces: Iterable[StoredPiece], scope: Scope, rule: Hyperparameters, groups: dict[str, GroupValues]
) -> Iterator[tuple[StoredPiece, Tensor]]:
    """Pieces that hold whole groups: each is decided as in memory."""
    for tensor, of_tensor in groupby(pieces, lambda piece: piece.tensor):
        found = []
        for piece in of_tensor:
            (mask,), values, *_ = prune_step([Entry(tensor.name, piece.values)], scope, rule)
            found.append(values[tensor.name])
            yield piece, piece.values.new_ones(piece.values.shape, dtype=torch.bool) if mask is None else mask
        groups[tensor.name] = GroupValues(
            *(np.concatenate([getattr(v, name) for v in found]) for name in ("d", "index", "r", "c"))
        )


def _zero_(piece: StoredPiece, mask: Tensor) -> None:
    """Set the pruned entries of a piece to zero."""
    if not mask.is_contiguous() or not piece.values.is_contiguous():
        piece.values.masked_fill_(mask.logical_not_(), 0)
        return
    bits = flatten(piece.values.view(INTEGER_OF[piece.values.dtype]), mask)
    work = list(chunks(bits, flatten(mask, mask), on_host=True))
    map_pieces(lambda values, keep: np.multiply(values, keep.view(np.int8), out=values), work, on_host=True)


def _pooled(
    name: str, weights: Sequence[StoredTensor], rule: Hyperparameters, groups: dict[str, GroupValues]
) -> Iterator[tuple[StoredPiece, Tensor]]:
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in weights if tensor.dtype is not None))
    guess = None
    if dtype.itemsize > 2 and len(keys := sample_keys(weights, dtype)):
        guess = Guess(keys, dtype, rule)
    groups[name], threshold = decide(lambda: as_pieces(pieces_of(weights)), rule, guess)
    held: list[StoredPiece] = []

    def values() -> Iterator[Tensor]:
        for piece in pieces_of(weights):
            held.append(piece)
            yield piece.values

    masks: Iterator[Tensor]
    if threshold is None:
        masks = (tensor.new_ones(tensor.shape, dtype=torch.bool) for tensor in values())
    else:
        masks = threshold.masks(values())
    for mask in masks:
        yield held.pop(), mask
