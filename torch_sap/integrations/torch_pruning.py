"""Remove empty neurons from a model where its outputs provably stay the same.

An output channel of a Linear or a convolution can go

- if it is not read: the weights of all modules that take it as an input are zero for it; or
- if it is empty: its own weights are all zero. It then outputs its bias for any input, and the normalizations,
  activations, and poolings behind it, which work channel by channel, pass on a constant. The biases of the next modules
  absorb this constant. That is exact for linear layers and for convolutions without padding; with zero padding only if
  the constant is 0, because border pixels see it less often.

Torch-Pruning's dependency graph finds the tensors that have to be cut together (Fang et al., "DepGraph: Towards any
structural pruning", CVPR 2023). Channels that take any other path to the next modules (residual sums, gates, attention,
LayerNorm, concatenation) stay.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from torch_sap.arguments import check_model, needs
from torch_sap.distributed.replicas import unwrap
from torch_sap.functional import remove
from torch_sap.inspect.example import arguments_of, as_it_was, tensors_of
from torch_sap.inspect.summary import summary
from torch_sap.iterate.rewinding import modes_of, set_modes
from torch_sap.masks.parameters import resolve

PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Modules whose output channels can go, if they use the forward of their class."""

PER_CHANNEL = (
    *("relu", "gelu", "silu", "hardtanh", "clamp", "sigmoid", "tanh", "elu", "leakyrelu", "hardswish", "hardsigmoid"),
    *("mish", "softplus", "logsigmoid", "maxpool", "avgpool", "adaptive", "mean", "squeeze", "clone", "alias"),
    *("replicationpad", "reflectionpad"),
)
"""Prefixes of autograd's names for operations on one tensor that keep its channels apart."""


@dataclass(frozen=True, eq=False)
class Shrunk:
    """The result of :func:`shrink`.

    Attributes:
        model: The smaller model, with plain modules and no masks.
        removed: Number of removed output channels per weight.
        kept: Why empty output channels are still there, per weight that has some.
        weights_before: Entries of the weights of the given model.
        weights_after: Entries of the weights of the smaller model.
    """

    model: nn.Module
    removed: Mapping[str, int]
    kept: Mapping[str, str]
    weights_before: int
    weights_after: int

    def __str__(self) -> str:
        """One line in total, and one line per weight that lost channels or kept empty ones."""
        head = "nothing could be removed"
        if self.removed:
            head = f"removed {sum(self.removed.values()):,} output channels, "
            head += f"{self.weights_after:,} of {self.weights_before:,} weights are left"
        lines = [f"  {name}: {count:,} removed" for name, count in self.removed.items()]
        return "\n".join([head, *lines, *(f"  {name}: empty rows stay, {why}" for name, why in self.kept.items())])


def shrink(model: nn.Module, example_input: Any) -> Shrunk:
    """Copy a model without the neurons that are empty or not read, with the same outputs.

    The copy is dense and computes the same in eval mode up to rounding; both are compared on the example in float64.
    In train mode they differ, because batch norm and dropout see other channels. The example is a tensor, a tuple of
    positional arguments, or a dict of keyword arguments for the model.

    Returns:
        The smaller model, what it lost, and why empty rows are still there.

    Raises:
        TypeError, ValueError: if the model is not a module, or has no prunable weight.
        RuntimeError: if the outputs differ, which would be a bug in torch_sap.

    Example:
        >>> from torch_sap.integrations.torch_pruning import shrink
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> with torch.no_grad():
        ...     _ = model[0].weight[:6].zero_()
        >>> print(shrink(model, torch.ones(2, 8)))
        removed 6 output channels, 120 of 192 weights are left
          0.weight: 6 removed
    """
    with needs("shrink", "Torch-Pruning", "shrink"):
        import torch_pruning
    check_model(model)
    resolve(model)
    small = remove(copy.deepcopy(unwrap(model)))
    modes = modes_of(small)
    frozen = [name for name, parameter in small.named_parameters() if not parameter.requires_grad]
    reference = copy.deepcopy(small).double().eval()
    example = tree_map_only(Tensor, lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, example_input)
    removed: dict[str, int] = {}
    small.eval().requires_grad_(True)  # autograd's graph is the dependency graph
    chains = _chains(small, example_input, example, torch_pruning)
    while any(len(chain.removable) for chain in chains):
        for chain in chains:
            if number := len(chain.removable):
                chain.cut()
                removed[chain.weight] = removed.get(chain.weight, 0) + number
        chains = _chains(small, example_input, example, torch_pruning)  # a cut can make further channels removable
    _check_equal(reference, small, example)
    reasons = {chain.weight: chain.why for chain in chains}
    empty = [layer for layer in summary(small).tensors if layer.empty_rows]
    kept = {layer.name: reasons.get(layer.name) or f"rows of {layer.module} are not removed" for layer in empty}
    set_modes(modes)
    for name in frozen:
        small.get_parameter(name).requires_grad_(False)
    before, after = (sum(p.weight.numel() for p in resolve(one).prunables) for one in (reference, small))
    return Shrunk(small, removed, kept, before, after)


