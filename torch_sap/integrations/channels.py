"""Output channels, the way that their values take to the modules that read them, and whether they can be taken out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Modules whose output channels can be taken out, if they compute by their class's own forward."""

PER_CHANNEL = (
    *("relu", "gelu", "silu", "hardtanh", "clamp", "sigmoid", "tanh", "elu", "leakyrelu", "hardswish", "hardsigmoid"),
    *("mish", "softplus", "logsigmoid", "maxpool", "avgpool", "adaptive", "mean", "squeeze", "clone", "alias"),
    *("replicationpad", "reflectionpad"),
)
"""Beginnings of autograd's names for operations of one tensor that keep its channels apart."""


@dataclass(frozen=True, eq=False)
class Reader:
    """A module that takes channels as inputs.

    Attributes:
        name: Its path in the model.
        module: The module.
        positions: Its inputs that belong to the channels.
        channels: The channel of each.
    """

    name: str
    module: Any
    positions: Tensor
    channels: Tensor

    def reads(self) -> Tensor:
        """Whether any weight of an input is not zero; bool for each position."""
        weight: Tensor = self.module.weight
        return (weight.transpose(0, 1).flatten(1) != 0).any(1)[self.positions]

    def constants(self, seen: Tensor) -> Tensor:
        """What arrives at each position if it is one number that the bias can take over, otherwise NaN."""
        values = seen.movedim(-1 if isinstance(self.module, nn.Linear) else 1, 0).flatten(1)[self.positions]
        low, high = values.aminmax(dim=1)
        constant = high - low <= 1e-12 * torch.maximum(low.abs(), high.abs())
        if _pads_with_zeros(self.module):
            constant &= high == 0
        return torch.where(constant, low, torch.nan)

    def take_over_(self, channels: Tensor, constants: Tensor) -> None:
        """Add to the bias what constants at the positions of some channels contribute."""
        chosen = torch.isin(self.channels, channels)
        known = torch.nan_to_num(constants[chosen], nan=0.0)  # NaN: nobody reads it
        columns = self.module.weight[:, self.positions[chosen]].double()
        if _is_conv(self.module):
            columns = columns.flatten(2).sum(2)
        shift = columns @ known.to(columns.device)
        if not shift.any():
            return
        if self.module.bias is None:
            self.module.bias = nn.Parameter(self.module.weight.new_zeros(len(self.module.weight)))
        self.module.bias.copy_(self.module.bias.double() + shift)


@dataclass(eq=False)
class Chain:
    """The output channels of a module.

    Attributes:
        name: Path of the module.
        module: The module.
        graph: Torch-Pruning's dependency graph of the model.
        readers: The modules that take the channels as inputs.
        why: Why no channel can be taken out, empty if some may.
    """

    name: str
    module: Any
    graph: Any
    readers: list[Reader] = field(default_factory=list)
    why: str = ""
    _constants: dict[str, Tensor] = field(default_factory=dict)

    def removable(self, seen: Mapping[str, Tensor | None]) -> tuple[Tensor, str]:
        """The channels that can go, and why the other empty ones cannot.

        Args:
            seen: What the readers were given, in float64; None of those that were called several times or never.
        """
        empty = (self.module.weight.flatten(1) == 0).all(1)
        why = self.why or next((f"{r.name} is not called once" for r in self.readers if seen[r.name] is None), "")
        if why:
            return empty.new_zeros(0, dtype=torch.int64), why if empty.any() else ""
        free, constant = torch.ones_like(empty), torch.ones_like(empty)
        for reader in self.readers:
            free[reader.channels[reader.reads()]] = False
            values = seen[reader.name]
            assert values is not None
            self._constants[reader.name] = reader.constants(values)
            varying = reader.channels[self._constants[reader.name].isnan()]
            constant[varying] = False
        go = free | (empty & constant)
        if go.all():
            go[0] = False
        names = ", ".join(reader.name for reader in self.readers)
        why = (
            "one channel has to stay" if (free | constant).all() else f"{names} gets no constant, or pads it with zeros"
        )
        return go.nonzero().flatten(), why if (empty & ~go).any() else ""

    def cut(self, channels: Tensor) -> None:
        """Take channels out of the module, of all on their way, and of the readers, in place."""
        with torch.no_grad():
            for reader in self.readers:
                reader.take_over_(channels, self._constants[reader.name])
        pruner = self.graph.get_pruner_of_module(self.module)
        self.graph.get_pruning_group(self.module, pruner.prune_out_channels, channels.tolist()).prune()


