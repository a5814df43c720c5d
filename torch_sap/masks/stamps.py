"""How it is known without reading a tensor that it still has its zeros: PyTorch counts the writes to it.

A write through ``tensor.data``, or by code that is not PyTorch's, is not counted. Such writes are whole-tensor copies
in practice, so on the host a few pruned entries are looked at too.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from torch_sap.decide.keys import INTEGER_OF

PROBES = 4
"""Pruned entries of a tensor that are looked at."""


class Stamp:
    """What some tensors were at one moment: their identity, memory and counts of writes."""

    __slots__ = ("_seen",)

    def __init__(self, *tensors: Tensor) -> None:
        self._seen = [(weakref.ref(t), t.data_ptr(), None if t.is_inference() else t._version) for t in tensors]

    def holds(self, *tensors: Tensor) -> bool:
        """Whether these are the same tensors, and nobody has written to them as far as PyTorch knows."""
        if len(tensors) != len(self._seen):
            return False
        for tensor, (seen, place, writes) in zip(tensors, self._seen, strict=True):  # any(...) takes twice the time
            if seen() is not tensor or writes is None or tensor._version != writes or tensor.data_ptr() != place:
                return False
        return True


class Probe:
    """A few pruned entries of a tensor on the host.

    Args:
        mask: Bool mask, False where pruned.
    """

    def __init__(self, mask: Tensor) -> None:
        self._stamp = Stamp(mask)
        flat = mask.reshape(-1).numpy()
        starts = [len(flat) * i // PROBES for i in range(PROBES)]
        found = [start + int(flat[start:].argmin()) for start in starts if start < len(flat)]  # the first False
        self._places = torch.tensor([place for place in found if not flat[place]], dtype=torch.int64)

    def fits(self, mask: Tensor) -> bool:
        """Whether this was made for the mask as it is."""
        return self._stamp.holds(mask)

    def finds_zeros(self, tensor: Tensor) -> bool:
        """Whether the entries are +0.0 in a tensor of the mask's shape.

        Without numpy, which would keep FSDP from freeing the memory of a tensor that it has shown.
        """
        bits = tensor.detach().view(INTEGER_OF[tensor.dtype]).take(self._places)
        return not any(bits.tolist())  # half the time of bits.any()
