"""Show on stderr that a command is at work, where a person looks on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

from torch_sap.cli.tables import shortened

AFTER = 0.5
"""Seconds before anything is shown, and between two updates: a short command stays silent."""

WITH_TOTAL = "{desc}: {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left"


@contextmanager
def progress(text: str, total: int | None = None) -> Iterator[Callable[..., object]]:
    """Show a text with the seconds so far, and with a bar and the time left once a total is known.

    The block gets a function to call with what has been done since the last call, and with the total if that was not
    known before. Nothing is shown unless stderr is a terminal and tqdm is installed.
    """
    bar = _bar(text, total) if sys.stderr.isatty() else None
    if bar is None:
        yield lambda done, total=None: None
        return
    ended = Event()

    def refresh() -> None:
        while not ended.wait(AFTER):
            bar.refresh()

    def advance(done: int, total: int | None = None) -> None:
        if total is not None and bar.total is None:
            bar.total, bar.bar_format = total, WITH_TOTAL
        bar.update(done)

    thread = Thread(target=refresh, daemon=True)
    thread.start()
    try:
        yield advance
    finally:
        ended.set()
        thread.join()
        bar.close()


def _bar(text: str, total: int | None) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    form = "{desc}: {elapsed}" if total is None else WITH_TOTAL
    return tqdm(total=total, desc=shortened(text, 40), delay=AFTER, leave=False, bar_format=form, dynamic_ncols=True)
