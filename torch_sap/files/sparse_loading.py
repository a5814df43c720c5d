"""Sparse files are checked, and loaded into models of the same architecture."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from torch_sap.arguments import check_path
from torch_sap.decide.keys import check_dtype, count_true
from torch_sap.files.bitmask import matrix_shape, row_offsets, scatter_values, unpack
from torch_sap.files.sparse_saving import FORMAT
from torch_sap.files.state import Held, held_tensors
from torch_sap.files.tensor_files import PathLike, TensorFile, damaged, reading
from torch_sap.masks.guards import guard
from torch_sap.masks.mask import hold_masks

Model = TypeVar("Model", bound=nn.Module)

PARTS = ("compressed", "bitmask", "shape", "row_offsets")


def load_sparse(model: Model, path: PathLike) -> Model:
    """Load what :func:`save_sparse` wrote into a model of the same architecture, in place, bit for bit.

    Tensors that had a mask get it: the model is pruned afterwards as the saved one was, whether it was dense or pruned
    before, and can be trained and pruned on. All is checked (checksums, names, shapes, types, counts) before the first
    value is written. A "sparse-bitmask" file of compressed-tensors can be loaded too, without checksums.

    Args:
        model: The module to load into.
        path: The file.

    Returns:
        The model itself.

    Raises:
        FileNotFoundError: if there is no file.
        ImportError: if safetensors is not installed (extra "safetensors").
        ValueError: if the file is truncated or damaged, or does not fit the model; the tensor is named.
        TypeError, NotImplementedError: as of :func:`save_sparse`.
            The model is as before if anything is raised.
    """
    return _load(model, path, "load_sparse")


def load_masks(model: Model, path: PathLike) -> Model:
    """Give a model the masks of a file that :func:`save_masks` or :func:`save_sparse` wrote, in place.

    Afterwards exactly those entries are pruned that the file has as pruned. Values stay, but for zeros at pruned
    entries; an entry that was pruned before and is not any more is 0.

    Arguments, result and errors are those of :func:`load_sparse`.
    """
    return _load(model, path, "load_masks")


@dataclass(frozen=True)
class _Stored:
    """What a file has of one tensor: pieces with a prefix, or the tensor itself (prefix None)."""

    name: str
    prefix: str | None
    shape: tuple[int, ...] | None
    masked: bool
    remaining: int | None

    def mask(self, file: TensorFile) -> Tensor:
        """The mask, in the shape that the file has it in."""
        assert self.prefix is not None
        shape = file.read(f"{self.prefix}.shape").tolist()
        return unpack(file.read(f"{self.prefix}.bitmask"), shape)

    def tensor(self, file: TensorFile) -> Tensor:
        """The values, with zeros where none are stored."""
        return (
            file.read(self.name)
            if self.prefix is None
            else scatter_values(file.read(f"{self.prefix}.compressed"), self.mask(file))
        )


def _load(model: Model, path: PathLike, function: str) -> Model:
    held = {name: one for one in held_tensors(model, function) for name in (one.name, *one.aliases)}
    check_path("path", path)
    with reading(path) as file:
        stored, shared = _contents(file, function)
        pairs = _pair(held, stored, shared, path, whole=function == "load_sparse")
        for one, there in pairs:
            _check(file, one, there, values=function == "load_sparse")
        with torch.no_grad():
            _hold(model, held, pairs, file)
            if function == "load_sparse":
                for one, there in pairs:
                    one.tensor.copy_(there.tensor(file).reshape(one.tensor.shape))
    return model


def _contents(file: TensorFile, function: str) -> tuple[dict[str, _Stored], Mapping[str, str]]:
    """What a file holds, by the names of the state_dict, and which names stand for which."""
    if file.about is None:
        prefixes = [name.removesuffix(".bitmask") for name in file.names if name.endswith(".bitmask")]
        packed = {p + ".weight": _Stored(p + ".weight", p, None, True, None) for p in prefixes}
        shared: Mapping[str, str] = {}
    else:
        if file.about.get("format") != FORMAT:
            raise ValueError(f"{file.path} must be of format {FORMAT}, got {file.about.get('format')!r}")
        if function == "load_sparse" and file.about["kind"] != "model":
            raise ValueError(f"{file.path} has masks alone, which load_masks loads; save_sparse writes whole models")
        shared = file.about["shared"]
        packed = {
            name: _Stored(name, found["prefix"], tuple(found["shape"]), found["masked"], found["remaining"])
            for name, found in file.about["tensors"].items()
        }
    parts = {f"{there.prefix}.{part}" for there in packed.values() for part in PARTS}
    plain = {name: _Stored(name, None, file.shape(name), False, None) for name in file.names - parts}
    return {**packed, **plain}, shared


def _pair(
    held: Mapping[str, Held], stored: Mapping[str, _Stored], shared: Mapping[str, str], path: PathLike, *, whole: bool
) -> list[tuple[Held, _Stored]]:
    """Each tensor of the model with what the file has of it, once."""
    known = {**stored, **{alias: stored[name] for alias, name in shared.items() if name in stored}}
    if not whole:
        known = {name: there for name, there in known.items() if there.masked}
    missing = sorted(set(held) - set(known)) if whole else []
    unknown = sorted(set(known) - set(held))
    if missing or unknown:
        raise ValueError(f"{os.fspath(path)} must fit the model, but lacks {missing} and has unknown {unknown}")
    pairs: dict[int, tuple[Held, _Stored]] = {}
    for name, there in known.items():
        before = pairs.setdefault(id(held[name]), (held[name], there))[1]
        if before is not there:
            raise ValueError(f"{before.name} and {name} are one tensor in the model, but two in {os.fspath(path)}")
    return list(pairs.values())


def _check(file: TensorFile, one: Held, there: _Stored, *, values: bool) -> None:
    """Raise a ValueError unless what a file has of a tensor is whole and fits the model's."""
    if there.prefix is None:
        dtype, shape = file.dtype(there.name), there.shape
        file.check(there.name)
    else:
        parts = {part: f"{there.prefix}.{part}" for part in (PARTS if values else PARTS[1:3])}
        for part in parts.values():
            if part not in file.names:
                raise damaged(file.path, f"{part} is missing")
            file.check(part)
        try:
            _check_counts(file, there, parts)
        except ValueError as error:
            raise damaged(file.path, f"{there.name}: {error}") from error
        dtype = file.dtype(parts["compressed"]) if values else one.tensor.dtype
        shape = tuple(file.read(parts["shape"]).tolist()) if there.shape is None else there.shape
        check_dtype(one.tensor, there.name)
    if dtype is not one.tensor.dtype:
        raise ValueError(
            f"{there.name} must have the model's type {one.tensor.dtype}, but is {dtype} in {os.fspath(file.path)}; "
            "convert the model first, as by model.to(dtype)"
        )
    if shape != tuple(one.tensor.shape):
        raise ValueError(
            f"{there.name} must have the model's shape {tuple(one.tensor.shape)}, but has {shape} in "
            f"{os.fspath(file.path)}"
        )
    if there.masked and one.prunable is None:
        raise ValueError(f"{there.name} has a mask in {os.fspath(file.path)}, but is no parameter of the model")


