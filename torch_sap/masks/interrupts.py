"""Changes of a model that must not end half-way, whatever comes in between.

What can fail is computed before. What is left is copies into memory that is there already, and an interrupt (Ctrl-C, or
the signal with which a cluster announces a preemption) that comes meanwhile waits until they are done.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)

_handlers: dict[int, Any] = {}
"""The handlers that wait, while interrupts are held back."""
_arrived: dict[int, Any] = {}
"""Signals that have come meanwhile, each with the frame that it came in."""


def complete(change: Callable[[], None]) -> None:
    """Make a change to its end. Should it raise something, it is made once more, and then the error is raised.

    Args:
        change: Only copies values to where they belong, so that making it twice is the same as making it once.

    Raises:
        Whatever the change raises; it is complete then, unless it fails twice.
    """
    with held_back():
        try:
            change()
        except BaseException:
            change()
            raise


@contextmanager
def held_back() -> Iterator[None]:
    """Let interrupts wait until the end of the block. Only the main thread gets any."""
    if _handlers or threading.current_thread() is not threading.main_thread():
        yield
        return
    _hold(SIGNALS)
    try:
        yield
    finally:
        _let_go()


@contextmanager
def allowed() -> Iterator[None]:
    """Let interrupts come, inside a block that holds them back; elsewhere as ever."""
    if not _handlers or threading.current_thread() is not threading.main_thread():
        yield
        return
    held = list(_handlers)
    try:
        _let_go()
        yield
    finally:
        _hold(held)


def _hold(numbers: Iterable[int]) -> None:
    for number in numbers:
        handler = signal.getsignal(number)
        if callable(handler):  # not the system's own, which end the process or do nothing
            _handlers[number] = handler
            signal.signal(number, _arrived.__setitem__)


def _let_go() -> None:
    if _handlers:
        number, handler = _handlers.popitem()
        try:
            signal.signal(number, handler)
            if number in _arrived:
                handler(number, _arrived.pop(number))
        finally:  # for the others, if this one has raised KeyboardInterrupt
            _let_go()
