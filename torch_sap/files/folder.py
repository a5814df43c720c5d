"""A model's folder: which of its files are the checkpoint, and which others belong to the model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)

OTHER_WEIGHTS = (
    *(".h5", ".msgpack", ".ot", ".onnx", ".onnx_data", ".gguf", ".ggml", ".tflite", ".pb", ".npz"),
    ".index.json",
)
"""How the names of weights in formats that cannot be pruned here end, and those of indices of several files."""


def checkpoint_files(path: Path) -> list[Path]:
    """The files with tensors that a file, an index or a folder stands for, in order of name, then the index if any."""
    found = _in_folder(path) if path.is_dir() else path
    return [*_files_of_index(found), found] if found.name.endswith(".index.json") else [found]


def _in_folder(folder: Path) -> Path:
    """The one checkpoint of a folder: an index, or else a file."""
    for pattern in ("*.safetensors.index.json", "*.index.json", *(f"*{suffix}" for suffix in SUFFIXES)):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise ValueError(f"{folder} holds several checkpoints, name one: {', '.join(p.name for p in found)}")
        if found:
            return found[0]
    raise ValueError(f"{folder} holds no checkpoint: no *.index.json, no {', '.join('*' + s for s in SUFFIXES)}")


def _files_of_index(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        plain = all(Path(name).name == name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} must be an index with a weight_map from tensors to files: {error!r}") from error
    if not plain or not names:
        raise ValueError(f"{index} must name files of its own folder, got {sorted(names)}")
    return [index.parent / name for name in sorted(names)]


@dataclass(frozen=True)
class Companions:
    """What lies beside a checkpoint in a model's folder, as paths relative to it, in order of name."""

    copied: tuple[str, ...] = ()
    """Files that belong to the model: configuration, tokenizer, code, model card."""
    left_out: tuple[str, ...] = ()
    """Files and folders with other weights, which would be dense beside the pruned ones."""


def companions(path: Path, out: Path) -> Companions:
    """Find what to copy beside a pruned checkpoint; nothing unless the path is a folder other than ``out``.

    A subfolder is copied whole unless it has weights: those of the same model in another format or of another time
    (``onnx``, ``checkpoint-500``). The modules of a sentence-transformers model (``modules.json``) are copied. Hidden
    files and folders are neither copied nor named.
    """
    if not path.is_dir() or path.resolve() == out.resolve():
        return Companions()
    own, modules = set(checkpoint_files(path)), _modules(path)
    copied: list[Path] = []
    left_out: list[str] = []
    for found in sorted(path.iterdir()):
        if found in own or _is_hidden(found) or found.resolve() == out.resolve():
            continue
        inside = sorted(file for file in found.rglob("*") if file.is_file()) if found.is_dir() else [found]
        inside = [file for file in inside if not any(map(_is_hidden, map(Path, file.relative_to(path).parts)))]
        inside = [file for file in inside if not file.resolve().is_relative_to(out.resolve())]
        if found.name not in modules and any(file.name.endswith(SUFFIXES + OTHER_WEIGHTS) for file in inside):
            left_out.append(found.name + "/" * found.is_dir())
        else:
            copied += [file for file in inside if file.is_file()]
    return Companions(tuple(file.relative_to(path).as_posix() for file in copied), tuple(left_out))


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name.endswith(".tmp")


def _modules(folder: Path) -> set[str]:
    """The subfolders that a sentence-transformers model has modules in."""
    try:
        listed = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        return {Path(module["path"]).parts[0] for module in listed if module["path"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()
