"""The file that a run is resumed from: plain values and tensors, written so that the last good one is never lost.

The file is what ``torch.save`` writes, a zip archive with a checksum for each part. It is read by
``torch.load(weights_only=True)``, which builds plain values and tensors and calls nothing that the file names.
PyTorch does not compare the checksums, so they are compared here: a flipped bit in a weight would pass otherwise.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import pickle
import secrets
import zipfile
from collections.abc import Iterator, Mapping
from typing import IO, Any, BinaryIO

import torch
from torch import Tensor, nn

FORMAT = 1
"""Of what is in the file. Another number in a file is an error."""


def write(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write a checkpoint; whatever happens meanwhile, the path leads to the whole old file or to the whole new one.

    Args:
        path: File to write, in a folder that exists.
        state: Plain values and tensors by name, see :func:`as_plain`.

    Raises:
        TypeError: if the state holds something else than plain values and tensors; its place is named.
        OSError: if the file cannot be written (disk full, no permission). The old one is still there.
    """
    whole = {"format": FORMAT, **as_plain(state)}
    try:
        with replacing(path) as file:
            _save(whole, file)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            error.errno,
            f"the checkpoint could not be written ({reason}); if there was one before, it is still there, and the run "
            "goes on from it when it is called again",
            os.fspath(path),
        ) from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file that takes the place of another in one step when it is complete, and is gone if it never is.

    It is written beside the old one and forced to the disk before that. Temporary files that killed processes left
    are deleted.
    """
    target = os.path.realpath(path)  # a link stays a link
    _delete_temporary(target)
    temporary = f"{target}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_folder(os.path.dirname(target))
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what :func:`write` wrote. Nothing that the file holds is run.

    Raises:
        ValueError: if the file is damaged, or of another format, or holds more than plain values and tensors.
        OSError: if it cannot be opened.
    """
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
        except Exception as error:  # whatever zipfile and torch make of rubbish
            text = str(error).strip() or type(error).__name__
            raise unreadable(path, text.splitlines()[0]) from None
    if not isinstance(state, dict) or "format" not in state:
        raise unreadable(path, "it is another file of PyTorch")
    if state["format"] != FORMAT:
        raise unreadable(path, f"it has format {state['format']!r}, this torch_sap reads format {FORMAT}")
    return state


def unreadable(path: str | os.PathLike[str], reason: str) -> ValueError:
    """The error that says that a file is no checkpoint, why, and what to do."""
    return ValueError(
        f"checkpoint must be a file that torch_sap wrote, but {os.fspath(path)!r} is not or is damaged: {reason}. "
        "Nothing was loaded. Move it away to begin anew, or pass another path"
    )


def as_plain(value: Any, place: str = "") -> Any:
    """A value made of dicts, lists, tuples, strings, numbers, None and tensors only, so that reading it runs no code.

    Args:
        value: Mappings, lists, tuples and Parameters become dicts, lists, tuples and tensors.
        place: Where the value is, for the error.

    Raises:
        TypeError: if there is something else in it; its place is named.

    Example:
        >>> from torch_sap.files.checkpoint import as_plain
        >>> as_plain({"momentum": (0.9, None)})
        {'momentum': (0.9, None)}
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (Tensor, nn.Parameter, nn.Buffer):
        return value.detach()
    if isinstance(value, Mapping) and all(type(key) in (str, int) for key in value):
        return {key: as_plain(item, f"{place}[{key!r}]") for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(as_plain(item, f"{place}[{number}]") for number, item in enumerate(value))
    raise TypeError(
        f"a checkpoint must hold plain values and tensors only, but {place or 'it'} is a {type(value).__name__}"
    )


def differences(here: Mapping[str, Any], there: Mapping[str, Any], source: str) -> str:
    """All keys whose values differ, nested keys joined by dots, with both values; empty if none does.

    Args:
        here: What is asked for now.
        there: What there is.
        source: Where: "in the file".

    Example:
        >>> from torch_sap.files.checkpoint import differences
        >>> differences({"p": 0.5, "tensors": {"0": [3]}}, {"p": 0.2, "tensors": {}}, "in the file")
        'p: 0.5 here, 0.2 in the file; tensors.0: [3] here, nothing in the file'
    """
    own, other = dict(_flat(here)), dict(_flat(there))
    different = sorted(key for key in own.keys() | other.keys() if own.get(key) != other.get(key))
    return "; ".join(
        f"{key}: {own.get(key, 'nothing')} here, {other.get(key, 'nothing')} {source}" for key in different
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", repr(value)


class _Writer:
    """A file for torch.save that does not raise inside its C++ code, which would say less of the reason."""

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
        """Nothing: the whole file is flushed once, at its end."""


def _save(state: Mapping[str, Any], file: IO[bytes]) -> None:
    writer = _Writer(file)
    with _checksums():
        torch.save(state, writer)  # type: ignore[arg-type]
    if writer.error is not None:
        raise writer.error


@contextlib.contextmanager
def _checksums() -> Iterator[None]:
    """Let torch.save write checksums that can be compared, also if the user has turned them off to save time."""
    serialization: Any = torch.serialization
    if not hasattr(serialization, "get_crc32_options") or serialization.get_crc32_options():
        yield
        return
    serialization.set_crc32_options(True)
    try:
        yield
    finally:
        serialization.set_crc32_options(False)


def _delete_temporary(target: str) -> None:
    for left in glob.glob(f"{glob.escape(target)}.*-????????.tmp"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(left)


def _sync_folder(folder: str) -> None:
    """Let the new name survive a loss of power, where a folder can be opened and the file system knows it."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)
