"""Importance scores from data, which may rank weights better than their magnitudes do.

A score is a callable from a model to a mapping, for ``importance_scores``. A pruner asks it before each pruning. It
runs the model on a few batches, in eval mode, and leaves it exactly as it was.

Sources: Sun et al., "A simple and effective pruning approach for large language models" (Wanda), arXiv 2306.11695;
Molchanov et al., "Importance estimation for neural network pruning", arXiv 1906.10771.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torch_sap.arguments import some
from torch_sap.distributed.replicas import add_up, unwrap, wrapper_of
from torch_sap.inspect.example import arguments_of, as_it_was, whole_weights
from torch_sap.inspect.macs import in_counted_operations
from torch_sap.masks.parameters import Pair, Prunable

Score = Callable[[nn.Module], Mapping[Pair, Tensor]]


def activations(batches: Iterable[Any]) -> Score:
    r"""Score weights by their magnitude times the norm of the activations that they multiply.

    .. math:: S_{ij} = |w_{ij}| \cdot \|x_j\|_2

    The norm is taken over everything that meets the weight: all batches, tokens, and positions of a convolution.

    Args:
        batches: Inputs of the model, each a tensor, a tuple of positional arguments, or a dict of keyword arguments.
            They are gone through for each pruning, so pass a list or a DataLoader, not a generator.

    Returns:
        A callable from a model to one tensor of scores per prunable parameter.

    Raises:
        ValueError: when it is called, if there is no batch, or a weight meets no activations in an operation that is
            known: matrix products and convolutions.
        NotImplementedError: when it is called, if a weight is sharded.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> score = activations([torch.randn(32, 8)])
        >>> global_unstructured(model, importance_scores=score).pruned > 0
        True

    Source: Wanda, arXiv 2306.11695.
    """

    def score(model: nn.Module) -> dict[Pair, Tensor]:
        prunables = whole_weights(unwrap(model), "scores.activations")
        with as_it_was(unwrap(model)), torch.no_grad(), in_counted_operations(), _Norms(prunables) as norms:
            for args, kwargs in map(arguments_of, _some(batches)):
                unwrap(model)(*args, **kwargs)
        norms.fold()
        if missed := [p.name for p, met in zip(prunables, norms.met, strict=True) if not met]:
            raise ValueError(
                "scores.activations must see every weight in a matrix product or a convolution, but not "
                f"{some(missed)}; exclude what the batches do not use"
            )
        add_up(wrapper_of(model), norms.squares)
        return _scores(prunables, [squares.sqrt() for squares in norms.squares])

    return score


def gradients(batches: Iterable[Any], loss_fn: Callable[[nn.Module, Any], Tensor]) -> Score:
    r"""Score weights by how much the loss would change without them, to first order.

    .. math:: S_{ij} = |w_{ij} \cdot \partial L / \partial w_{ij}|

    Args:
        batches: What the loss is computed on; they are gone through for each pruning, so pass a list or a DataLoader.
        loss_fn: Called as ``loss_fn(model, batch)``; returns the loss, a tensor of one entry. The gradients of all
            batches are added up.

    Returns:
        A callable from a model to one tensor of scores per prunable parameter.

    Raises:
        ValueError: when it is called, if there is no batch, or the loss does not depend on a weight.
        TypeError: when it is called, if the loss is not a tensor of one entry.
        NotImplementedError: when it is called, if a weight is sharded.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> batches = [(torch.randn(32, 8), torch.randint(4, (32,)))]
        >>> score = gradients(batches, lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]))
        >>> global_unstructured(model, importance_scores=score).pruned > 0
        True

    Source: Molchanov et al., arXiv 1906.10771.
    """

    def score(model: nn.Module) -> dict[Pair, Tensor]:
        prunables = whole_weights(unwrap(model), "scores.gradients")
        weights = [prunable.weight for prunable in prunables]
        frozen = [weight for weight in weights if not weight.requires_grad]
        met = [False] * len(weights)
        try:
            for weight in frozen:
                weight.requires_grad_(True)
            with as_it_was(unwrap(model)), torch.enable_grad():
                sums = [torch.zeros_like(weight, dtype=_wide(weight), requires_grad=False) for weight in weights]
                for batch in _some(batches):
                    loss = loss_fn(unwrap(model), batch)
                    if not isinstance(loss, Tensor) or loss.numel() != 1:
                        raise TypeError(f"loss_fn must return a tensor of one entry, got {loss!r}")
                    found = torch.autograd.grad(loss.reshape(()), weights, allow_unused=True)
                    for number, gradient in enumerate(found):
                        if gradient is not None:
                            met[number] = True
                            sums[number] += gradient
        finally:
            for weight in frozen:
                weight.requires_grad_(False)
        if missed := [p.name for p, one in zip(prunables, met, strict=True) if not one]:
            raise ValueError(
                f"scores.gradients must find every weight in the loss, but not {some(missed)}; exclude what the loss "
                "does not depend on"
            )
        add_up(wrapper_of(model), sums)
        return _scores(prunables, sums)

    return score


def _some(batches: Iterable[Any]) -> Iterable[Any]:
    empty = True
    for batch in batches:
        empty = False
        yield batch
    if empty:
        raise ValueError("batches must hold at least one batch, each time that scores are asked for")


def _scores(prunables: Sequence[Prunable], factors: Sequence[Tensor]) -> dict[Pair, Tensor]:
    """Magnitudes times factors, for each holder of a weight."""
    scores = {}
    for prunable, factor in zip(prunables, factors, strict=True):
        product = (prunable.weight.detach().to(factor.dtype) * factor).abs()
        scores.update(dict.fromkeys(prunable.holders, product))
    return scores


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


class _Norms(TorchDispatchMode):
    """While active, add up the squares of the activations that each entry of some weights multiplies.

    An operand that is a view of a weight (transposed, one head, one expert) or a copy (a cast of autocast) is known by
    its memory, and its sums lie in a memory of their own as it does in its.
    """

    def __init__(self, prunables: Sequence[Prunable]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}  # by memory: a tensor that keeps it in use, its sums
        self._copies: list[tuple[int, Tensor, int, Tensor]] = []
        self._met: set[int] = set()
        weights = [prunable.weight.detach() for prunable in prunables]
        self.squares = [self._watch(weight) for weight in weights]
        self._memory = [_memory(weight) for weight in weights]

    @property
    def met(self) -> list[bool]:
        """Whether each weight was received by an operation."""
        return [memory in self._met for memory in self._memory]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and see what its weights meet."""
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if (
            name in ("_to_copy", "clone")
            and args[0].is_floating_point()
            and (sums := self._sums_of(args[0])) is not None
        ):
            if out.is_floating_point() and _memory(out) not in self._sums:
                self._copies.append((_memory(args[0]), sums, _memory(out), self._watch(out)))
        elif name in ("mm", "bmm", "addmm", "baddbmm", "mv", "addmv"):
            first, second = args[-2:] if name in ("mm", "bmm", "mv") else args[1:3]
            if second.dim() > 1:
                self._add(second, lambda: _squares(first).sum(-2).unsqueeze(-1))
            of_second = second if second.dim() > 1 else second.unsqueeze(-1)
            self._add(first, lambda: _squares(of_second).sum(-1).unsqueeze(-2))
        elif name in ("_grouped_mm", "grouped_mm_fallback"):  # PyTorch's, and transformers' where that is missing
            self._add(args[1], lambda: _of_groups(*args, **(kwargs or {})))
        elif name == "convolution":
            self._add(args[1], lambda: _of_convolution(out, *args))
        return out

    def fold(self) -> None:
        """Add what copies have met to the weights."""
        for weight, sums, copy, of_copy in reversed(self._copies):
            sums += of_copy
            if copy in self._met:
                self._met.add(weight)
        self._copies = []

    def _watch(self, tensor: Tensor) -> Tensor:
        """Make sums for the memory of a tensor, and return those of the tensor."""
        if _memory(tensor) not in self._sums:
            size = tensor.untyped_storage().nbytes() // tensor.itemsize
            self._sums[_memory(tensor)] = tensor, torch.zeros(size, dtype=_wide(tensor), device=tensor.device)
        sums = self._sums_of(tensor)
        assert sums is not None
        return sums

    def _sums_of(self, tensor: Tensor) -> Tensor | None:
        found = self._sums.get(_memory(tensor))
        if found is None or found[0].dtype != tensor.dtype:
            return None
        return found[1].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _add(self, operand: Tensor, squares_met: Callable[[], Tensor]) -> None:
        if (sums := self._sums_of(operand)) is not None:
            sums += squares_met()
            self._met.add(_memory(operand))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _squares(tensor: Tensor) -> Tensor:
    return tensor.to(_wide(tensor)).square()


def _of_groups(x: Tensor, weight: Tensor, offs: Tensor, **_: object) -> Tensor:
    """The sums of squares of each group of rows (tokens), which end at the offsets: (matrices, inputs, 1)."""
    squares = torch.nn.functional.pad(x.double().square().cumsum(0), (0, 0, 1, 0))[offs.long()]
    return squares.diff(dim=0, prepend=torch.zeros_like(squares[:1])).to(_wide(x)).unsqueeze(-1)


def _of_convolution(out: Tensor, x: Tensor, weight: Tensor, bias: object, *geometry: Any) -> Tensor:
    """The derivative of the sum of a convolution of squares, which is linear in its weight."""
    squares, ones = _squares(x), torch.ones_like(out, dtype=_wide(x))
    backward = torch.ops.aten.convolution_backward.default
    found: Tensor = backward(ones, squares, weight.to(ones.dtype), None, *geometry, (False, True, False))[1]
    return found
