"""What the system keeps in memory of files that are too large for that.

A file that is read or written through once takes the whole page cache, pushes out what other programs have in it, and
is pushed out itself before it is read again. Giving the pages back at once costs nothing; where memory is lent (in
virtual machines) it is several times faster than taking new ones. Hints to the system only, where it knows them.
"""

from __future__ import annotations

import os
from typing import BinaryIO

SHARE = 4
"""A file of more than the memory divided by this is not kept: to be of use it, and what is made of it, would have to
stay there beside all else."""


def is_too_large(length: int) -> bool:
    """Whether so many bytes, read or written in a row, should not stay in memory."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return False
    return length * SHARE > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def forget(file: BinaryIO, offset: int, length: int) -> None:
    """Give back the pages of a part of a file; those that the disk does not have yet are brought to it instead."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), offset, length, os.POSIX_FADV_DONTNEED)
