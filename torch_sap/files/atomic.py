"""Write files atomically: each path leads to the whole old file or to the whole new one."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import secrets
from collections.abc import Iterator


@contextlib.contextmanager
def replacing(*paths: str | os.PathLike[str]) -> Iterator[list[str]]:
    """Create an empty temporary file beside each path, and rename all of them into place once all are complete.

    They are flushed to the disk before the first is renamed, and deleted if anything is raised. Temporary files of
    killed processes are deleted too.
    """
    targets = [os.path.realpath(path) for path in paths]  # a link stays a link
    temporary = [f"{target}.{os.getpid()}-{secrets.token_hex(4)}.tmp" for target in targets]
    try:
        for target, new in zip(targets, temporary, strict=True):
            for left in glob.glob(f"{glob.escape(target)}.*-????????.tmp"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(left)
            with open(new, "xb"):
                pass
        yield temporary
        for new in temporary:
            _sync(new, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
        for target, new in zip(targets, temporary, strict=True):
            os.replace(new, target)
        if os.name == "posix":  # other systems cannot sync folders
            for folder in {os.path.dirname(target) for target in targets}:
                _sync(folder, os.O_RDONLY)
    finally:
        for new in temporary:
            with contextlib.suppress(OSError):
                os.unlink(new)


def _sync(path: str, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # not every file system can
            raise
    finally:
        os.close(descriptor)