def chain_of(graph: Any, module: Any, name: str, outputs: Iterable[Any], shared: Iterable[Any]) -> Chain:
    """The channels of a module and their way as Torch-Pruning's graph has it.

    Args:
        graph: The dependency graph of a model.
        module: One of its modules of a type in :data:`PLAIN`.
        name: Its path.
        outputs: Autograd's nodes of what the model gives.
        shared: Modules that share a parameter with another one.
    """
    chain, outputs, shared = Chain(name, module, graph), list(outputs), list(shared)
    if problem := _unfit(module, graph, shared):
        chain.why = f"{name or 'the model'} {problem}"
        return chain
    pruner = graph.get_pruner_of_module(module)
    for item in graph.get_pruning_group(module, pruner.prune_out_channels, list(range(len(module.weight)))):
        node, path = item.dep.target, graph._module2name.get(item.dep.target.module, str(item.dep.target.module))
        reads = isinstance(node.module, PLAIN) and not graph.is_out_channel_pruning_fn(item.dep.handler)
        if not reads and (any(node.grad_fn is output for output in outputs) or node.type.name == "OUTPUT"):
            chain.why = "the model gives them out"
        elif (node.module is module and not reads) or node.type.name in ("BN", "RESHAPE", "DEPTHWISE_CONV"):
            continue
        elif node.type.name == "ELEMENTWISE":
            operation = str(node.module._grad_fn)
            if not operation.lower().startswith(PER_CHANNEL) and not _is_inside(node):
                chain.why = f"{operation.partition('Backward')[0]} is on their way"
        elif not reads:
            chain.why = f"they go together with those of {path} ({node.type.name})"
        elif problem := _unfit(node.module, graph, shared):
            chain.why = f"{path} {problem}"
        else:
            chain.readers.append(Reader(path, node.module, torch.tensor(item.idxs), torch.tensor(item.root_idxs)))
        if chain.why:
            return chain
    if not chain.readers:
        chain.why = "the model gives them out"
    return chain


def _unfit(module: Any, graph: Any, shared: Sequence[Any]) -> str:
    if module not in graph.module2node:
        return "is not seen to be called"
    if any(module is other for other in shared):
        return "shares a weight with another module"
    if getattr(module, "groups", 1) != 1:
        return "is a grouped convolution"
    kind = next(kind for kind in PLAIN if isinstance(module, kind))
    if module.forward.__func__ is not kind.forward or "weight" not in module._parameters:
        return f"computes otherwise than {kind.__name__}"
    return ""


def _is_inside(node: Any) -> bool:
    """Whether an operation is a part of the module behind it: what a Linear adds a view to, or a norm an activation."""
    below = [function for function, _ in node.grad_fn.next_functions if function is not None]
    if all(hasattr(function, "variable") for function in below):  # of parameters alone
        return True
    below += [function for one in below for function, _ in one.next_functions if function is not None]
    own = [getattr(function, "variable", None) for function in below]
    return bool(node.outputs) and all(
        isinstance(other.module, (nn.Linear, _BatchNorm)) and any(other.module.weight is variable for variable in own)
        for other in node.outputs
    )


def _is_conv(module: nn.Module) -> bool:
    return not isinstance(module, nn.Linear)


def _pads_with_zeros(module: Any) -> bool:
    if not _is_conv(module) or module.padding_mode != "zeros" or module.padding == "valid":
        return False
    return module.padding == "same" or any(module.padding)


def observe(
    model: nn.Module, names: Iterable[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Tensor | None]:
    """What modules of a model are given while it computes; None of those called several times or never."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, given, found=found: found.append(given[0].detach().clone())
        )
        for name, found in inputs.items()
    ]
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: found[0] if len(found) == 1 else None for name, found in inputs.items()}