def _check_equal(model: nn.Module, small: nn.Module, example: Any) -> None:
    args, kwargs = arguments_of(example)
    with torch.no_grad():
        one, other = model(*args, **kwargs), copy.deepcopy(small).double()(*args, **kwargs)
    scale = max((float(leaf.abs().max()) for leaf in tensors_of(one) if leaf.numel()), default=1.0)
    rounding = max(torch.finfo(p.dtype).eps for p in small.parameters() if p.is_floating_point())
    try:
        torch.testing.assert_close(other, one, rtol=0, atol=max(1e-9, 100 * rounding) * max(scale, 1.0))
    except AssertionError as error:
        raise RuntimeError(
            "the smaller model must compute the same outputs, but it does not, so it is not returned; please report "
            "this model to torch_sap"
        ) from error


@dataclass(eq=False)
class _Reader:
    """A module that takes channels as inputs."""

    name: str
    module: Any
    positions: Tensor  # its inputs that belong to the channels
    channels: Tensor  # the channel of each position
    constants: Tensor = field(default_factory=lambda: torch.zeros(0, device="cpu"))  # what arrives; NaN: it varies

    def observe_(self, seen: Tensor) -> None:
        """Keep the constant that arrives at each position, if the bias can absorb it."""
        values = seen.movedim(-1 if isinstance(self.module, nn.Linear) else 1, 0).flatten(1)[self.positions]
        low, high = values.aminmax(dim=1)
        constant = high - low <= 1e-12 * torch.maximum(low.abs(), high.abs())
        padding = getattr(self.module, "padding", "valid")
        if padding != "valid" and any(padding) and self.module.padding_mode == "zeros":
            constant &= high == 0
        self.constants = torch.where(constant, low, torch.nan)

    def absorb_(self, channels: Tensor) -> None:
        """Add the contribution of constant channels to the bias."""
        chosen = torch.isin(self.channels, channels)
        known = torch.nan_to_num(self.constants[chosen], nan=0.0)  # a channel that varies has zero weights here
        columns = self.module.weight[:, self.positions[chosen]].double()
        if not isinstance(self.module, nn.Linear):
            columns = columns.flatten(2).sum(2)
        shift = columns @ known.to(columns.device)
        if shift.any():
            if self.module.bias is None:
                self.module.bias = nn.Parameter(self.module.weight.new_zeros(len(self.module.weight)))
            self.module.bias.copy_(self.module.bias.double() + shift)


@dataclass(eq=False)
class _Chain:
    """The output channels of a module, and their paths to the modules that read them."""

    name: str
    module: Any
    graph: Any  # Torch-Pruning's dependency graph of the model
    readers: list[_Reader] = field(default_factory=list)
    removable: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64, device="cpu"))
    why: str = ""  # why the other empty channels stay

    @property
    def weight(self) -> str:
        return f"{self.name}.weight".removeprefix(".")

    def find_removable_(self, seen: Mapping[str, Tensor | None]) -> None:
        """Decide which channels can go, from the float64 inputs of the readers."""
        empty = (self.module.weight.flatten(1) == 0).all(1)
        self.why = self.why or next((f"{r.name} is not called once" for r in self.readers if seen[r.name] is None), "")
        if self.why:
            return
        free, constant = torch.ones_like(empty), torch.ones_like(empty)
        for reader in self.readers:
            values = seen[reader.name]
            assert values is not None
            reader.observe_(values)
            is_read = (reader.module.weight.transpose(0, 1).flatten(1) != 0).any(1)[reader.positions]
            free[reader.channels[is_read]] = False
            constant[reader.channels[reader.constants.isnan()]] = False
        go = free | (empty & constant)
        if go.all():
            go[0] = False
        names = ", ".join(reader.name for reader in self.readers)
        self.why = f"{names} gets no constant, or pads it with zeros"
        if (free | constant).all():
            self.why = "one channel has to stay"
        self.removable = go.nonzero().flatten()

    def cut(self) -> None:
        """Remove the channels from the module, from everything on their path, and from the readers, in place."""
        with torch.no_grad():
            for reader in self.readers:
                reader.absorb_(self.removable)
        pruner = self.graph.get_pruner_of_module(self.module)
        self.graph.get_pruning_group(self.module, pruner.prune_out_channels, self.removable.tolist()).prune()


