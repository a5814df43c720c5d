"""Replicas: find the processes with copies of the same weights, and check that they prune alike."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torch_sap.distributed.sharded import is_dtensor

_CHUNK = 2**20
_MULTIPLIERS = (-7046029254386353131, -4658895280553007687)  # odd 64-bit numbers of splitmix64
_ALL_ONES = -1


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel; any other module itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def wrapper_of(model: nn.Module) -> nn.Module:
    """Find the DistributedDataParallel that wraps a module, also one made later; without one, return the module.

    A module does not know who holds it, so all objects are searched: some tenths of a second, and only where there are
    several processes. Garbage is collected first: what the processes agree on must not depend on when each does so.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if isinstance(model, DistributedDataParallel) or not distributed:
        return model
    gc.collect()
    for found in gc.get_objects():
        if issubclass(type(found), DistributedDataParallel):  # isinstance runs code of lazy objects
            wrapper: DistributedDataParallel = found
            if any(module is model for module in wrapper.modules()):
                return wrapper
    return model


def groups_of_copies(model: object, weights: Iterable[Tensor]) -> list[Any]:
    """Process groups whose members are known to have the same values and to make the same calls.

    Those of DistributedDataParallel, and those along which DTensors are replicated. Of plain tensors nothing is known:
    a program may prune them on one process only.
    """
    groups = [model.process_group] if isinstance(model, DistributedDataParallel) else []
    for weight in weights:
        if is_dtensor(weight):
            copied = [i for i, placement in enumerate(weight.placements) if placement.is_replicate()]
            groups += [weight.device_mesh.get_group(i) for i in copied if weight.device_mesh.size(i) > 1]
    return list({tuple(torch.distributed.get_process_group_ranks(group)): group for group in groups}.values())


def check_agreement(masks: Sequence[Tensor | None], groups: Iterable[Any], home: torch.device) -> None:
    """Compare a checksum of the masks with the other processes of each group.

    Raises:
        RuntimeError: on every process, if they differ.
    """
    for group in groups:
        if not _are_equal(masks, group, home):
            raise RuntimeError(
                "the processes would prune different entries, so their weights differ; nothing was pruned. Check that "
                "every process starts from the same weights (same seed, or broadcast them; DistributedDataParallel "
                "does when it is made), trains the same parameters and passes the same arguments"
            )


def share(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give every process the values of the first one, in place, as DistributedDataParallel gave it the weights.

    A state that was copied before the model was wrapped may differ between processes. Without DistributedDataParallel
    (see :func:`wrapper_of`) nothing is changed.
    """
    if isinstance(model, DistributedDataParallel) and state:
        group, tensors = model.process_group, list(state.values())
        if not _are_equal(tensors, group, next(model.parameters()).device):
            first = torch.distributed.get_global_rank(group, 0)
            for tensor in tensors:
                sent = tensor.contiguous()
                torch.distributed.broadcast(sent.reshape(-1).view(torch.uint8), first, group=group)
                tensor.copy_(sent)


def add_up(model: nn.Module, tensors: Iterable[Tensor]) -> None:
    """Add up tensors of the processes that hold copies of a model, in place (see :func:`wrapper_of`)."""
    if isinstance(model, DistributedDataParallel):
        for tensor in tensors:
            torch.distributed.all_reduce(tensor, group=model.process_group)


def _are_equal(tensors: Sequence[Tensor | None], group: Any, home: torch.device) -> bool:
    """Whether all processes of a group have the same tensors."""
    found = _checksum(tensors, home)
    largest = torch.stack([found, found ^ _ALL_ONES])
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=group)
    return bool(largest[0] == largest[1] ^ _ALL_ONES)


def _checksum(tensors: Sequence[Tensor | None], home: torch.device) -> Tensor:
    """64-bit checksum of the bytes of the tensors and of their order."""
    total = torch.zeros((), dtype=torch.int64, device=home)
    for number, tensor in enumerate(tensors):
        if tensor is not None:
            flat = tensor.reshape(-1).view(torch.uint8)
            flat = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(torch.int64)
            for start in range(0, len(flat), _CHUNK):
                words = flat[start : start + _CHUNK]
                place = torch.arange(start + 1, start + 1 + len(words), device=words.device)
                mixed = (words + place * _MULTIPLIERS[0]) * _MULTIPLIERS[1]
                mixed = (mixed ^ (mixed >> 29)) * _MULTIPLIERS[0]
                total = total + (mixed ^ (mixed >> 32)).sum().to(home) * (2 * number + 1)
    return total
