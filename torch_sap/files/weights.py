"""Prune checkpoint files of other programs: safetensors, PyTorch's zip files, and several of either with an index.

Tensors are mapped into memory. A safetensors file is pruned in a copy that is mapped shared, so the file may be larger
than memory. A PyTorch file has to fit in memory.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_sap.arguments import needs
from torch_sap.decide.bounds import Hyperparameters
from torch_sap.decide.groups import Entry, Scope
from torch_sap.decide.keys import INTEGER_OF, TYPES
from torch_sap.decide.step import zero_step
from torch_sap.files.atomic import replacing
from torch_sap.files.checkpoint import save
from torch_sap.files.folder import SUFFIXES, TORCH_SUFFIXES, checkpoint_files, companions
from torch_sap.masks.kinds import EXCLUDED, ROWS, ZERO, Axes, kind_on_disk
from torch_sap.masks.parameters import LeftOut, Patterns, matching
from torch_sap.records.report import PruningReport, TensorRecord

SAFETENSORS_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The types that can be pruned, by their names in a file."""


class Stored(NamedTuple):
    """A tensor in a file, mapped into memory; None if safetensors has it in a type that cannot be pruned."""

    name: str
    shape: tuple[int, ...]
    kind: str
    tensor: Tensor | None
    path: Path
    axes: Axes = ROWS

    def entry(self) -> Entry:
        """The tensor as the SAP step sees it."""
        assert self.tensor is not None
        return Entry(self.name, self.tensor, **self.axes._asdict())


@dataclass(frozen=True)
class Checkpoint:
    """The files of a checkpoint and the tensors in them."""

    path: Path
    """What was asked for."""
    files: list[Path]
    """The files with tensors, in order of name, and the index of several."""
    tensors: list[Stored]
    """In order of position: file by file, as they lie in a safetensors file or in the dictionary of a PyTorch file."""
    contents: dict[Path, Any]
    """What PyTorch's files hold."""

    @property
    def is_folder(self) -> bool:
        """Whether the output is a folder."""
        return self.path.is_dir() or self.path.suffix == ".json"

    def weights(self, exclude: Patterns = (), include: Patterns = ()) -> tuple[list[Stored], list[LeftOut]]:
        """Choose the tensors that SAP prunes, shared ones once, by the rule of ``prunable_parameters``."""
        about = self._config()
        first: dict[str, Stored] = {}
        paths: dict[int, list[str]] = {}
        kinds: dict[int, list[Axes | str]] = {}
        for stored in self.tensors:
            if len(stored.shape) > 1:
                tensor, place = stored.tensor, stored.name  # empty tensors may share an address
                if tensor is not None and tensor.numel():
                    place = f"{tensor.data_ptr()} {stored.shape} {tensor.stride()}"
                key = id(first.setdefault(place, stored))
                paths.setdefault(key, []).append(stored.name)
                kinds.setdefault(key, []).append(kind_on_disk(stored.name, stored.shape, **about))
        excluded, included = matching("exclude", paths, exclude), matching("include", paths, include)
        found, left_out = [], []
        for stored in first.values():
            key, axes = id(stored), [kind for kind in kinds[id(stored)] if isinstance(kind, Axes)]
            if (axes or key in included) and key not in excluded:
                found.append(stored._replace(axes=axes[0] if axes else ROWS))
            else:
                left_out.append(LeftOut(stored.name, stored.shape, EXCLUDED if key in excluded else str(kinds[key][0])))
        if not found:
            rule = "more than one dimension and 'weight' in the last part of its name"
            left = f" that exclude={exclude!r} leaves" if exclude else ""
            raise ValueError(f"{self.path} has no weight to prune ({rule}){left}")
        _check(found, {stored.name for stored in self.tensors})
        return found, left_out

    def _config(self) -> dict[str, Any]:
        """What transformers' config.json beside the files says about their model."""
        config = self.files[0].parent / "config.json"
        try:
            content = json.loads(config.read_text(encoding="utf-8"))
            inner = content.get("text_config") or {}
            model_type, tied = (content.get(key, inner.get(key)) for key in ("model_type", "tie_word_embeddings"))
        except (OSError, ValueError, AttributeError):  # none, or not one of transformers'
            return {}
        return {"model_type": str(model_type), "tied": tied is True}


def _check(weights: Sequence[Stored], names: set[str]) -> None:
    """Raise unless the weights can be pruned in place."""
    spans = []
    for name, _, kind, tensor, *_ in weights:
        stem = name.removesuffix("_orig").removesuffix("_mask")
        if {f"{stem}_orig", f"{stem}_mask"} <= names:
            advice = "save torch_sap.remove(model).state_dict(), which has plain weights"
            raise ValueError(f"{name} belongs to a model with masks; {advice}")
        if tensor is None or tensor.dtype not in INTEGER_OF:
            raise TypeError(f"{name} must be a real floating-point tensor ({TYPES}), got {kind}; exclude it")
        last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        if tensor.numel() and last + 1 != tensor.numel():
            raise ValueError(f"{name} must fill its memory, but it is a view with gaps or overlaps")
        if tensor.numel():
            spans.append((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, name))
    spans.sort()
    for (_, end, before), (start, _, name) in pairwise(spans):
        if start < end:
            raise ValueError(f"{name} and {before} share a part of their memory; exclude one of them")


