"""Neurons that pruning has emptied are taken out of a model, where its outputs are known to stay the same.

An output channel of a Linear or a convolution can go

- if nobody reads it: the weights of all modules that take it as an input are zero for it; or
- if it is empty: its own weights are all zero. It then puts out its bias, whatever the input, and so do the
  normalisations, activations and poolings behind it that work channel by channel. The constant that arrives at the next
  modules is moved into their biases. That is exact for linear layers and for convolutions without padding; with zero
  padding only if the constant is 0, because at the border it is added less often.

Which tensors are cut together is found by Torch-Pruning's dependency graph (Fang et al., "DepGraph: Towards any
structural pruning", CVPR 2023). Channels whose way to the next modules is not one of those above (residual sums, gates,
attention, LayerNorm, concatenation) stay.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from torch_sap.distributed.replicas import unwrap
from torch_sap.functional import remove
from torch_sap.inspect.summary import summary
from torch_sap.inspect.verify import arguments_of, as_it_was
from torch_sap.integrations.channels import PLAIN, Chain, chain_of, observe
from torch_sap.masks.parameters import resolve


@dataclass(frozen=True, eq=False)
class Shrunk:
    """What :func:`shrink` made.

    Attributes:
        model: The smaller model, plain modules without masks.
        removed: How many output channels each weight lost.
        kept: Why output channels without weights are still there, for each weight that has some.
        weights_before: Entries of the weights of the model that was given.
        weights_after: Those of the smaller one.
    """

    model: nn.Module
    removed: Mapping[str, int]
    kept: Mapping[str, str]
    weights_before: int
    weights_after: int

    def __str__(self) -> str:
        """A line in total and a line for each weight that lost channels or kept empty ones."""
        head = "nothing could be removed"
        if self.removed:
            head = f"removed {sum(self.removed.values()):,} output channels, "
            head += f"{self.weights_after:,} of {self.weights_before:,} weights are left"
        lines = [f"  {name}: {count:,} removed" for name, count in self.removed.items()]
        return "\n".join([head, *lines, *(f"  {name}: empty rows stay, {why}" for name, why in self.kept.items())])


def shrink(model: nn.Module, example_input: Any) -> Shrunk:
    """Make a smaller model with equal outputs, without the neurons that pruning has emptied or that nobody reads.

    The model that is given is not changed. The new one is dense, in eval mode computes the same but for rounding, and
    was compared on the example in float64. In train mode the two differ: batch norm and dropout see other channels.

    Args:
        model: Any module, pruned or with zeros as :func:`remove` leaves them.
        example_input: A tensor, a tuple of positional arguments or a dict of keyword arguments for the model.

    Returns:
        The new model, what it lost, and why empty rows are still there.

    Raises:
        TypeError: if the model is no module.
        ValueError: if it has no weight that could be pruned.
        ImportError: if Torch-Pruning is not installed (extra "shrink").
        RuntimeError: if the outputs are not equal; that would be an error in torch_sap.
        Exception: whatever the model raises for the example.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> with torch.no_grad():
        ...     _ = model[0].weight[:6].zero_()
        >>> print(shrink(model, torch.ones(2, 8)))
        removed 6 output channels, 120 of 192 weights are left
          0.weight: 6 removed
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError("shrink needs Torch-Pruning: pip install 'torch_sap[shrink]'") from error
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    resolve(model)
    small = remove(copy.deepcopy(unwrap(model)))
    modes = {name: module.training for name, module in small.named_modules()}
    frozen = [name for name, parameter in small.named_parameters() if not parameter.requires_grad]
    reference = copy.deepcopy(small).double().eval()
    example = tree_map(_double, example_input)
    removed: dict[str, int] = {}
    small.eval().requires_grad_(True)  # the dependency graph is autograd's
    while found := _pass(small, example_input, example, torch_pruning):
        for name, count in found.items():
            removed[name] = removed.get(name, 0) + count
    _check_equal(reference, small, example)
    kept = _reasons(small, example_input, example, torch_pruning)
    for name, module in small.named_modules():
        module.training = modes[name]
    for name in frozen:
        small.get_parameter(name).requires_grad_(False)
    before, after = (sum(p.weight.numel() for p in resolve(one)) for one in (reference, small))
    return Shrunk(small, removed, kept, before, after)


def _double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _chains(model: nn.Module, example_input: Any, example: Any, tp: Any) -> list[tuple[Chain, Tensor, str]]:
    """The output channels of each module: which ones can go now, and why no other empty one."""
    args, kwargs = arguments_of(example_input)
    outputs: list[Any] = []

    def note(out: Any) -> list[Tensor]:
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        outputs.extend(tensor.grad_fn for tensor in made)
        return made

    with as_it_was(model), torch.enable_grad():
        graph = tp.DependencyGraph().build_dependency(
            model, dict(kwargs) or tuple(args), output_transform=note, verbose=False
        )
    shared = [module for prunable in resolve(model) if len(prunable.holders) > 1 for module, _ in prunable.holders]
    producers = [(name, module) for name, module in model.named_modules() if isinstance(module, PLAIN)]
    chains = [chain_of(graph, module, name, outputs, shared) for name, module in producers]
    args, kwargs = arguments_of(example)
    seen = observe(copy.deepcopy(model).double(), {r.name for chain in chains for r in chain.readers}, args, kwargs)
    return [(chain, *chain.removable(seen)) for chain in chains]


def _pass(model: nn.Module, example_input: Any, example: Any, tp: Any) -> dict[str, int]:
    """Take out what can go now, in place; how many channels of each weight. More may follow from it."""
    found = {}
    for chain, channels, _ in _chains(model, example_input, example, tp):
        if len(channels):
            chain.cut(channels)
            found[_weight_of(chain.name)] = len(channels)
    return found


def _weight_of(module: str) -> str:
    return f"{module}.weight".removeprefix(".")


def _reasons(model: nn.Module, example_input: Any, example: Any, tp: Any) -> dict[str, str]:
    """Why there are still empty rows, for each weight that has some."""
    known = {_weight_of(chain.name): why for chain, _, why in _chains(model, example_input, example, tp)}
    layers = [layer for layer in summary(model).layers if layer.empty_rows]
    return {layer.name: known.get(layer.name) or f"rows of {layer.module} are not taken out" for layer in layers}


def _check_equal(model: nn.Module, small: nn.Module, example: Any) -> None:
    args, kwargs = arguments_of(example)
    with torch.no_grad():
        one, other = model(*args, **kwargs), copy.deepcopy(small).double()(*args, **kwargs)
    scale = max(
        (float(leaf.abs().max()) for leaf in tree_leaves(one) if isinstance(leaf, Tensor) and leaf.numel()), default=1.0
    )
    rounding = max(torch.finfo(p.dtype).eps for p in small.parameters() if p.is_floating_point())
    try:
        torch.testing.assert_close(other, one, rtol=0, atol=max(1e-9, 100 * rounding) * max(scale, 1.0))
    except AssertionError as error:
        raise RuntimeError(
            "the smaller model computes something else, so it is not given out; please report this model to torch_sap"
        ) from error
