"""DTensors: the local part, its place in the whole, and the few exchanges that a step needs.

Sums, counts and small tables travel between the processes, weights do not. Nothing here is imported by a process that
has no DTensor: torch.distributed.tensor is looked up among the modules that are loaded already.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from inspect import signature
from typing import Any, TypeGuard

import torch
from torch import Tensor


def is_dtensor(tensor: object) -> TypeGuard[Any]:
    """Whether this is a DTensor: a tensor of which every process of a mesh holds a part, or a copy."""
    if type(tensor) is Tensor or type(tensor) is torch.nn.Parameter:  # nearly all of them, in a third of the time
        return False
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Local part of a DTensor, sharing its memory; a plain tensor as it is."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()
        return part


def same_placement(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are placed alike, so that their local parts fit together."""
    if not (is_dtensor(one) and is_dtensor(other)):
        return is_dtensor(one) == is_dtensor(other)
    return bool(one.device_mesh == other.device_mesh and one.placements == other.placements)


def wrap(part: Tensor, like: Tensor) -> Tensor:
    """Make a DTensor of a local part, placed like another tensor; a plain tensor if that is plain."""
    if not is_dtensor(like) or is_dtensor(part):
        return part
    whole: Tensor = type(like).from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return whole


def place(whole: Tensor, like: Tensor) -> Tensor:
    """Shard a tensor that every process has whole like another one, without communication."""
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
class Part:  # a decide.groups.Shard
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
        """Process group of the mesh dimension."""
        return self.mesh.get_group(self.mesh_dim)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Global ranks of its processes."""
        return tuple(torch.distributed.get_process_group_ranks(self.group))

    @property
    def rank(self) -> int:
        """Rank of this process in the group."""
        return int(self.mesh.get_local_rank(self.mesh_dim))

    def bounds(self, rank: int) -> tuple[int, int]:
        """Begin and end of a process's part in the dimension that is cut."""
        length = self.shape[self.dim]
        piece = -(-length // int(self.mesh.size(self.mesh_dim)))
        return min(length, piece * rank), min(length, piece * (rank + 1))

    def own(self, whole: Tensor) -> Tensor:
        """Cut this process's part out of a whole."""
        start, end = self.bounds(self.rank)
        return whole.narrow(self.dim, start, end - start)

    def same_processes(self, other: Any) -> bool:
        """Whether the same processes hold the parts of another tensor."""
        return bool(self.ranks == other.ranks)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes, in order of rank; their last dimension may differ."""
        width = tensor.shape[-1]
        widths = [int(found) for found in self._all_gather(torch.tensor([width], device="cpu"))]
        padded = torch.nn.functional.pad(tensor, (0, max(widths) - width))
        return [found[..., :own] for found, own in zip(self._all_gather(padded), widths, strict=True)]

    def gather_along(self, tensor: Tensor) -> Tensor:
        """The whole of a tensor from its parts."""
        sizes = [end - start for start, end in map(self.bounds, range(len(self.ranks)))]
        shape = list(tensor.shape)
        shape[self.dim] = max(sizes)
        padded = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
        padded.narrow(self.dim, 0, tensor.shape[self.dim]).copy_(tensor)
        received = self._all_gather(padded.view(torch.uint8) if padded.dtype is torch.bool else padded)
        cut = [piece.narrow(self.dim, 0, size) for piece, size in zip(received, sizes, strict=True)]
        return torch.cat(cut, self.dim).view(tensor.dtype)

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum of the tensors of all processes, which have one shape."""
        total = tensor.to(self._device(), copy=True)
        torch.distributed.all_reduce(total, group=self.group)
        return total.to(tensor.device)

    def _device(self) -> torch.device:
        """Where the backend of the processes communicates."""
        kind = str(self.mesh.device_type)
        if kind == "cpu":
            return torch.device(kind)
        return torch.device(kind, torch.get_device_module(kind).current_device())

    def _all_gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of one shape of all processes, on the device where this one is."""
        sent = tensor.to(self._device()).contiguous()
        received = [torch.empty_like(sent) for _ in self.ranks]
        torch.distributed.all_gather(received, sent, group=self.group)
        return [piece.to(tensor.device) for piece in received]


def part_of(tensor: Tensor, name: str) -> Part | None:
    """Find where the local part of a tensor lies; None if every process has all of it.

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
