"""How the host works through large tensors: pieces that fit the cache, a few threads, and memory that is used again."""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import starmap
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

Result = TypeVar("Result")

_mine = threading.local()


def _new_helpers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="torch_sap")


_helpers = _new_helpers()
"""The threads that help, started when they are first needed and kept: starting one costs more than most pieces."""


def _start_anew() -> None:
    global _helpers
    _helpers = _new_helpers()


if hasattr(os, "register_at_fork"):  # a child has the executor, but not its threads
    os.register_at_fork(after_in_child=_start_anew)


def scratch(name: str, shape: Sequence[int], dtype: Any) -> NDArray[Any]:
    """An array of this thread that is overwritten by the next call with the same name.

    New memory for every piece would cost more than the work on it: the system has to clear its pages each time.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = vars(_mine).get(name)
    if memory is None or len(memory) < size:
        memory = vars(_mine)[name] = np.empty(size, np.uint8)
    array: NDArray[Any] = memory[:size].view(dtype).reshape(shape)
    return array


def map_pieces(work: Callable[..., Result], pieces: Sequence[tuple[Any, ...]], *, on_host: bool) -> list[Result]:
    """What work gives for each piece, in order. On the host torch's number of threads take pieces as they get on.

    numpy lets go of the interpreter in its loops. One thread a piece is faster than torch's many threads for one small
    operation, which wait for each other when others use the cores.
    """
    threads = min(torch.get_num_threads(), len(pieces))
    if not on_host or threads < 2 or getattr(_mine, "busy", False):
        return list(starmap(work, pieces))
    results: list[Any] = [None] * len(pieces)
    waiting = deque(range(len(pieces)))

    def take_pieces() -> None:
        _mine.busy = True
        while waiting:
            try:
                number = waiting.popleft()
            except IndexError:  # another thread took the last one
                break
            results[number] = work(*pieces[number])
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


class Job(NamedTuple):
    """Pieces that any thread may work on, in any order, and what is made of all that comes of them."""

    work: Callable[..., Any]
    pieces: Sequence[tuple[Any, ...]]
    gather: Callable[[list[Any]], Any]


def run_jobs(jobs: Sequence[Job], *, on_host: bool) -> list[Any]:
    """What each job gathers, with the pieces of all of them mapped together: no thread waits for the end of a job."""
    pieces = [(job.work, piece) for job in jobs for piece in job.pieces]
    results = iter(map_pieces(lambda work, piece: work(*piece), pieces, on_host=on_host))
    return [job.gather([next(results) for _ in job.pieces]) for job in jobs]