def open_checkpoint(path: str | os.PathLike[str], key: str | None = None) -> Checkpoint:
    """Map the tensors of a checkpoint into memory, without reading them; arguments as in :func:`prune_checkpoint`."""
    path = Path(path)
    files = checkpoint_files(path)
    tensors: list[Stored] = []
    contents: dict[Path, Any] = {}
    for file in files:
        if file.name.endswith(".index.json"):
            continue
        if file.suffix in TORCH_SUFFIXES:
            contents[file] = _load(file)
            for name, tensor in _choose(contents[file], file, key).items():
                kind = str(tensor.dtype).removeprefix("torch.")
                tensors.append(Stored(name, tuple(tensor.shape), kind, tensor, file))
        elif file.suffix != ".safetensors":
            raise ValueError(f"{file} must end in one of {', '.join(SUFFIXES)} or .index.json")
        elif key is not None:
            raise ValueError(f"key chooses in PyTorch's files, but {file.name} is a safetensors file; leave it out")
        else:
            tensors += MappedFile(file).tensors
    return Checkpoint(path, files, tensors, contents)


class MappedFile:
    """A safetensors file whose ``tensors`` are views of the file, in its order."""

    def __init__(self, path: Path, *, writable: bool = False) -> None:
        with needs("a safetensors file", "safetensors", "cli"):
            from safetensors import SafetensorError, safe_open
        try:
            with safe_open(path, framework="np") as file:  # checks that the header is sound and covers the file
                strings = file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
        if "torch_sap" in strings:
            advice = "load it with load_sparse, and save the state_dict of torch_sap.remove(model)"
            raise ValueError(f"{path} was written by save_sparse: {advice}")
        with open(path, "r+b" if writable else "rb") as file:
            # shared: a private map of a file that is larger than memory may be refused
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
        start = 8 + int.from_bytes(self._map[:8], "little")
        header = json.loads(self._map[8:start])
        header.pop("__metadata__", None)
        self._copies: list[tuple[Tensor, Tensor]] = []
        self.tensors = [
            Stored(name, tuple(found["shape"]), found["dtype"], self._tensor(start, **found), path)
            for name, found in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        ]

    def _tensor(self, start: int, dtype: str, shape: list[int], data_offsets: list[int]) -> Tensor | None:
        kind, offset = SAFETENSORS_TYPES.get(dtype), start + data_offsets[0]
        if kind is None:
            return None
        if 0 in shape:
            return torch.empty(shape, dtype=kind, device="cpu")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable")
            size = data_offsets[1] - data_offsets[0]
            there = torch.frombuffer(self._map, dtype=torch.uint8, count=size, offset=offset)
        if offset % kind.itemsize == 0:
            return there.view(kind).view(shape)
        copy = there.clone()  # the format does not align tensors, and PyTorch needs them aligned
        self._copies.append((copy, there))
        return copy.view(kind).view(shape)

    def flush(self) -> None:
        """Write the changes of a writable map to the file."""
        for copy, there in self._copies:
            there.copy_(copy)
        self._map.flush()


def _load(path: Path) -> Any:
    """Load a PyTorch file, mapped privately: writes to its tensors stay in memory."""
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        advice = "save model.state_dict() and name that file"
        raise ValueError(f"{path} holds other objects than tensors, or is damaged; {advice}") from error
    except Exception as error:  # damaged files make torch.load raise nearly anything
        raise ValueError(f"{path} is not a file of torch.save: {type(error).__name__}: {error}") from error
    if not is_zip:
        raise ValueError(f"{path} has the format of before PyTorch 1.6; torch.save(torch.load(path), path) renews it")
    return content