def _check_counts(file: TensorFile, there: _Stored, parts: Mapping[str, str]) -> None:
    """Raise a ValueError unless bits, values and offsets of a tensor belong together."""
    rows = tuple(file.read(parts["shape"]).tolist())
    if there.shape is not None and rows != matrix_shape(there.shape):
        raise ValueError(f"its rows and columns must be {matrix_shape(there.shape)}, got {rows}")
    mask = there.mask(file)
    remaining = int(count_true(mask))
    if there.remaining not in (None, remaining):
        raise ValueError(f"{there.remaining} entries must remain by its description, but {remaining} do by its bits")
    if "compressed" in parts and file.shape(parts["compressed"]) != (remaining,):
        raise ValueError(f"it must have {remaining} values by its bits, got shape {file.shape(parts['compressed'])}")
    if (
        "row_offsets" in parts
        and len(rows) == 2
        and not torch.equal(file.read(parts["row_offsets"]), row_offsets(mask))
    ):
        raise ValueError("its row offsets do not fit its bits")


def _hold(model: nn.Module, held: Mapping[str, Held], pairs: list[tuple[Held, _Stored]], file: TensorFile) -> None:
    """Let exactly the tensors be masked, with exactly the masks, that the file has."""
    found = {id(one): there for one, there in pairs if there.masked}
    for one in {id(one): one for one in held.values()}.values():
        if one.prunable is None:
            continue
        there = found.get(id(one))
        mask = None if there is None else there.mask(file).reshape(one.tensor.shape).to(one.tensor.device)
        if mask is not None or one.prunable.mask is not None:
            hold_masks([one.prunable], [mask])
    guard(model)
