"""Pruned models as small files: remaining values and one bit a weight, in safetensors; or the bits alone.

What is stored of a pruned tensor is named and laid out as compressed-tensors' format "sparse-bitmask" does it for a
matrix (:mod:`torch_sap.files.bitmask`); docs/ship.md has it to the byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from torch_sap.arguments import check_path
from torch_sap.decide.keys import INTEGER_OF, check_dtype, count_true
from torch_sap.files.bitmask import gather_values, matrix_shape, not_zero, pack, unpack
from torch_sap.files.state import Held, held_tensors
from torch_sap.files.tensor_files import PathLike, Piece, write

FORMAT = 1


def save_sparse(model: nn.Module, path: PathLike) -> None:
    """Save a model as the values that pruning left and one bit a weight, bit for bit, in a safetensors file.

    A pruned tensor takes its remaining values, one bit an entry and some 8 bytes a row. A weight without a mask, as
    :func:`remove` leaves it, is stored in the same way where that is smaller, with bits for what is not zero. All else
    in the state_dict is stored as it is, shared tensors once. The file is complete or not there: it is written beside
    its place and then moved. One tensor is copied at a time.

    Args:
        model: Any module, pruned or not. It is not changed. Of tensors pruned by PyTorch's methods, the values behind
            the mask (``weight_orig`` where ``weight_mask`` is 0) are not kept.
        path: File to write, usually ``.safetensors``.

    Raises:
        TypeError: if model is no module, or its state_dict has something else than parameters and buffers, or one
            of a type that safetensors cannot hold.
        ValueError: if a tensor has no values, or two would have the same name in the file.
        NotImplementedError: if a tensor is sharded.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> _ = global_unstructured(model)
        >>> save_sparse(model, "sparse.safetensors")
        >>> again = load_sparse(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), "sparse.safetensors")
        >>> torch.equal(again[0].weight, model[0].weight)
        True
    """
    check_path("path", path)
    tensors: dict[str, Any] = {}
    pieces: list[Piece] = []
    everything = held_tensors(model, "save_sparse")
    for held in everything:
        kept, masked = _kept(held)
        if kept is None:
            pieces.append(_constant(held.name, held.tensor))
            continue
        bits, row_offsets = pack(kept)
        about = tensors[held.name] = _about(held, kept, masked=masked)
        prefix, shape = about["prefix"], tuple(kept.shape)
        pieces += [*_mask_pieces(prefix, bits, shape), _constant(f"{prefix}.row_offsets", row_offsets)]
        pieces.append(Piece(f"{prefix}.compressed", held.tensor.dtype, (about["remaining"],), _values(held, bits)))
    write(path, pieces, {"format": FORMAT, "kind": "model", "tensors": tensors, "shared": _shared(everything)})


def save_masks(model: nn.Module, path: PathLike) -> None:
    """Save the masks of a pruned model, one bit an entry, in a safetensors file.

    Args:
        model: A pruned module. It is not changed.
        path: File to write, usually ``.safetensors``.

    Raises:
        TypeError, NotImplementedError: as of :func:`save_sparse`.
        ValueError: if the model has no mask.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> _ = global_unstructured(model)
        >>> save_masks(model, "masks.safetensors")
        >>> again = load_masks(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), "masks.safetensors")
        >>> torch.equal(again[0].weight_mask, model[0].weight_mask)
        True
    """
    check_path("path", path)
    tensors: dict[str, Any] = {}
    pieces: list[Piece] = []
    everything = held_tensors(model, "save_masks")
    for held in everything:
        if held.prunable is not None and (mask := held.prunable.mask) is not None:
            kept = mask.cpu()
            about = tensors[held.name] = _about(held, kept, masked=True)
            pieces += _mask_pieces(about["prefix"], pack(kept)[0], tuple(kept.shape))
    if not tensors:
        raise ValueError("model must have masks to save, but no tensor of it is pruned; prune it first")
    write(path, pieces, {"format": FORMAT, "kind": "masks", "tensors": tensors, "shared": _shared(everything)})


def _kept(held: Held) -> tuple[Tensor | None, bool]:
    """What a tensor is stored of, on the host (None: all of it, as it is), and whether that is its mask."""
    if held.prunable is None:
        return None, False
    if (mask := held.prunable.mask) is not None:
        check_dtype(held.tensor, held.name)
        return mask.cpu(), True
    if held.tensor.dtype not in INTEGER_OF or held.tensor.dim() < 2:
        return None, False
    kept = not_zero(held.tensor.cpu())
    rows, columns = matrix_shape(kept.shape)
    packed = int(count_true(kept)) * held.tensor.itemsize + rows * (-(-columns // 8) + 8) + 16
    return (kept, False) if packed < held.tensor.nbytes else (None, False)


def _prefix(name: str) -> str:
    """What the names of a tensor's pieces begin with, as compressed-tensors has it."""
    return name.removesuffix(".weight")


def _mask_pieces(prefix: str, bits: Tensor, shape: tuple[int, ...]) -> list[Piece]:
    rows_and_columns = torch.tensor(matrix_shape(shape))
    return [_constant(f"{prefix}.bitmask", bits), _constant(f"{prefix}.shape", rows_and_columns)]


def _constant(name: str, tensor: Tensor) -> Piece:
    return Piece(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


def _values(held: Held, bits: Tensor) -> Callable[[], Tensor]:
    """What makes the values of a tensor when they are written. Until then only bits of its mask are in memory."""
    shape = held.tensor.shape
    return lambda: gather_values(held.tensor.cpu(), unpack(bits, matrix_shape(shape)).reshape(shape))


def _about(held: Held, kept: Tensor, *, masked: bool) -> dict[str, Any]:
    return {
        "prefix": _prefix(held.name),
        "shape": list(held.tensor.shape),
        "remaining": int(count_true(kept)),
        "masked": masked,
    }


def _shared(tensors: Iterable[Held]) -> dict[str, str]:
    """Names that stand for a tensor with another name."""
    return {alias: held.name for held in tensors for alias in held.aliases}
