"""Write and read the file that a run resumes from: plain values and tensors, with checksums.

``torch.save`` writes it, a zip archive with a checksum per part. ``torch.load(weights_only=True)`` reads it, which
runs no code from the file. PyTorch does not compare the checksums, so that is done here: otherwise a flipped bit in a
weight would go unnoticed.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import IO, Any

import torch
from torch import Tensor, nn

from torch_sap.arguments import some
from torch_sap.files.atomic import replacing

FORMAT = 1
"""Version of the contents. A file with another number is refused."""


def write(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically. If that raises, the old file is still there."""
    whole = {"format": FORMAT, **as_plain(state)}
    try:
        with replacing(path) as (temporary,):
            save(whole, temporary)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            error.errno,
            f"the checkpoint could not be written ({reason}); if there was one before, it is still there, and the run "
            "resumes from it when it is called again",
            os.fspath(path),
        ) from error


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what :func:`write` wrote; ValueError if it is damaged, or anything else."""
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"the checksum of its part {damaged} is wrong")
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            raise unreadable(path, "it holds more than plain values and tensors, which could be code") from None
        except Exception as error:  # damaged files make zipfile and torch raise nearly anything
            text = str(error).strip() or type(error).__name__
            raise unreadable(path, text.splitlines()[0]) from None
    if not isinstance(state, dict) or "format" not in state:
        raise unreadable(path, "it is another file of PyTorch")
    if state["format"] != FORMAT:
        raise unreadable(path, f"it has format {state['format']!r}, this torch_sap reads format {FORMAT}")
    return state


def unreadable(path: str | os.PathLike[str], reason: str) -> ValueError:
    """The error for a file that is not a checkpoint."""
    return ValueError(
        f"checkpoint must be a file that torch_sap wrote, but {os.fspath(path)!r} is not or is damaged: {reason}. "
        "Nothing was loaded. Move it away to start over, or pass another path"
    )


def as_plain(value: Any, place: str = "") -> Any:
    """Convert mappings and Parameters to dicts and tensors; TypeError for anything that would need code to be read."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (Tensor, nn.Parameter, nn.Buffer):
        return value.detach()
    if isinstance(value, Mapping) and all(type(key) in (str, int) for key in value):
        plain = {key: as_plain(item, f"{place}[{key!r}]") for key, item in value.items()}
        return Counter(plain) if isinstance(value, Counter) else plain  # the milestones of a scheduler
    if type(value) in (list, tuple):
        return type(value)(as_plain(item, f"{place}[{number}]") for number, item in enumerate(value))
    raise TypeError(
        f"a checkpoint must hold plain values and tensors only, but {place or 'it'} is a {type(value).__name__}"
    )


def differences(here: Mapping[str, Any], there: Mapping[str, Any], source: str) -> str:
    """List the first few keys whose values differ, with both values; ``source`` says where the others were found."""
    own, other = dict(_flat(here)), dict(_flat(there))
    different = sorted(key for key in own.keys() | other.keys() if own.get(key) != other.get(key))
    return some(
        [f"{key}: {own.get(key, 'nothing')} here, {other.get(key, 'nothing')} {source}" for key in different], "; "
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", repr(value)


def save(value: Any, path: str | os.PathLike[str]) -> None:
    """Write a value by torch.save, with checksums even if the user has turned them off; OSError on a full disk."""
    serialization: Any = torch.serialization
    turned_off = hasattr(serialization, "get_crc32_options") and not serialization.get_crc32_options()
    if turned_off:
        serialization.set_crc32_options(True)
    try:
        with open(path, "wb") as file:
            writer = _Writer(file)
            torch.save(value, writer)  # type: ignore[arg-type]
            if writer.error is not None:
                raise writer.error
    finally:
        if turned_off:
            serialization.set_crc32_options(False)


class _Writer:
    """A file for torch.save that does not raise inside PyTorch's C++ code, which would hide the reason."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        """Do nothing: the whole file is flushed once, at its end."""
