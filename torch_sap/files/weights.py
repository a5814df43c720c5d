"""Checkpoint files: which weights are in them and at which bytes they lie, without reading the weights.

Formats: safetensors, PyTorch's zip files, and several of either with an index. The files themselves are read and
written at these places, so that no more than a piece of them is ever in memory.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_sap.decide.keys import INTEGER_OF
from torch_sap.files.tensor_files import check_plain
from torch_sap.masks.parameters import excluded_by

SAFETENSORS_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Those that can be pruned, by their name in a file."""

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        name: Its key.
        dtype: Its type; None if it is one that cannot be pruned.
        kind: Its type in words.
        shape: Its shape.
        stride: Its strides in entries, as it lies in the file.
        path: The file.
        offset: Byte of the file where it begins.
    """

    name: str
    dtype: torch.dtype | None
    kind: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    path: Path
    offset: int

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes from its first entry to its last."""
        assert self.dtype is not None
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize if self.numel else 0


@dataclass(frozen=True)
class Checkpoint:
    """The files of a checkpoint and the tensors in them.

    Attributes:
        path: What was asked for.
        files: The files with tensors, in order of name.
        index: The index of several files; None if there is none.
        tensors: All tensors in order of position: file by file, in safetensors as they lie in it, in PyTorch's files
            as they are in the dictionary.
    """

    path: Path
    files: tuple[Path, ...]
    index: Path | None
    tensors: tuple[StoredTensor, ...]

    def weights(self, exclude: str | Iterable[str] = ()) -> list[StoredTensor]:
        """The tensors that SAP prunes, each place in a file once, by the rule of ``prunable_parameters``.

        Raises:
            TypeError: if one is not of a real floating-point type.
            ValueError: if there is none, or one cannot be pruned where it lies.
        """
        first: dict[tuple[Any, ...], StoredTensor] = {}
        paths: dict[int, list[str]] = {}
        for tensor in self.tensors:
            if is_weight((tensor.name, tensor)):
                key = tensor.path, tensor.offset, tensor.shape, tensor.stride
                # empty tensors may lie at one place and be different ones
                known = first.setdefault(key if tensor.numel else (tensor.name,), tensor)
                paths.setdefault(id(known), []).append(tensor.name)
        excluded = excluded_by(paths, exclude)
        found = [tensor for tensor in first.values() if id(tensor) not in excluded]
        if not found:
            raise ValueError(
                f"{self.path} has no weight to prune (more than one dimension and 'weight' in the last part of its "
                "name)" + (f" that exclude={exclude!r} leaves" if exclude else "")
            )
        _check(found, {tensor.name for tensor in self.tensors})
        return found


def _check(tensors: list[StoredTensor], names: set[str]) -> None:
    """Raise unless the tensors can be pruned where they lie."""
    for tensor in tensors:
        stem = tensor.name.removesuffix("_orig").removesuffix("_mask")
        if {f"{stem}_orig", f"{stem}_mask"} <= names:
            raise ValueError(
                f"{tensor.name} belongs to a model with masks; save torch_sap.remove(model).state_dict(), "
                "which has plain weights"
            )
        if tensor.dtype is None:
            types = ", ".join(str(dtype).removeprefix("torch.") for dtype in INTEGER_OF)
            raise TypeError(
                f"{tensor.name} must be a real floating-point tensor ({types}), got {tensor.kind}; exclude it"
            )
        if tensor.nbytes != tensor.numel * tensor.dtype.itemsize:
            raise ValueError(f"{tensor.name} must fill its memory, but it is a view with gaps or overlaps")
    ends: dict[Path, tuple[int, str]] = {}
    for tensor in sorted(tensors, key=lambda t: (t.path, t.offset, t.nbytes)):
        end, name = ends.get(tensor.path, (0, ""))
        if tensor.offset < end and tensor.nbytes:
            raise ValueError(f"{tensor.name} and {name} share a part of their memory; exclude one of them")
        ends[tensor.path] = max((end, name), (tensor.offset + tensor.nbytes, tensor.name))


def open_checkpoint(path: str | os.PathLike[str], key: str | None = None) -> Checkpoint:
    """Find out what is in a checkpoint.

    Args:
        path: A file, an index (``*.index.json``), or a folder with one checkpoint.
        key: Name of the state_dict among several that a PyTorch file holds.

    Returns:
        Its files and tensors; no weight is read.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if it is no checkpoint, or a folder with several.
        ImportError: if safetensors is needed and not installed (extra "cli").
    """
    path = Path(path)
    found = _in_folder(path) if path.is_dir() else path
    index = found if found.name.endswith(".index.json") else None
    files = (found,) if index is None else _files_of_index(index)
    tensors: list[StoredTensor] = []
    for file in files:
        if file.suffix not in SUFFIXES:
            raise ValueError(f"{file} must end in one of {', '.join(SUFFIXES)} or .index.json")
        if file.suffix == ".safetensors" and key is not None:
            raise ValueError(f"key chooses in PyTorch's files, but {file.name} is a safetensors file; leave it out")
        tensors += _safetensors(file) if file.suffix == ".safetensors" else _pytorch(file, key)
    return Checkpoint(path, files, index, tuple(tensors))


