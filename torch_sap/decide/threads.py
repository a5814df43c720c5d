"""Threads that work through pieces of large tensors on the CPU, and their scratch memory."""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import starmap
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

Result = TypeVar("Result")

_mine = threading.local()


def _new_helpers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="torch_sap")


_helpers = _new_helpers()
"""Started when they are first needed and kept: starting a thread costs more than most pieces."""


def _replace_helpers() -> None:
    global _helpers
    _helpers = _new_helpers()


if hasattr(os, "register_at_fork"):  # a child has the executor, but not its threads
    os.register_at_fork(after_in_child=_replace_helpers)


def scratch(name: str, shape: Sequence[int], dtype: Any) -> NDArray[Any]:
    """Return an array of this thread that the next call with the same name overwrites.

    New memory for every piece would cost more than the work on it: the system has to clear its pages each time.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = vars(_mine).get(name)
    if memory is None or len(memory) < size:
        memory = vars(_mine)[name] = np.empty(size, np.uint8)
    array: NDArray[Any] = memory[:size].view(dtype).reshape(shape)
    return array


def map_pieces(work: Callable[..., Result], pieces: Sequence[tuple[Any, ...]]) -> list[Result]:
    """Call ``work(*piece)`` for each piece, with as many threads as PyTorch uses, and return the results in order.

    NumPy releases the GIL; one thread per piece beats the intra-op threads of PyTorch, which wait for each other after
    every small operation.
    """
    threads = min(torch.get_num_threads(), len(pieces))
    if threads < 2 or getattr(_mine, "busy", False):
        return list(starmap(work, pieces))
    results: list[Any] = [None] * len(pieces)
    waiting = deque(range(len(pieces)))

    def take_pieces() -> None:
        _mine.busy = True
        try:
            while waiting:
                try:
                    number = waiting.popleft()
                except IndexError:  # another thread took the last one
                    break
                results[number] = work(*pieces[number])
        finally:
            _mine.busy = False

    helping = [_helpers.submit(take_pieces) for _ in range(threads - 1)]
    try:
        take_pieces()
    finally:
        waiting.clear()
        for helper in helping:
            if not helper.cancel():  # one that has not begun yet may wait for this very thread, if maps are nested
                helper.result()
    return results
