"""Whether pruned entries are zeros where it counts: in what convolutions, matrix products and look-ups receive.

The model computes an example, and every tensor that is made of pruned weights alone is followed from operation to
operation, together with a map of where the pruned entries went. Views and copies move the map with the entries;
operations that keep the shape (a cast, a mask, a standardisation) leave it as it is. The tensor is *received* by the
first operation that contracts it or looks entries up in it, and by any that brings it together with a value that
depends on the example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

NOT_OURS, KEPT, PRUNED = 0, 1, 2

CONTRACTIONS = frozenset(
    {
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "addbmm",
        "mv",
        "addmv",
        "dot",
        "vdot",
        "linear",
        "matmul",
        "_scaled_mm",
        "_int_mm",
        "mkldnn_linear",
        "mkldnn_rnn_layer",
        "convolution",
        "_convolution",
        "mkldnn_convolution",
        "cudnn_convolution",
        "convolution_overrideable",
        "embedding",
        "_embedding_bag",
        "_embedding_bag_forward_only",
        "_native_multi_head_attention",
        "_transformer_encoder_layer_fwd",
        "lstm",
        "gru",
        "rnn_tanh",
        "rnn_relu",
        "_cudnn_rnn",
        "miopen_rnn",
    }
)
"""Operations that receive a weight whatever the other operand is, by their names in ATen."""

MOVES = frozenset(
    {"cat", "stack", "repeat", "index_select", "flip", "roll", "_unsafe_view", "constant_pad_nd", "index", "gather"}
)
"""Operations beside views that only move entries."""


@dataclass
class Received:
    """What the computation received of one weight so far.

    Attributes:
        entries: Entries of the weight in received tensors.
        pruned: How many of them are pruned.
        zeros: How many of them were zero.
        revived: How many were not zero though their entry is pruned.
        changed_by: Operations that had made numbers of zeros on the way.
    """

    entries: int = 0
    pruned: int = 0
    zeros: int = 0
    revived: int = 0
    changed_by: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Origin:
    """Where the entries of a tensor come from.

    Attributes:
        source: Index of the weight.
        places: uint8 tensor of the tensor's shape: NOT_OURS, KEPT or PRUNED.
        changed_by: Names of operations that gave it its values since its pruned entries were zeros the last time.
    """

    source: int
    places: Tensor
    changed_by: tuple[str, ...] = ()


class Follow(TorchDispatchMode):
    """While it is active, records what operations receive of some weights.

    Args:
        places: Each weight with the map of its entries.
        inputs: Tensors that the computed example consists of.
    """

    def __init__(self, places: Sequence[tuple[Tensor, Tensor]], inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.received = [Received() for _ in places]
        self._origins: Any = WeakTensorKeyDictionary()
        self._dependent: Any = WeakTensorKeyDictionary()
        for source, (weight, where) in enumerate(places):
            self._origins[weight] = (Origin(source, _laid_out(where, like=weight)),)
        for tensor in inputs:
            self._dependent[tensor] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and follow what it receives and makes."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        leaves = tree_flatten((args, kwargs))[0]
        operands = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, Tensor)]
        followed = [(operand, origin) for operand in operands for origin in self._origins.get(operand, ())]
        dependent = any(operand in self._dependent for operand in operands)
        name = func._schema.name.partition("::")[2].rstrip("_")
        if dependent:
            for tensor in made:
                self._dependent[tensor] = True
        if not followed:
            return out
        if name in CONTRACTIONS or dependent:
            for operand, origin in followed:
                self._receive(operand, origin)
        elif (name in MOVES or func.is_view) and not any(isinstance(leaf, torch.dtype) for leaf in leaves):
            self._move(func, args, kwargs, followed, out)
        else:
            self._keep(name, followed, made)
        return out

    def _receive(self, operand: Tensor, origin: Origin) -> None:
        ours, zero = origin.places != NOT_OURS, operand == 0
        pruned = origin.places == PRUNED
        revived = int((pruned & ~zero).sum())
        found = self.received[origin.source]
        found.entries += int(ours.sum())
        found.pruned += int(pruned.sum())
        found.zeros += int((ours & zero).sum())
        found.revived += revived
        if revived:
            found.changed_by.update(origin.changed_by)

    def _move(self, func: Any, args: Any, kwargs: Any, followed: Sequence[tuple[Tensor, Origin]], out: Any) -> None:
        """Let the map of each weight do what the operation does to the entries."""
        if func._schema.name == "aten::constant_pad_nd":
            args = args[:2]  # padded with NOT_OURS, whatever the value
        for source in {origin.source for _, origin in followed}:
            own = {id(operand): origin for operand, origin in followed if origin.source == source}

            def map_of(leaf: Any, own: Mapping[int, Origin] = own) -> Any:
                if id(leaf) in own:
                    return own[id(leaf)].places
                floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
                return torch.zeros_like(leaf, dtype=torch.uint8) if floating else leaf

            maps = tree_flatten(func(*tree_map(map_of, args), **tree_map(map_of, kwargs)))[0]
            origin = next(iter(own.values()))
            for tensor, places in zip(tree_flatten(out)[0], maps, strict=True):
                self._add(tensor, replace(origin, places=places))

    def _keep(self, name: str, followed: Sequence[tuple[Tensor, Origin]], made: Sequence[Tensor]) -> None:
        """Results of a weight's shape (or broadcast from it) have its entries; others are numbers about the weight."""
        for operand, origin in followed:
            for tensor in made:
                if not _broadcasts(operand.shape, tensor.shape):
                    continue
                places = _laid_out(origin.places.expand(tensor.shape), like=tensor)
                revived = bool(((places == PRUNED) & (tensor != 0)).any())
                changed_by = (*origin.changed_by, name) if revived else ()
                self._add(tensor, replace(origin, places=places, changed_by=changed_by))

    def _add(self, tensor: Tensor, origin: Origin) -> None:
        others = tuple(other for other in self._origins.get(tensor, ()) if other.source != origin.source)
        self._origins[tensor] = (*others, origin)


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))


def _laid_out(places: Tensor, like: Tensor) -> Tensor:
    """The map with the strides of its tensor, so that views of one are views of the other."""
    if places.stride() == like.stride():
        return places
    return torch.empty_like(like, dtype=torch.uint8, requires_grad=False).copy_(places)