def _in_folder(folder: Path) -> Path:
    """The one checkpoint of a folder: an index, or else a file."""
    for pattern in ("*.safetensors.index.json", "*.index.json", "*.safetensors", *(f"*{s}" for s in TORCH_SUFFIXES)):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise ValueError(f"{folder} holds several checkpoints, name one: {', '.join(p.name for p in found)}")
        if found:
            return found[0]
    raise ValueError(f"{folder} holds no checkpoint: no *.index.json, no {', '.join('*' + s for s in SUFFIXES)}")


def _files_of_index(index: Path) -> tuple[Path, ...]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        plain = all(Path(name).name == name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} must be an index with a weight_map from tensors to files: {error!r}") from error
    if not plain or not names:
        raise ValueError(f"{index} must name files of its own folder, got {sorted(names)}")
    return tuple(index.parent / name for name in sorted(names))


def _safetensors(path: Path) -> list[StoredTensor]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("safetensors files need safetensors: pip install 'torch_sap[cli]'") from error
    try:
        with safe_open(path, framework="pt"):  # it checks the header, and that it covers the file
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    check_plain(path, header.pop("__metadata__", {}))
    tensors = [
        StoredTensor(
            name,
            SAFETENSORS_TYPES.get(entry["dtype"]),
            entry["dtype"],
            tuple(entry["shape"]),
            _row_major(entry["shape"]),
            path,
            8 + length + entry["data_offsets"][0],
        )
        for name, entry in header.items()
    ]
    return sorted(tensors, key=lambda tensor: tensor.offset)


def _row_major(shape: Iterable[int]) -> tuple[int, ...]:
    return torch.empty(tuple(shape), device="meta").stride()


def _pytorch(path: Path, key: str | None) -> list[StoredTensor]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    starts: list[int] = []

    def note(storage: Any, location: str) -> Any:
        if storage.nbytes():
            starts.append(storage.data_ptr())
        return storage

    try:
        content = torch.load(path, map_location=note, weights_only=True, mmap=is_zip)  # mapped, so not read
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds other objects than tensors, or is damaged; save model.state_dict() and name that file"
        ) from error
    except Exception as error:  # damaged files make torch.load raise nearly anything
        raise ValueError(f"{path} is no file of torch.save: {type(error).__name__}: {error}") from error
    if not is_zip:
        raise ValueError(f"{path} has the format of before PyTorch 1.6; torch.save(torch.load(path), path) renews it")
    base, tensors = _address_of_byte_0(path, starts), []
    for name, value in _choose(content, path, key):
        dtype = value.dtype if value.dtype in INTEGER_OF else None
        kind = str(value.dtype).removeprefix("torch.")
        offset = value.data_ptr() - base if value.numel() else 0
        tensors.append(StoredTensor(name, dtype, kind, tuple(value.shape), value.stride(), path, offset))
        if not 0 <= offset <= size or (dtype is not None and offset + tensors[-1].nbytes > size):
            raise ValueError(f"{path} is damaged: {name} lies outside of it")
    return tensors


def _address_of_byte_0(path: Path, starts: Sequence[int]) -> int:
    """Where a mapped zip file of torch.save begins in memory, from where all its storages that are not empty begin."""
    places = set()
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for record in archive.infolist():
            if "/data/" in record.filename and record.file_size:
                file.seek(record.header_offset + 26)
                places.add(record.header_offset + 30 + sum(struct.unpack("<HH", file.read(4))))
    base = min(starts, default=0) - min(places, default=0)
    if {start - base for start in starts} != places:
        raise ValueError(f"{path} is damaged: its storages are not those of its directory")
    return base


def _choose(content: Any, path: Path, key: str | None) -> list[tuple[str, Tensor]]:
    """The tensors of the state_dict in a file: the content itself, or what lies under a key of it."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold a dictionary of tensors, got {type(content).__name__}")
    inside = {name: _tensors(value) for name, value in content.items() if isinstance(value, Mapping)}
    known = {str(name): tensors for name, tensors in inside.items() if any(map(is_weight, tensors))}
    own = _tensors(content)
    if key is not None:
        if key not in known:
            raise ValueError(f"key must name a state_dict of {path}, one of {sorted(known)}, got key={key!r}")
        return known[key]
    if any(map(is_weight, own)) or not known:
        return own
    if len(known) > 1:
        raise ValueError(f"{path} holds several state_dicts, choose one with --key: {', '.join(known)}")
    return next(iter(known.values()))


def _tensors(values: Mapping[Any, Any]) -> list[tuple[str, Tensor]]:
    return [
        (name, value)
        for name, value in values.items()
        if isinstance(name, str) and isinstance(value, Tensor) and value.layout is torch.strided
    ]


def is_weight(item: tuple[str, Tensor | StoredTensor]) -> bool:
    """Whether a tensor is one that SAP prunes, by its key and its dimensions."""
    name, tensor = item
    return "weight" in name.rpartition(".")[2] and len(tensor.shape) > 1
