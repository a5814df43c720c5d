"""Reading the weights of checkpoint files piece by piece, ahead of the work on them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_sap.decide.keys import keys_of
from torch_sap.decide.streaming import Piece
from torch_sap.decide.sums import BLOCK
from torch_sap.files.page_cache import forget, is_cached, is_too_large, memory_like, read_past_cache
from torch_sap.files.weights import StoredTensor

PIECE = 2**24
"""Bytes that are read at once, or one row of a tensor if that is more."""

SAMPLE = (2**16, 2**20)
"""The guess of the last entry to go is made from one in 128 of a group, but from so many at least and at most."""

RUN = 2**10
"""Neighbours that are read together for the sample."""

READERS = 2
"""Pieces that are read at a time: a disk gives two side by side faster than one after the other."""


class StoredPiece(NamedTuple):
    """A piece of a tensor, and where it lies: ``values`` is a view of ``memory``, which the file has at ``offset``."""

    tensor: StoredTensor
    values: Tensor
    memory: NDArray[np.uint8]
    offset: int
    is_last: bool


def pieces_of(tensors: Sequence[StoredTensor], *, rows: bool = False, size: int | None = None) -> Iterator[StoredPiece]:
    """Read tensors piece by piece.

    Args:
        tensors: What to read, in this order.
        rows: Whether the pieces are a number of whole rows (of dimension 0), of two dimensions; or else entries in
            one dimension, a number of BLOCK. A tensor that does not lie in row-major order comes whole, in its shape.
        size: Bytes at most in a piece, if a row is not more; PIECE if not given.

    Yields:
        The pieces, in new memory.

    Raises:
        ValueError: if a file ends too early.
    """
    most = PIECE if size is None else size
    parts = (
        (tensor, offset, length, shape) for tensor in tensors for offset, length, shape in _parts(tensor, rows, most)
    )
    past_cache = set()
    if is_too_large(sum(tensor.nbytes for tensor in tensors)):
        past_cache = {path for path in {tensor.path for tensor in tensors} if not is_cached(path)}

    def read(tensor: StoredTensor, offset: int, length: int, shape: tuple[int, ...] | None) -> StoredPiece:
        assert tensor.dtype is not None
        memory, blocks = memory_like(offset, length, tensor.dtype.itemsize)
        if tensor.path not in past_cache or not read_past_cache(tensor.path, offset, length, blocks):
            with open(tensor.path, "rb", buffering=0) as file:
                read_into(file, offset, memory, tensor.path)
                if tensor.path in past_cache:
                    forget(file, offset, length)
        return _view(tensor, memory, offset, shape)

    return _ahead(read, parts, READERS if size is None else 1)


def _parts(tensor: StoredTensor, rows: bool, most: int) -> Iterator[tuple[int, int, tuple[int, ...] | None]]:
    """Offset and length in bytes of each piece, and its shape; None if the tensor comes in its own."""
    assert tensor.dtype is not None
    if tensor.stride != torch.empty(tensor.shape, device="meta").stride() or tensor.numel == 0:
        yield tensor.offset, tensor.nbytes, None
        return
    size, width = tensor.dtype.itemsize, tensor.numel // tensor.shape[0] if rows else BLOCK
    step = width * size * max(1, most // (width * size))
    for start in range(0, tensor.nbytes, step):
        length = min(step, tensor.nbytes - start)
        shape = (length // size // width, width) if rows else (length // size,)
        yield tensor.offset + start, length, shape


def _view(tensor: StoredTensor, memory: NDArray[np.uint8], offset: int, shape: tuple[int, ...] | None) -> StoredPiece:
    assert tensor.dtype is not None
    if len(memory):
        values = torch.from_numpy(memory).view(tensor.dtype)
        values = values.as_strided(tensor.shape, tensor.stride) if shape is None else values.view(shape)
    else:
        values = torch.empty(tensor.shape, dtype=tensor.dtype)
    is_last = offset + len(memory) == tensor.offset + tensor.nbytes
    return StoredPiece(tensor, values, memory, offset, is_last)


def read_into(file: Any, offset: int, memory: NDArray[np.uint8], path: Path) -> None:
    """Fill memory with the bytes of a file from an offset on."""
    file.seek(offset)
    view = memory.data
    while len(view):
        count = file.readinto(view)
        if not count:
            raise ValueError(f"{path} ends at byte {file.tell()}, before the tensors that it should hold")
        view = view[count:]


def _ahead(read: Callable[..., StoredPiece], parts: Iterator[tuple[Any, ...]], count: int) -> Iterator[StoredPiece]:
    """What is read of each part, in order, by threads that are so many parts ahead."""
    with ThreadPoolExecutor(count, thread_name_prefix="torch_sap_read") as readers:
        coming = deque(readers.submit(read, *part) for part in islice(parts, count))
        while coming:
            piece = coming.popleft().result()
            coming.extend(readers.submit(read, *part) for part in islice(parts, 1))
            yield piece


def as_pieces(stored: Iterable[StoredPiece]) -> Iterator[Piece]:
    """What :func:`torch_sap.decide.streaming.decide` takes."""
    return (Piece(piece.tensor.name, piece.values, piece.is_last) for piece in stored)


def sample_keys(tensors: Sequence[StoredTensor], dtype: torch.dtype) -> NDArray[Any]:
    """Keys of entries from all over a group: short runs at regular distances in each tensor."""
    total = sum(tensor.numel for tensor in tensors)
    stride = max(1, total // min(max(SAMPLE[0], total // 128), SAMPLE[1]))
    found = [np.empty(0, f"i{dtype.itemsize}")]
    for tensor in tensors:
        assert tensor.dtype is not None
        size = tensor.dtype.itemsize
        with open(tensor.path, "rb", buffering=0) as file:
            for start in range(0, tensor.numel, RUN * stride):
                length = min(RUN, tensor.numel - start)
                memory = np.empty(length * size, np.uint8)
                read_into(file, tensor.offset + start * size, memory, tensor.path)
                found.append(keys_of(torch.from_numpy(memory).view(tensor.dtype), None, dtype, on_host=True))
    return np.concatenate(found)
