"""safetensors files written tensor by tensor, whole or not at all, with checksums.

A safetensors file is a length (8 bytes, little-endian), a JSON header with type, shape and place of each tensor and a
map of strings, and then the tensors' bytes, one after the other. The strings here are

- ``format``: "pt", as PyTorch's own files have it;
- ``torch_sap``: JSON of what the caller wants to keep, and ``crc32``: the CRC-32 of each tensor's bytes by its name;
- ``torch_sap_crc32``: the CRC-32 of that JSON. CRCs are eight hexadecimal digits.

safetensors' own ``save_file`` wants all tensors in memory at once; reading is left to it.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_sap.files.checkpoint import replacing

PathLike = str | os.PathLike[str]

TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Types that safetensors has names for."""


class Piece(NamedTuple):
    """A tensor to write: its name, type and shape, and a function that makes it when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def write(path: PathLike, pieces: Sequence[Piece], about: Mapping[str, Any]) -> None:
    """Write tensors and what is to be known of them into a file, of which nothing is seen before it is complete.

    Args:
        path: Where the file is to be; another one there is replaced.
        pieces: The tensors. One is in memory at a time.
        about: What JSON can hold.

    Raises:
        ValueError: if two tensors have the same name.
        TypeError: if a tensor is of a type that safetensors has no name for.
    """
    for piece in pieces:
        if piece.dtype not in TYPES:
            raise TypeError(f"{piece.name} must be of a type that safetensors can hold, got {piece.dtype}")
    names = [piece.name for piece in pieces]
    if doubled := sorted({name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()):
        raise ValueError(f"tensors must have different names in a file, but two would be called {doubled[0]!r}")
    ordered = sorted(pieces, key=lambda piece: -piece.dtype.itemsize)  # readers want each at a multiple of its width
    with replacing(path) as file:
        checksums = dict.fromkeys((piece.name for piece in ordered), 0)
        file.write(_header(ordered, about, checksums))
        for piece in ordered:
            tensor = piece.make().detach().cpu().contiguous()
            assert (tensor.dtype, tuple(tensor.shape)) == (piece.dtype, piece.shape), piece.name
            stored = memoryview(_bytes(tensor))
            file.write(stored)
            checksums[piece.name] = zlib.crc32(stored)
        file.seek(0)
        file.write(_header(ordered, about, checksums))  # of the same length: digits took the place of zeros


def _bytes(tensor: Tensor) -> Any:
    flat = tensor.reshape(-1).as_strided((tensor.numel(),), (1,))  # strides of one or no entry may be anything
    return flat.view(torch.uint8).numpy()


def _header(pieces: Sequence[Piece], about: Mapping[str, Any], checksums: Mapping[str, int]) -> bytes:
    text = json.dumps({**about, "crc32": {name: f"{value:08x}" for name, value in checksums.items()}})
    strings = {"format": "pt", "torch_sap": text, "torch_sap_crc32": f"{zlib.crc32(text.encode()):08x}"}
    header: dict[str, Any] = {"__metadata__": strings}
    start = 0
    for name, dtype, shape, _ in pieces:
        end = start + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": TYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def check_plain(path: PathLike, strings: Mapping[str, str]) -> None:
    """Raise a ValueError if by its strings a file is one of save_sparse or save_masks, which hold no plain weights."""
    if "torch_sap" not in strings:
        return
    if json.loads(strings["torch_sap"])["kind"] == "masks":
        raise ValueError(f"{path} was written by save_masks: it has no weights; load_masks gives its masks to a model")
    raise ValueError(
        f"{path} was written by save_sparse: load it with load_sparse, and save the state_dict of "
        "torch_sap.remove(model)"
    )


class TensorFile:
    """A safetensors file that is open for reading.

    Attributes:
        path: Where it is.
        about: What :func:`write` was told to keep; None in a file of another program.
        names: The tensors in it.
    """

    def __init__(self, path: PathLike, opened: Any) -> None:
        self.path, self._opened = path, opened
        self.names: frozenset[str] = frozenset(opened.keys())
        strings = opened.metadata() or {}
        self.about: dict[str, Any] | None = None
        if "torch_sap" in strings:
            text = strings["torch_sap"]
            if f"{zlib.crc32(text.encode()):08x}" != strings.get("torch_sap_crc32"):
                raise damaged(path, "what it says about its tensors does not fit its checksum")
            self.about = json.loads(text)
            assert self.about is not None
            known = self.about.pop("crc32")
            if known.keys() != self.names:
                raise damaged(path, f"it lacks or adds tensors: {sorted(known.keys() ^ self.names)}")
            self._checksums: Mapping[str, str] = known
        elif "torch_sap_crc32" in strings:
            raise damaged(path, "what it says about its tensors is missing")

    def dtype(self, name: str) -> torch.dtype | None:
        """Type of a tensor; None if it is one that torch_sap cannot hold."""
        found = self._opened.get_slice(name).get_dtype()
        return next((dtype for dtype, known in TYPES.items() if known == found), None)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._opened.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """A tensor, in the memory of the file."""
        tensor: Tensor = self._opened.get_tensor(name)
        return tensor

    def check(self, name: str) -> Tensor:
        """A tensor, after its bytes were found to be those that were written, as far as the file knows.

        Raises:
            ValueError: if they are others.
        """
        tensor = self.read(name)
        if self.about is not None and f"{zlib.crc32(memoryview(_bytes(tensor))):08x}" != self._checksums[name]:
            raise damaged(self.path, f"the bytes of {name} do not fit their checksum")
        return tensor


@contextmanager
def reading(path: PathLike) -> Iterator[TensorFile]:
    """Open a safetensors file.

    Raises:
        FileNotFoundError: if there is none.
        ImportError: if safetensors is not installed (extra "safetensors").
        ValueError: if it is truncated or damaged, as far as its header tells.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("reading needs safetensors: pip install 'torch_sap[safetensors]'") from error
    try:
        opened: Any = safe_open(os.fspath(path), framework="pt")
    except SafetensorError as error:
        raise damaged(path, str(error)) from error
    with opened:
        yield TensorFile(path, opened)


def damaged(path: PathLike, why: str) -> ValueError:
    """The error that a file is not as it was written."""
    return ValueError(f"{os.fspath(path)} is truncated or damaged: {why}. Nothing was loaded; write or copy it again")