def _chains(model: nn.Module, example_input: Any, example: Any, tp: Any) -> list[_Chain]:
    """Find the output channels of each module that can go now, and the reason why others cannot."""
    args, kwargs = arguments_of(example_input)
    outputs: list[Any] = []

    def note(out: Any) -> list[Tensor]:
        outputs.extend(tensor.grad_fn for tensor in tensors_of(out))
        return tensors_of(out)

    with as_it_was(model), torch.enable_grad():
        graph = tp.DependencyGraph().build_dependency(
            model, dict(kwargs) or tuple(args), output_transform=note, verbose=False
        )
    tied = [prunable for prunable in resolve(model).prunables if len(prunable.holders) > 1]
    shared = [module for prunable in tied for module, _ in prunable.holders]
    chains = [_Chain(name, module, graph) for name, module in model.named_modules() if isinstance(module, PLAIN)]
    for chain in chains:
        chain.why = _follow(chain, outputs, shared)
    seen = _inputs_of(copy.deepcopy(model).double(), {r.name for chain in chains for r in chain.readers}, example)
    for chain in chains:
        chain.find_removable_(seen)
    return chains


def _follow(chain: _Chain, outputs: Sequence[Any], shared: Sequence[Any]) -> str:
    """Collect the readers of a module's channels; return why no channel can go, or nothing if some may."""
    module, graph = chain.module, chain.graph
    if problem := _unfit(module, graph, shared):
        return f"{chain.name or 'the model'} {problem}"
    pruner = graph.get_pruner_of_module(module)
    for item in graph.get_pruning_group(module, pruner.prune_out_channels, list(range(len(module.weight)))):
        node, path = item.dep.target, graph._module2name.get(item.dep.target.module, str(item.dep.target.module))
        reads = isinstance(node.module, PLAIN) and not graph.is_out_channel_pruning_fn(item.dep.handler)
        if not reads and (any(node.grad_fn is output for output in outputs) or node.type.name == "OUTPUT"):
            return "they are outputs of the model"
        if (node.module is module and not reads) or node.type.name in ("BN", "RESHAPE", "DEPTHWISE_CONV"):
            continue
        if node.type.name == "ELEMENTWISE":
            operation = str(node.module._grad_fn)
            if not operation.lower().startswith(PER_CHANNEL) and not _is_inside(node):
                return f"{operation.partition('Backward')[0]} is on their path"
        elif not reads:
            return f"they go together with those of {path} ({node.type.name})"
        elif problem := _unfit(node.module, graph, shared):
            return f"{path} {problem}"
        else:
            positions, channels = (torch.tensor(found, device="cpu") for found in (item.idxs, item.root_idxs))
            chain.readers.append(_Reader(path, node.module, positions, channels))
    return "" if chain.readers else "they are outputs of the model"


def _unfit(module: Any, graph: Any, shared: Sequence[Any]) -> str:
    if module not in graph.module2node:
        return "is not seen to be called"
    if any(module is other for other in shared):
        return "shares a weight with another module"
    if getattr(module, "groups", 1) != 1:
        return "is a grouped convolution"
    kind = next(kind for kind in PLAIN if isinstance(module, kind))
    if module.forward.__func__ is not kind.forward or "weight" not in module._parameters:
        return f"does not compute like {kind.__name__}"
    return ""


def _is_inside(node: Any) -> bool:
    """Whether an operation is part of the module behind it, like a view in Linear or an activation in a norm."""
    below = [function for function, _ in node.grad_fn.next_functions if function is not None]
    if all(hasattr(function, "variable") for function in below):  # its operands are parameters
        return True
    below += [function for one in below for function, _ in one.next_functions if function is not None]
    own = [getattr(function, "variable", None) for function in below]
    return bool(node.outputs) and all(
        isinstance(other.module, (nn.Linear, _BatchNorm)) and any(other.module.weight is variable for variable in own)
        for other in node.outputs
    )


def _inputs_of(model: nn.Module, names: Iterable[str], example: Any) -> dict[str, Tensor | None]:
    """Record the input of some modules of a model on an example; None for modules not called exactly once."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in names}
    for name, found in inputs.items():
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, given, found=found: found.append(given[0].detach().clone())
        )
    args, kwargs = arguments_of(example)
    with torch.no_grad():
        model(*args, **kwargs)
    return {name: found[0] if len(found) == 1 else None for name, found in inputs.items()}
