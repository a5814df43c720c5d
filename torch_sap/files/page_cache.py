"""What the system keeps in memory of files that are too large for that.

A file that is read or written through once takes the whole page cache, pushes out what other programs have in it, and
is pushed out itself before it is read again. So such a file is read and written past the cache, where the system and
the disk can: copying 12 GB from it takes three seconds of the processor, and copying them into it eight. Otherwise the
pages are given back at once, which costs nothing; where memory is lent (in virtual machines) it is several times
faster than taking new ones.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

SHARE = 4
"""A file of more than the memory divided by this is not kept: to be of use it, and what is made of it, would have to
stay there beside all else."""

BLOCK = 4096
"""What is read or written past the cache begins and ends at a multiple of it, in the file and in memory."""


def is_too_large(length: int) -> bool:
    """Whether so many bytes, read or written in a row, should not stay in memory."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return False
    return length * SHARE > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def forget(file: BinaryIO, offset: int, length: int) -> None:
    """Give back the pages of a part of a file; those that the disk does not have yet are brought to it instead."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), offset, length, os.POSIX_FADV_DONTNEED)


def is_cached(path: Path) -> bool:
    """Whether the cache has a file already, judged by a few places."""
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    with open(path, "rb", buffering=0) as file:
        number, size = file.fileno(), path.stat().st_size
        try:
            return all(os.preadv(number, [bytearray(1)], size * i // 16, os.RWF_NOWAIT) for i in range(1, 16, 2))
        except OSError:
            return False


def open_past_cache(path: Path, mode: str) -> Any:
    """Open a file, which exists, past the cache; None where the system or the disk has no such thing."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return open(path, mode, buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_DIRECT))
    except OSError:
        return None


def memory_like(offset: int, length: int, size: int = 1) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """New memory for a part of a file, cut by blocks as the part is, and the memory of all blocks that it touches.

    Any memory, and none, where numbers of ``size`` bytes would not lie as the processor likes them.
    """
    if offset % size:
        return np.empty(length, np.uint8), np.empty(0, np.uint8)
    before = offset % BLOCK
    whole = -(-(before + length) // BLOCK) * BLOCK
    memory = np.empty(whole + BLOCK, np.uint8)
    blocks = memory[-memory.ctypes.data % BLOCK :][:whole]
    return blocks[before : before + length], blocks


def read_past_cache(path: Path, offset: int, length: int, blocks: NDArray[np.uint8]) -> bool:
    """Fill the memory of the blocks that a part of a file touches; whether the part has come as a whole."""
    file = open_past_cache(path, "rb") if len(blocks) else None
    if file is None:
        return False
    before = offset % BLOCK
    with file:
        file.seek(offset - before)
        try:
            return bool(file.readinto(blocks.data) >= before + length)
        except OSError as error:
            if error.errno == errno.EINVAL:  # a disk with other blocks
                return False
            raise


def whole_blocks(offset: int, memory: NDArray[np.uint8]) -> slice:
    """The part of memory that can be written past the cache to an offset; an empty one if the two are cut otherwise."""
    start = -offset % BLOCK
    end = start + max(0, len(memory) - start) // BLOCK * BLOCK
    return slice(start, end if (memory.ctypes.data + start) % BLOCK == 0 else start)
