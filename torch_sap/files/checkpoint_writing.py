"""Writing checkpoint files piece by piece, by a thread of its own while the next pieces are read and worked on."""

from __future__ import annotations

import errno
import os
import shutil
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from torch_sap.files.checkpoint_reading import PIECE, read_into
from torch_sap.files.checkpoint_zip import renew_checksums
from torch_sap.files.page_cache import forget, is_too_large, memory_like, open_past_cache, whole_blocks
from torch_sap.files.weights import Checkpoint, StoredTensor

WAITING = 2**26
"""Bytes at most that wait to be written, or one piece: the thread is to have the next one at hand, and memory to be
free."""

UNDER_WAY = 2**28
"""Bytes that the disk may still be busy with."""


class Output:
    """The files of a new checkpoint, under other names until all of them are complete.

    Args:
        checkpoint: Whose files are written anew, byte for byte in the same places.
        out: The file to write; a folder if the checkpoint is one or has an index.
        overwrite: Whether files that exist are replaced.

    Raises:
        OSError: if there is such a file and it is not to be replaced, or it is a folder.
        ValueError: if the name ends otherwise than that of the checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint, out: Path, overwrite: bool) -> None:
        self.checkpoint, self.out = checkpoint, out
        self.in_folder = checkpoint.index is not None or checkpoint.path.is_dir()
        sources = [*checkpoint.files, *([checkpoint.index] if checkpoint.index is not None else [])]
        self.targets = {source: out / source.name if self.in_folder else out for source in sources}
        if not self.in_folder and out.suffix != checkpoint.path.suffix:
            raise ValueError(f"out must end in {checkpoint.path.suffix}, as what is pruned does, got {out}")
        for target in self.targets.values():
            if target.is_dir():
                raise IsADirectoryError(f"{target} is a folder; name a file to write")
            if target.exists() and not overwrite:
                raise FileExistsError(f"{target} exists; choose another name, or overwrite it by --overwrite")
        self.parts = {source: target.with_name(f".{target.name}.part") for source, target in self.targets.items()}
        self.is_too_large = is_too_large(sum(source.stat().st_size for source in checkpoint.files))
        self.made_folder = self.in_folder and not out.exists()
        self.files: dict[Path, BinaryIO] = {}
        self.past_cache: dict[Path, BinaryIO] = {}
        self.stack = ExitStack()
        self.written: deque[tuple[int, Future[None]]] = deque()

    def __enter__(self) -> Output:
        if self.made_folder:
            self.out.mkdir(parents=True)
        try:
            for source in self.checkpoint.files:
                self.files[source] = self.stack.enter_context(open(self.parts[source], "w+b", buffering=0))
                _reserve(self.files[source], source.stat().st_size)
                if self.is_too_large and (direct := open_past_cache(self.parts[source], "r+b")) is not None:
                    self.past_cache[source] = self.stack.enter_context(direct)
            # entered last: it has come to its end when the files are closed
            self.writer = self.stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="torch_sap_write"))
        except BaseException:
            self._clear()
            raise
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self._clear()

    def _clear(self) -> None:
        for _, future in self.written:
            future.cancel()
        self.stack.close()
        for part in self.parts.values():
            part.unlink(missing_ok=True)
        if self.made_folder:
            self.out.rmdir()

    def copy_all_but(self, weights: Sequence[StoredTensor]) -> None:
        """Write what lies between the weights."""
        for source in self.checkpoint.files:
            spans = sorted((t.offset, t.offset + t.nbytes) for t in weights if t.path == source)
            size = source.stat().st_size
            with open(source, "rb", buffering=0) as file:
                starts = [0, *(end for _, end in spans)]
                ends = [*(start for start, _ in spans), size]
                for start, end in zip(starts, ends, strict=True):
                    for offset in range(start, end, PIECE):
                        memory, _ = memory_like(offset, min(PIECE, end - offset))
                        read_into(file, offset, memory, source)
                        self.write(source, offset, memory)

    def write(self, source: Path, offset: int, memory: NDArray[np.uint8]) -> None:
        """Have bytes written at the place where the source has them; they must not change any more.

        An error is raised by one of the next calls, or by :meth:`finish`.
        """
        while self.written and sum(length for length, _ in self.written) + len(memory) > WAITING:
            self._await_one()
        files = self.files[source], self.past_cache.get(source)
        work = self.writer.submit(_write, *files, offset, memory, self.is_too_large)
        self.written.append((len(memory), work))

    def _await_one(self) -> None:
        _, future = self.written.popleft()
        future.result()

    def finish(self, weights: Sequence[StoredTensor]) -> None:
        """Make the files complete, and give them their names."""
        while self.written:
            self._await_one()
        for source, file in self.files.items():
            if source.suffix != ".safetensors":
                renew_checksums(file, [(t.offset, t.nbytes) for t in weights if t.path == source])
            os.fsync(file.fileno())
        self.stack.close()
        for source, part in self.parts.items():
            if source not in self.files:
                shutil.copyfile(source, part)
            shutil.copymode(source, part)
        for source, part in self.parts.items():
            os.replace(part, self.targets[source])


def _reserve(file: BinaryIO, size: int) -> None:
    """Take the room on the disk at once, where the system can: ext4 writes several times faster then.

    A disk that is too full is noticed before the work, too.
    """
    if not hasattr(os, "posix_fallocate") or not size:
        return
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(error.errno, f"{error.strerror}; {size} bytes are needed", file.name) from error


def _write(file: BinaryIO, past_cache: BinaryIO | None, offset: int, memory: NDArray[np.uint8], forgets: bool) -> None:
    """Write bytes: past the page cache if there is a file for that, or else so that the wait at the end is short."""
    if past_cache is not None and _write_past_cache(past_cache, file, offset, memory):
        return
    _write_all(file, offset, memory)
    forget(file, offset, len(memory))  # lets the system begin to bring them to the disk
    if forgets:  # of these the disk has those by now that were written some time ago
        forget(file, max(0, offset - UNDER_WAY), len(memory))


def _write_past_cache(past_cache: BinaryIO, file: BinaryIO, offset: int, memory: NDArray[np.uint8]) -> bool:
    """Write the whole blocks among bytes past the page cache, and the ends through it; whether that could be done."""
    blocks = whole_blocks(offset, memory)
    if blocks.start >= blocks.stop:
        return False
    try:
        _write_all(past_cache, offset + blocks.start, memory[blocks])
    except OSError as error:
        if error.errno == errno.EINVAL:  # a disk with other blocks
            return False
        raise
    _write_all(file, offset, memory[: blocks.start])
    _write_all(file, offset + blocks.stop, memory[blocks.stop :])
    return True


def _write_all(file: BinaryIO, offset: int, memory: NDArray[np.uint8]) -> None:
    file.seek(offset)
    view = memory.data
    while len(view):
        view = view[file.write(view) :]