def _choose(content: Any, path: Path, key: str | None) -> dict[str, Tensor]:
    """The tensors of the state_dict in a file: the content itself, or the value of one of its keys."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold a dictionary of tensors, got {type(content).__name__}")
    inside = {str(name): _tensors(value) for name, value in content.items() if isinstance(value, Mapping)}
    known = {name: tensors for name, tensors in inside.items() if _has_weights(tensors)}
    own = _tensors(content)
    if key is not None:
        if key not in known:
            if not known:
                what = "is a state_dict itself" if _has_weights(own) else "holds no state_dict"
                raise ValueError(
                    f"key chooses among several state_dicts, but {path} {what}; leave it out, got key={key!r}"
                )
            names = ", ".join(map(repr, sorted(known)))
            raise ValueError(f"key must name a state_dict of {path}, one of {names}, got key={key!r}")
        return known[key]
    if _has_weights(own) or not known:
        return own
    if len(known) > 1:
        raise ValueError(f"{path} holds several state_dicts, choose one with --key: {', '.join(known)}")
    return next(iter(known.values()))


def _tensors(values: Mapping[Any, Any]) -> dict[str, Tensor]:
    tensors = {name: value for name, value in values.items() if isinstance(name, str) and isinstance(value, Tensor)}
    return {name: tensor.detach() for name, tensor in tensors.items() if tensor.layout is torch.strided}


def _has_weights(tensors: Mapping[str, Tensor]) -> bool:
    return any(isinstance(kind_on_disk(name, tuple(tensor.shape)), Axes) for name, tensor in tensors.items())


def prune_checkpoint(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    scope: Scope,
    rule: Hyperparameters,
    *,
    exclude: Patterns = (),
    include: Patterns = (),
    key: str | None = None,
    overwrite: bool = False,
    advance: Callable[[int, int], object] | None = None,
) -> PruningReport:
    """Prune the weights of a checkpoint by SAP, once, and write a checkpoint of the same format.

    The result equals that of the scope's whole-model function on the same weights in memory, in the file's order.
    Lookup tables are known by their names. Output channels are dimension 0, unless a config.json of transformers beside
    the file says that its kind of model stores some weights otherwise: a file does not tell which weights belong to
    transposed convolutions. ``out``
    is a folder if ``path`` is a folder or an index; ``key`` names one of several state_dicts. Several files are pruned
    together, and none is renamed before all are complete. What else belongs to the model in a folder is copied
    (:func:`torch_sap.files.folder.companions`). ``advance`` is called with the work done since the last call, and
    with the total: entries to measure and to write.

    Raises:
        OSError: if a file cannot be read or written.
        ValueError: if a weight is NaN or infinite, there is none, or a file is damaged.
        TypeError: if a weight is not of a real floating-point type.
            Existing files are unchanged if anything is raised, and nothing new is left.
    """
    checkpoint, out = open_checkpoint(path, key), Path(out)
    weights, left_out = checkpoint.weights(exclude, include)
    targets = _targets(checkpoint, out, overwrite)
    with contextlib.ExitStack() as undo:
        if checkpoint.is_folder:
            for folder in _missing_folders(targets.values()):
                folder.mkdir()
                undo.callback(folder.rmdir)
        with replacing(*targets.values()) as temporary:
            copies = dict(zip(targets, temporary, strict=True))
            for source, copy in copies.items():
                if source not in checkpoint.contents:
                    shutil.copyfile(source, copy)
            mapped = {one.path for one in checkpoint.tensors} - checkpoint.contents.keys()
            maps = {source: MappedFile(Path(copies[source]), writable=True) for source in mapped}
            in_copy = {(source, one.name): one for source, file in maps.items() for one in file.tensors}
            entries = [in_copy.get((one.path, one.name), one)._replace(axes=one.axes).entry() for one in weights]
            work = 2 * sum(entry.scores.numel() for entry in entries)
            counted = None if advance is None else lambda done: advance(done, work)
            groups, sums, remaining = zero_step(entries, scope, rule, counted)
            for file in maps.values():
                file.flush()
            for source, copy in copies.items():
                if source in checkpoint.contents:
                    save(checkpoint.contents[source], copy)
                shutil.copymode(source, copy)
        undo.pop_all()
    counts = zip(entries, remaining, strict=True)
    records = tuple(TensorRecord(entry.name, entry.shape, left, entry.scores.numel()) for entry, left in counts)
    left_out += [LeftOut(entry.name, entry.shape, ZERO) for entry in entries if entry.name in sums.zero]
    return PruningReport(scope, rule.to_dict(), groups, records, left_out)


def _targets(checkpoint: Checkpoint, out: Path, overwrite: bool) -> dict[Path, Path]:
    """The file to write for each file of a checkpoint, and for each that is copied."""
    targets = {source: out / source.name if checkpoint.is_folder else out for source in checkpoint.files}
    targets |= {checkpoint.path / name: out / name for name in companions(checkpoint.path, out).copied}
    if not checkpoint.is_folder and out.suffix != checkpoint.path.suffix:
        raise ValueError(f"out must end in {checkpoint.path.suffix}, as the input does, got {out}")
    for target in targets.values():
        if target.is_dir():
            raise IsADirectoryError(f"{target} is a folder; name a file to write")
        if target.exists() and not overwrite:
            raise FileExistsError(f"{target} exists; choose another name, or overwrite it by --overwrite")
    return targets


def _missing_folders(targets: Iterable[Path]) -> list[Path]:
    """The folders that do not exist yet, outer ones first."""
    parents = {folder for target in targets for folder in target.parents if not folder.exists()}
    return sorted(parents, key=lambda folder: len(folder.parts))
