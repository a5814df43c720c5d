"""The random state of a process, as plain values and tensors: PyTorch's on the CPU and on CUDA, NumPy's, Python's."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from torch_sap.records.codec import to_plain

_logger = logging.getLogger(__name__)


def random_state() -> dict[str, Any]:
    """Collect the state of all global generators.

    Returns:
        ``python``: version, 625 integers, next Gaussian; ``numpy``: as ``np.random.get_state(legacy=False)``;
        ``torch``: uint8 tensor; ``cuda``: one such tensor per device, none if CUDA is not in use.
    """
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "numpy": to_plain(np.random.get_state(legacy=False)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Set the generators to a :func:`random_state`.

    Where the number of CUDA devices differs, the devices that both have are set, and the log says so.
    """
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    devices = torch.cuda.device_count() if state["cuda"] else 0
    if devices != len(state["cuda"]):
        _logger.warning("random states of %d CUDA devices were saved, here are %d", len(state["cuda"]), devices)
    for device, saved in zip(range(devices), state["cuda"], strict=False):
        torch.cuda.set_rng_state(saved, device)
