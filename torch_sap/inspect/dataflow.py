"""Follow the entries of weights through a computation, to the operations that receive them.

Every tensor that is computed from weights alone carries a map of its entries. Views and copies move the map with the
entries; operations that keep the shape (a cast, a mask, a standardization) leave it as it is. A tensor is *received* by
the first operation that contracts it or looks up entries in it, and by any operation that combines it with a value that
depends on the example. The rows of a lookup table are activations even if no lookup reads them (DETR's queries,
DeBERTa's relative positions): the first operation that does more than move or scale them receives them, and after it
only a lookup does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

NOT_OURS, KEPT, PRUNED = 0, 1, 2

# fmt: off
CONTRACTIONS = frozenset({
    "mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot", "linear", "matmul",
    "_scaled_mm", "_int_mm", "mkldnn_linear", "convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution",
    "convolution_overrideable", "embedding", "_embedding_bag", "_embedding_bag_forward_only",
    "_native_multi_head_attention", "_transformer_encoder_layer_fwd", "lstm", "gru", "rnn_tanh", "rnn_relu",
    "mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn", "upsample_linear1d", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
    "upsample_trilinear3d", "upsample_nearest3d", "grid_sampler_2d",
})
"""ATen operations that receive a weight, regardless of their other operands."""

CHOICES = frozenset({"index", "index_select", "gather"})
"""ATen operations that look up entries if they repeat some, and only move them otherwise."""

LOOKUPS = frozenset({"embedding", "_embedding_bag", "_embedding_bag_forward_only"})
"""ATen operations that receive a lookup table even after another operation has."""

ZEROS_STAY = frozenset({"_to_copy", "clone", "detach", "copy", "mul", "div"})
"""ATen operations besides moves that do not receive a lookup table: a mask or a scale is no use of it yet."""

MOVES = frozenset({
    "cat", "stack", "repeat", "index_select", "flip", "roll", "_unsafe_view", "constant_pad_nd", "index", "gather",
})
"""ATen operations besides views that only move entries."""
# fmt: on


@dataclass
class Received:
    """What a computation has received of one weight so far, in entries."""

    entries: int = 0
    pruned: int = 0
    zeros: int = 0
    revived: int = 0  # pruned but not zero
    changed_by: set[str] = field(default_factory=set)  # operations that turned zeros into other numbers


@dataclass(frozen=True)
class Origin:
    """The weight that the entries of a tensor come from."""

    source: int  # index of the weight
    places: Tensor  # uint8, in the tensor's shape: NOT_OURS, KEPT, or PRUNED
    changed_by: tuple[str, ...] = ()  # operations since the pruned entries were last zero
    is_table: bool = False
    received: bool = False  # a table, by an operation before


class Follow(TorchDispatchMode):
    """While active, record what operations receive of some weights, each given with the map of its entries."""

    def __init__(
        self, places: Sequence[tuple[Tensor, Tensor]], inputs: Sequence[Tensor], tables: Collection[int] = ()
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.received = [Received() for _ in places]
        self._origins: Any = WeakTensorKeyDictionary()
        self._dependent: Any = WeakTensorKeyDictionary()
        for source, (weight, where) in enumerate(places):
            self._origins[weight] = (Origin(source, _laid_out(where, like=weight), is_table=source in tables),)
        for tensor in inputs:
            self._dependent[tensor] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and follow its operands and results."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        operands = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        followed = [(operand, origin) for operand in operands for origin in self._origins.get(operand, ())]
        dependent = any(operand in self._dependent for operand in operands)
        name = func._schema.name.partition("::")[2].rstrip("_")
        self._dependent.update(dict.fromkeys(made, True) if dependent else ())
        if not followed:
            return out
        moves = (name in MOVES or func.is_view) and not any(isinstance(leaf, torch.dtype) for leaf in leaves)
        receives = name in CONTRACTIONS or dependent or (name in CHOICES and made[0].numel() > operands[0].numel())
        for operand, origin in followed:
            reads = receives or (origin.is_table and not moves and name not in ZEROS_STAY)
            if reads and (not origin.received or name in LOOKUPS):
                self._receive(operand, origin)
        if moves and not receives:
            self._move(func, args, kwargs, followed, out)
        elif not receives:
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
        """Apply an operation that moves entries to the map of each weight."""
        if func._schema.name == "aten::constant_pad_nd":
            args = args[:2]  # pad with NOT_OURS, not with the value
        for source in {origin.source for _, origin in followed}:
            own = {id(operand): origin for operand, origin in followed if origin.source == source}

            def map_of(leaf: Any, own: Mapping[int, Origin] = own) -> Any:
                if id(leaf) in own:
                    return own[id(leaf)].places
                floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
                return torch.zeros_like(leaf, dtype=torch.uint8) if floating else leaf

            maps = tree_leaves(func(*tree_map(map_of, args), **tree_map(map_of, kwargs)))
            origin = next(iter(own.values()))
            for tensor, places in zip(tree_leaves(out), maps, strict=True):
                self._add(tensor, replace(origin, places=places))

    def _keep(self, name: str, followed: Sequence[tuple[Tensor, Origin]], made: Sequence[Tensor]) -> None:
        """Keep the map in results that a weight broadcasts to; other results are statistics of the weight."""
        for operand, origin in followed:
            for tensor in made:
                if not _broadcasts(operand.shape, tensor.shape):
                    continue
                places = _laid_out(origin.places.expand(tensor.shape), like=tensor)
                revived = bool(((places == PRUNED) & (tensor != 0)).any())
                changed_by = (*origin.changed_by, name) if revived else ()
                received = origin.received or (origin.is_table and name not in ZEROS_STAY)
                self._add(tensor, replace(origin, places=places, changed_by=changed_by, received=received))

    def _add(self, tensor: Tensor, origin: Origin) -> None:
        others = tuple(other for other in self._origins.get(tensor, ()) if other.source != origin.source)
        self._origins[tensor] = (*others, origin)


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))


def _laid_out(places: Tensor, like: Tensor) -> Tensor:
    """Give a map the strides of its tensor, so that the same views apply to both."""
    if places.stride() == like.stride():
        return places
    return torch.empty_like(like, dtype=torch.uint8, requires_grad=False).copy_(places)
