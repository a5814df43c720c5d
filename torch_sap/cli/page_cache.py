"""What the system keeps in memory of files that are too large for that.

A file that is read or written through once takes the whole page cache, pushes out what other programs have in it, and
is pushed out itself before it is read again. Giving the pages back at once costs nothing; where memory is lent (in
virtual machines) it is several times faster than taking new ones. What is written need not go through the cache at all:
copying 12 GB into it takes eight seconds of the processor. All of this only where the system knows it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

SHARE = 4
"""A file of more than the memory divided by this is not kept: to be of use it, and what is made of it, would have to
stay there beside all else."""

BLOCK = 4096
"""What is written past the cache begins and ends at a multiple of it, in the file and in memory."""


def is_too_large(length: int) -> bool:
    """Whether so many bytes, read or written in a row, should not stay in memory."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return False
    return length * SHARE > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def forget(file: BinaryIO, offset: int, length: int) -> None:
    """Give back the pages of a part of a file; those that the disk does not have yet are brought to it instead."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), offset, length, os.POSIX_FADV_DONTNEED)


def memory_like(offset: int, length: int, size: int = 1) -> NDArray[np.uint8]:
    """New memory for a part of a file, cut by blocks as the part is, so that it can be written past the cache.

    Any memory where numbers of ``size`` bytes would not lie as the processor likes them.
    """
    if offset % size:
        return np.empty(length, np.uint8)
    memory = np.empty(length + BLOCK, np.uint8)
    start = (offset - memory.ctypes.data) % BLOCK
    return memory[start : start + length]


def open_past_cache(path: Path) -> BinaryIO | None:
    """A file, which exists, to write past the cache; None where the system or the disk has no such thing."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return open(path, "r+b", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_DIRECT))
    except OSError:
        return None


def whole_blocks(offset: int, memory: NDArray[np.uint8]) -> slice:
    """The part of memory that can be written past the cache to an offset; an empty one if the two are cut otherwise."""
    start = -offset % BLOCK
    end = start + max(0, len(memory) - start) // BLOCK * BLOCK
    return slice(start, end if (memory.ctypes.data + start) % BLOCK == 0 else start)
