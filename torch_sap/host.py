"""How the host works through large tensors: pieces that fit the cache, a few threads, and memory that is used again."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import starmap
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

Result = TypeVar("Result")

_mine = threading.local()


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
    """What work gives for each piece, in order. On the host each of torch's number of threads takes some of the pieces.

    numpy lets go of the interpreter in its loops. One thread a piece is faster than torch's many threads for one small
    operation, which wait for each other when others use the cores.
    """
    threads = min(torch.get_num_threads(), len(pieces) // 4)
    if not on_host or threads < 2:
        return list(starmap(work, pieces))
    size = -(-len(pieces) // threads)
    parts = [pieces[start : start + size] for start in range(0, len(pieces), size)]
    with ThreadPoolExecutor(len(parts)) as pool:
        return [result for part in pool.map(lambda part: list(starmap(work, part)), parts) for result in part]
