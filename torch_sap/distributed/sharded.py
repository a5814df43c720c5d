"""Tensors that several processes hold together: where the local part lies, and the few exchanges that a step needs.

Sums, counts and small tables travel between the processes, weights do not. Nothing here is imported by a process that
has no DTensor: torch.distributed.tensor is looked up among the modules that are loaded already.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Float64 = NDArray[np.float64]


def is_dtensor(tensor: object) -> TypeGuard[Any]:
    """Whether this is a DTensor: a tensor of which every process of a mesh holds a part, or a copy."""
    if type(tensor) is Tensor or type(tensor) is torch.nn.Parameter:  # nearly all of them, in a third of the time
        return False
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a DTensor, sharing its memory; a plain tensor as it is."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()
        return part


def same_placement(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape lie on the processes in the same way, so that local parts fit together."""
    if not (is_dtensor(one) and is_dtensor(other)):
        return is_dtensor(one) == is_dtensor(other)
    return bool(one.device_mesh == other.device_mesh and one.placements == other.placements)


def wrap(part: Tensor, like: Tensor) -> Tensor:
    """The DTensor whose local part this is, placed like another one; a plain tensor if that is plain."""
    if not is_dtensor(like) or is_dtensor(part):
        return part
    whole: Tensor = type(like).from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return whole


def place(whole: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has whole, cut and placed like another one, without communication."""
    if not is_dtensor(like):
        return whole
    if is_dtensor(whole):
        moved: Tensor = whole.redistribute(like.device_mesh, like.placements)
        return moved
    from torch.distributed.tensor import distribute_tensor

    # each process cuts its part out by itself; PyTorch 2.5 cannot, and sends all parts from the first process
    alone = {"src_data_rank": None} if "src_data_rank" in signature(distribute_tensor).parameters else {}
    with torch.no_grad():
        return distribute_tensor(whole.detach(), like.device_mesh, like.placements, **alone)


@dataclass(frozen=True)
class Part:
    """Where a local tensor lies in a whole that is cut along one dimension.

    Attributes:
        mesh: The mesh of the whole (a DeviceMesh).
        mesh_dim: The dimension of the mesh whose processes hold the parts.
        dim: The dimension of the tensor that is cut, in pieces of equal size but for the last ones.
        shape: Shape of the whole.
    """

    mesh: Any
    mesh_dim: int
    dim: int
    shape: tuple[int, ...]

    @property
    def group(self) -> Any:
        """The process group of those that hold the parts."""
        return self.mesh.get_group(self.mesh_dim)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Those processes."""
        return tuple(torch.distributed.get_process_group_ranks(self.group))

    @property
    def rank(self) -> int:
        """The place of this process among them."""
        return int(self.mesh.get_local_rank(self.mesh_dim))

    def bounds(self, rank: int) -> tuple[int, int]:
        """Begin and end of a process's part in the dimension that is cut."""
        length = self.shape[self.dim]
        piece = -(-length // int(self.mesh.size(self.mesh_dim)))
        return min(length, piece * rank), min(length, piece * (rank + 1))

    def own(self, whole: Tensor) -> Tensor:
        """This process's part of a whole."""
        start, end = self.bounds(self.rank)
        return whole.narrow(self.dim, start, end - start)


def part_of(tensor: Tensor, name: str) -> Part | None:
    """Where the local part of a tensor lies, None if every process has all of it.

    Raises:
        NotImplementedError: if it is cut in another way than along one dimension over one dimension of the mesh.
    """
    if not is_dtensor(tensor):
        return None
    from torch.distributed.tensor import Shard

    mesh, placements = tensor.device_mesh, tensor.placements
    cut = [i for i, placement in enumerate(placements) if not placement.is_replicate() and mesh.size(i) > 1]
    if len(cut) > 1 or any(type(placements[i]) is not Shard for i in cut):
        raise NotImplementedError(
            f"{name} must be sharded along one dimension over one dimension of the device mesh to be pruned, "
            f"got placements {tuple(placements)}; prune it before it is sharded, or exclude it"
        )
    if not cut:
        return None
    return Part(mesh, cut[0], placements[cut[0]].dim % tensor.dim(), tuple(tensor.shape))


def common_part(parts: Sequence[Part | None]) -> Part | None:
    """A part that stands for the processes of all of them, None if nothing is cut.

    Raises:
        NotImplementedError: if the tensors are cut over different processes.
    """
    found = [part for part in parts if part is not None]
    if len({part.ranks for part in found}) > 1:
        raise NotImplementedError(
            "parameters of one group must be sharded over the same processes, "
            f"got {sorted({part.ranks for part in found})}; use scope 'layer' or 'neuron'"
        )
    return found[0] if found else None


def add_up(values: Tensor, part: Part) -> Tensor:
    """The sum of the processes' tensors, each of which has the same shape."""
    total = values.to(_device(part), copy=True)
    torch.distributed.all_reduce(total, group=part.group)
    return total.to(values.device)


def gather(tables: Sequence[Float64], part: Part) -> list[list[Float64]]:
    """The tables of all processes, in their order. Their last dimension may differ from process to process."""
    widths = _all_gather(torch.tensor([table.shape[-1] for table in tables]), part)
    heights = torch.tensor([math.prod(table.shape[:-1]) for table in tables])
    sizes = [(row * heights).tolist() for row in widths]
    padded = np.zeros(max(sum(row) for row in sizes))
    flat = np.concatenate([table.reshape(-1) for table in tables])
    padded[: len(flat)] = flat
    gathered = []
    received = _all_gather(torch.from_numpy(padded), part)
    for row, widths_here, values in zip(sizes, widths, received, strict=True):
        pieces = np.split(values.numpy(), np.cumsum(row))[:-1]
        gathered.append(
            [
                piece.reshape(*table.shape[:-1], width)
                for piece, table, width in zip(pieces, tables, widths_here.tolist(), strict=True)
            ]
        )
    return gathered


def gather_along(tensor: Tensor, part: Part) -> Tensor:
    """The whole of a tensor from its parts."""
    starts_ends = [part.bounds(rank) for rank in range(len(part.ranks))]
    longest = max(end - start for start, end in starts_ends)
    shape = list(tensor.shape)
    shape[part.dim] = longest
    padded = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    padded.narrow(part.dim, 0, tensor.shape[part.dim]).copy_(tensor)
    pieces = _all_gather(padded.view(torch.uint8) if padded.dtype is torch.bool else padded, part)
    cut = [piece.narrow(part.dim, 0, end - start) for piece, (start, end) in zip(pieces, starts_ends, strict=True)]
    return torch.cat(cut, part.dim).to(tensor.device).view(tensor.dtype)


def _all_gather(tensor: Tensor, part: Part) -> list[Tensor]:
    """The processes' tensors of one shape, on the device where this one is."""
    sent = tensor.to(_device(part)).contiguous()
    received = [torch.empty_like(sent) for _ in part.ranks]
    torch.distributed.all_gather(received, sent, group=part.group)
    return [piece.to(tensor.device) for piece in received]


def _device(part: Part) -> torch.device:
    """Where the group's backend communicates."""
    kind = str(part.mesh.device_type)
    return torch.device(kind, torch.get_device_module(kind).current_device()) if kind != "cpu" else torch.device(kind)
