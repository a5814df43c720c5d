"""Which tensors of a model are pruned, and which modules hold them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.parameter import is_lazy

from torch_sap.arguments import check_model
from torch_sap.decide.groups import Entry
from torch_sap.decide.keys import check_dtype
from torch_sap.distributed.fsdp import reshard
from torch_sap.distributed.replicas import unwrap
from torch_sap.distributed.sharded import local, part_of, place, wrap

Pair = tuple[nn.Module, str]
"""A module and the name of one of its parameters, as torch.nn.utils.prune takes them."""

ImportanceScores = Mapping[Pair, Tensor]


@dataclass(frozen=True)
class Prunable:
    """One tensor to prune: its dotted path by its first holder, and all modules that use it with its name in each."""

    name: str
    holders: tuple[Pair, ...]

    @property
    def weight(self) -> nn.Parameter:
        """The Parameter, named ``weight_orig`` once it is pruned."""
        return _parameter(*self.holders[0])[1]

    @property
    def mask(self) -> Tensor | None:
        """Bool mask of what all holders leave unpruned, sharded like the weight; None before any pruning."""
        mask = None
        for module, name in self.holders:
            if (here := module._buffers.get(name + "_mask")) is not None:
                here = place(here if here.dtype is torch.bool else here != 0, like=self.weight)
                mask = here if mask is None or mask is here else mask & here
        return mask

    def entry(self, scores: Tensor | None = None) -> Entry:
        """Entry for the SAP step, ranked by the scores if given."""
        weight, mask = self.weight.detach(), self.mask
        module = self.holders[0][0]
        return Entry(
            self.name,
            local(weight if scores is None else place(scores.detach().to(weight.device), like=weight)),
            None if mask is None else local(mask),
            source="weights" if scores is None else "importance_scores",
            channel_dim=1 if isinstance(module, _ConvTransposeNd) else 0,
            channel_groups=module.groups if isinstance(module, _ConvTransposeNd) else 1,
            part=part_of(weight, self.name),
        )

    def whole(self, mask: Tensor | None) -> Tensor:
        """A mask from the SAP step as the module holds it: sharded like the weight, all True for None."""
        if mask is None:
            return torch.ones_like(self.weight, dtype=torch.bool, requires_grad=False)
        return wrap(mask, like=self.weight)


def prunable_parameters(model: nn.Module, exclude: str | Iterable[str] = ()) -> list[Pair]:
    """The parameters of a model that SAP prunes, in the form that torch.nn.utils.prune takes.

    Every parameter whose own name contains "weight" and that has more than one dimension: those of Linear, Conv,
    Embedding and recurrent modules, and ``in_proj_weight``; not norm scales, biases, position embeddings and class
    tokens (the paper's rule).

    Args:
        model: Any module, pruned or not.
        exclude: Patterns (fnmatch) of the path of a parameter (``head.weight``, ``*.downsample.*``) or of a module
            that it is in ("head"). A shared parameter is excluded if one of its paths is.

    Returns:
        Pairs of a module and the name of its parameter before pruning, in the model's order. A shared parameter has
        several.

    Raises:
        TypeError: if ``model`` is not a module, or ``exclude`` holds anything but strings.
        ValueError: if a pattern matches nothing.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        >>> prunable_parameters(model, exclude="2")
        [(Linear(in_features=3, out_features=4, bias=True), 'weight')]
    """
    return [pair for prunable in _in_model(model, exclude) for pair in prunable.holders]


def is_weight(name: str, dimensions: int) -> bool:
    """Whether a parameter is pruned unless it is excluded, by its own name and its number of dimensions."""
    return "weight" in name and dimensions > 1


def resolve(target: nn.Module | Iterable[Pair], exclude: str | Iterable[str] = ()) -> list[Prunable]:
    """Find and check the tensors of a model, or of pairs of (module, name), each once.

    Raises:
        TypeError: if the target is something else, or a tensor is not of a real floating-point type.
        ValueError: if there is nothing to prune, a parameter does not exist, or a tensor has no values.
    """
    if isinstance(target, nn.Module):
        found = _in_model(target, exclude)
        if not found:
            raise ValueError(
                "model must have a parameter to prune (more than one dimension and 'weight' in its name), "
                f"but {type(target).__name__} has none" + (f" that exclude={exclude!r} leaves" if exclude else "")
            )
    else:
        if exclude:
            raise ValueError(
                "exclude needs a model; leave what you do not want to prune out of the (module, name) pairs"
            )
        found = _in_pairs(target)
    reshard(module for prunable in found for module, _ in prunable.holders)
    for prunable in found:
        weight = prunable.weight
        if is_lazy(weight) or weight.is_meta:
            raise ValueError(f"{prunable.name} must have values, but it is on the meta device or not initialized yet")
        check_dtype(weight, prunable.name)
    return found


def entries_of(prunables: Sequence[Prunable], importance_scores: ImportanceScores | None) -> list[Entry]:
    """Make entries for the SAP step, ranked by the user's scores where given.

    Raises:
        TypeError: if the scores are not a mapping to real floating-point tensors.
        ValueError: if scores have another shape than their tensor, or belong to none.
    """
    scores = {} if importance_scores is None else importance_scores
    if not isinstance(scores, Mapping):
        raise TypeError(
            f"importance_scores must be a dict from (module, name) to a tensor, got {type(scores).__name__}"
        )
    known = {pair: prunable for prunable in prunables for pair in prunable.holders}
    chosen: dict[str, Tensor] = {}
    for pair, tensor in scores.items():
        if pair not in known:
            raise ValueError(f"importance_scores must belong to parameters that are pruned, got one for {pair!r}")
        name = f"importance_scores of {known[pair].name}"
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        check_dtype(tensor, name)
        if tensor.shape != known[pair].weight.shape:
            shape = tuple(known[pair].weight.shape)
            raise ValueError(f"{name} must have the parameter's shape {shape}, got {tuple(tensor.shape)}")
        chosen.setdefault(known[pair].name, tensor)
    return [prunable.entry(chosen.get(prunable.name)) for prunable in prunables]


def _parameter(module: nn.Module, name: str) -> tuple[str, nn.Parameter]:
    """The present name of a parameter, and the parameter."""
    pruned = name + "_mask" in module._buffers
    now = name + "_orig" if pruned else name
    parameter = module._parameters.get(now)
    if parameter is None:
        raise ValueError(f"name must be a parameter of the module, got {name!r} for {type(module).__name__}")
    return now, parameter


def _in_model(model: nn.Module, exclude: str | Iterable[str]) -> list[Prunable]:
    check_model(model)
    holders: dict[int, list[Pair]] = {}
    paths: dict[int, list[str]] = {}
    for path, module in unwrap(model).named_modules():
        for now, parameter in module._parameters.items():
            name = now.removesuffix("_orig") if now.removesuffix("_orig") + "_mask" in module._buffers else now
            if parameter is None or not is_weight(name, 2 if is_lazy(parameter) else parameter.dim()):
                continue
            holders.setdefault(id(parameter), []).append((module, name))
            paths.setdefault(id(parameter), []).append(f"{path}.{name}".removeprefix("."))
    excluded = excluded_by(paths, exclude)
    return [Prunable(paths[key][0], tuple(pairs)) for key, pairs in holders.items() if key not in excluded]


def excluded_by(paths: Mapping[int, Sequence[str]], exclude: str | Iterable[str]) -> set[int]:
    """Find the keys of the parameters (with their dotted paths) that patterns exclude.

    Raises:
        TypeError: if something is not a pattern.
        ValueError: if a pattern matches nothing.
    """
    if not isinstance(exclude, Iterable):
        raise TypeError(f"exclude must be a pattern or an iterable of patterns, got {exclude!r}")
    patterns = [exclude] if isinstance(exclude, str) else exclude
    excluded: set[int] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"exclude must hold patterns (strings), got {pattern!r}")
        matched = {key for key, names in paths.items() if any(_matches(name, pattern) for name in names)}
        if not matched:
            known = ", ".join(name for names in paths.values() for name in names)
            raise ValueError(f"exclude must match a prunable parameter, but {pattern!r} matches none of: {known}")
        excluded |= matched
    return excluded


def _matches(path: str, pattern: str) -> bool:
    parts = path.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def _in_pairs(pairs: Iterable[Pair]) -> list[Prunable]:
    if not isinstance(pairs, Iterable) or isinstance(pairs, (str, Tensor)):
        raise TypeError(
            f"model must be a torch.nn.Module or an iterable of (module, name) pairs, got {type(pairs).__name__}"
        )
    holders: dict[int, list[Pair]] = {}
    names: dict[int, str] = {}
    for number, pair in enumerate(pairs):
        if not (
            isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], nn.Module) and isinstance(pair[1], str)
        ):
            found = f"a {type(pair).__name__}; pass the model itself" if isinstance(pair, Tensor) else repr(pair)
            raise TypeError(f"each pair must be (module, name), got {found}")
        _, parameter = _parameter(*pair)
        names.setdefault(id(parameter), f"{number}.{pair[1]}")
        if pair not in (known := holders.setdefault(id(parameter), [])):
            known.append(pair)
    if not holders:
        raise ValueError("model must have a parameter to prune, but the iterable of (module, name) pairs is empty")
    return [Prunable(names[key], tuple(found)) for key, found in holders.items()]
