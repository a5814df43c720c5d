"""Which tensors of a model are pruned, and which modules hold them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torch_sap.arguments import check_model, some
from torch_sap.decide.groups import Entry
from torch_sap.decide.keys import check_dtype, is_expanded
from torch_sap.distributed.fsdp import reshard
from torch_sap.distributed.replicas import unwrap
from torch_sap.distributed.sharded import local, part_of, place, wrap
from torch_sap.masks.kinds import EXCLUDED, ROWS, TABLE, UNNAMED, Axes, kind_of

Pair = tuple[nn.Module, str]
"""A module and the name of one of its parameters, as torch.nn.utils.prune takes them."""

ImportanceScores = Mapping[Pair, Tensor] | Callable[[nn.Module], Mapping[Pair, Tensor]]
"""A tensor of scores for each (module, name), or what returns such a mapping for a model."""

Patterns = str | Iterable[str]


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
            if has_mask(module, name) and (here := module._buffers[name + "_mask"]) is not None:
                here = place(here if here.dtype is torch.bool else here != 0, like=self.weight)
                mask = here if mask is None or mask is here else mask & here
        return mask

    @property
    def kinds(self) -> list[Axes | str]:
        """What it is to each holder: the axes of a weight, or why it is none."""
        return [kind_of(module, name, tuple(self.weight.shape)) for module, name in self.holders]

    @property
    def is_table(self) -> bool:
        """Whether it is a lookup table, and to no holder a weight."""
        return set(self.kinds) == {TABLE}

    def entry(self, scores: Tensor | None = None) -> Entry:
        """Entry for the SAP step, ranked by the scores if given."""
        weight, mask = self.weight.detach(), self.mask
        axes = next((kind for kind in self.kinds if isinstance(kind, Axes)), ROWS)
        return Entry(
            self.name,
            local(weight if scores is None else place(scores.detach().to(weight.device), like=weight)),
            None if mask is None else local(mask),
            source="weights" if scores is None else "importance_scores",
            **axes._asdict(),
            part=part_of(weight, self.name),
        )

    def whole(self, mask: Tensor | None) -> Tensor:
        """A mask from the SAP step as the module holds it: sharded like the weight, all True for None."""
        if mask is None:
            return torch.ones_like(self.weight, dtype=torch.bool, requires_grad=False)
        return wrap(mask, like=self.weight)


@dataclass(frozen=True)
class LeftOut:
    """A parameter with more than one dimension that is not pruned."""

    name: str
    """Dotted path by its first holder."""
    shape: tuple[int, ...]
    reason: str
    """One of those in :mod:`torch_sap.masks.kinds`."""


class Found(NamedTuple):
    """What of a model is pruned, and what is not."""

    prunables: list[Prunable]
    left_out: list[LeftOut]


def prunable_parameters(model: nn.Module, exclude: Patterns = (), include: Patterns = ()) -> list[Pair]:
    """The parameters of a model that SAP prunes, in the form that torch.nn.utils.prune takes.

    These are what linear maps and convolutions multiply: parameters with more than one dimension whose own name
    contains "weight" (the paper's rule), and the expert tensors of mixture-of-experts modules. Not norm scales, biases,
    vectors of any shape, class tokens, and lookup tables (token, position, and query embeddings), unless a linear layer
    shares the table.

    Args:
        model: Any module, pruned or not.
        exclude: Patterns (fnmatch) of the path of a parameter (``head.weight``, ``*.downsample.*``) or of a module
            that it is in ("head"). A shared parameter is excluded if one of its paths is.
        include: Patterns of parameters with more than one dimension that are pruned though the rule leaves them out;
            ``exclude`` comes first.

    Returns:
        Pairs of a module and the name of its parameter before pruning, in the model's order. A shared parameter has
        several.

    Raises:
        TypeError: if ``model`` is not a module, or ``exclude`` or ``include`` holds anything but strings.
        ValueError: if a pattern matches nothing.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        >>> prunable_parameters(model, exclude="2")
        [(Linear(in_features=3, out_features=4, bias=True), 'weight')]
    """
    return [pair for prunable in _in_model(model, exclude, include).prunables for pair in prunable.holders]


def resolve(
    target: nn.Module | Iterable[Pair], exclude: Patterns = (), include: Patterns = (), *, masked: bool = False
) -> Found:
    """Find and check the tensors of a model, or of pairs of (module, name), each once.

    With ``masked`` all tensors of a model that have a mask are found, too.

    Raises:
        TypeError: if the target is something else, or a tensor is not of a real floating-point type.
        ValueError: if there is nothing to prune, a parameter does not exist, a tensor has no values, or two share a
            part of their memory.
    """
    if isinstance(target, nn.Module):
        found = _in_model(target, exclude, include, masked=masked)
        if not found.prunables:
            given = "".join(f" {k}={v!r}" for k, v in (("exclude", exclude), ("include", include)) if v)
            raise ValueError(
                "model must have a parameter to prune (more than one dimension and 'weight' in its name), "
                f"but {type(target).__name__} has none" + (f" with{given}" if given else "")
            )
    else:
        for name, patterns in (("exclude", exclude), ("include", include)):
            if patterns:
                raise ValueError(f"{name} needs a model; choose among the (module, name) pairs yourself")
        found = Found(_in_pairs(target), [])
    reshard(module for prunable in found.prunables for module, _ in prunable.holders)
    for prunable in found.prunables:
        weight = prunable.weight
        if is_lazy(weight) or weight.is_meta:
            raise ValueError(f"{prunable.name} must have values, but it is on the meta device or not initialized yet")
        check_dtype(weight, prunable.name)
        if not masked:
            check_names(prunable)
    _check_memory(found.prunables, masked=masked)
    return found


def check_names(prunable: Prunable) -> None:
    """Raise a ValueError if a layer has something else under the names that a pruned tensor needs, or takes none."""
    for module, name in prunable.holders:
        if "." in name:
            raise ValueError(
                f"{prunable.name} must belong to a layer, but {type(module).__name__} keeps it under a dotted name, "
                "as torchrl's losses do; prune the network that was given to it, or exclude it"
            )
        if not has_mask(module, name) and (
            taken := next((new for new in (name + "_orig", name + "_mask") if hasattr(module, new)), None)
        ):
            raise ValueError(
                f"{prunable.name} needs the names {name}_orig and {name}_mask in its layer, but "
                f"{type(module).__name__} has its own {taken}; rename it, or exclude {prunable.name}"
            )


def _check_memory(prunables: Sequence[Prunable], *, masked: bool) -> None:
    """Raise a ValueError if entries share memory: a mask of one would prune the other behind its back."""
    spans = []
    for prunable in prunables:
        tensor = local(prunable.weight.detach())
        if not masked and is_expanded(tensor):
            raise ValueError(
                f"{prunable.name} must have memory of its own for each entry, but it is expanded; use "
                "nn.Parameter(weight.clone()), or exclude it"
            )
        if tensor.numel():
            length = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            start = tensor.data_ptr()
            spans.append((start, start + length * tensor.itemsize, prunable.name, tensor))
    spans.sort(key=lambda span: span[:2])
    for (_, end, before, first), (start, _, name, second) in pairwise(spans):
        if start < end and _share_entries(first, second):
            raise ValueError(
                f"{name} and {before} share memory, but are two Parameters; use one Parameter for both (as in "
                "b.weight = a.weight), or exclude one of them"
            )


def _share_entries(first: Tensor, second: Tensor) -> bool:
    """Whether two overlapping tensors have an entry in common; columns of one matrix have none."""
    if first.dtype != second.dtype or first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr():
        return True
    used = torch.zeros(first.untyped_storage().nbytes() // first.itemsize, dtype=torch.bool, device="cpu")
    used.as_strided(first.shape, first.stride(), first.storage_offset()).fill_(True)
    return bool(used.as_strided(second.shape, second.stride(), second.storage_offset()).any())


def warn_of_left_out(model: nn.Module, found: Found, stacklevel: int) -> None:
    """Warn if more than a tenth of the matrix entries are left out because nothing says that they are weights."""
    matrices = [one for one in found.left_out if one.reason != TABLE and sum(size > 1 for size in one.shape) > 1]
    unknown = {one.name: math.prod(one.shape) for one in matrices if one.reason == UNNAMED}
    total = sum(math.prod(one.shape) for one in matrices) + sum(one.weight.numel() for one in found.prunables)
    if (missed := sum(unknown.values())) > total / 10:
        warnings.warn(
            f"{missed / total:.0%} of the matrix entries of {type(model).__name__} are not pruned, in parameters "
            f"without 'weight' in their names: {some(list(unknown))}. Name them in include= to prune them, or in "
            "exclude= to leave them dense",
            stacklevel=stacklevel + 1,
        )


def entries_of(
    prunables: Sequence[Prunable], importance_scores: ImportanceScores | None = None, model: object = None
) -> list[Entry]:
    """Make entries for the SAP step, ranked by the user's scores where given.

    A dict may leave tensors out, as in PyTorch, and their magnitudes rank them. A callable is asked for all of them:
    one that it misses would be ranked against scores of another scale.

    Raises:
        TypeError: if the scores are not a mapping to real floating-point tensors.
        ValueError: if scores have another shape than their tensor, or belong to none, or a callable leaves some out.
    """
    scores: Any = {} if importance_scores is None else importance_scores
    asked = callable(scores)
    if asked and not isinstance(model, nn.Module):
        raise ValueError("importance_scores may only be a callable for a model, but there are (module, name) pairs")
    scores = scores(model) if asked else scores
    if not isinstance(scores, Mapping):
        raise TypeError(
            "importance_scores must be a dict from (module, name) to a tensor, or a callable that returns one, got "
            f"{type(scores).__name__}"
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
    if asked and (missing := [prunable.name for prunable in prunables if prunable.name not in chosen]):
        raise ValueError(
            "importance_scores must return a tensor for each parameter that is pruned, but none for "
            f"{some(missing)}; add it, or exclude the parameter"
        )
    return [prunable.entry(chosen.get(prunable.name)) for prunable in prunables]


def has_mask(module: nn.Module, name: str) -> bool:
    """Whether a parameter has a mask; a buffer of such a name alone is a layer's own."""
    return name + "_mask" in module._buffers and name + "_orig" in module._parameters


def _parameter(module: nn.Module, name: str) -> tuple[str, nn.Parameter]:
    """The present name of a parameter, and the parameter."""
    now = name + "_orig" if has_mask(module, name) else name
    parameter = module._parameters.get(now)
    if parameter is None:
        raise ValueError(f"name must be a parameter of the module, got {name!r} for {type(module).__name__}")
    return now, parameter


def _in_model(model: nn.Module, exclude: Patterns, include: Patterns, *, masked: bool = False) -> Found:
    check_model(model)
    holders: dict[int, list[Pair]] = {}
    paths: dict[int, list[str]] = {}
    shapes: dict[int, tuple[int, ...]] = {}
    for path, module in unwrap(model).named_modules():
        for now, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = plain if has_mask(module, plain := now.removesuffix("_orig")) else now
            holders.setdefault(id(parameter), []).append((module, name))
            paths.setdefault(id(parameter), []).append(f"{path}.{name}".removeprefix("."))
            shapes[id(parameter)] = (2, 2) if is_lazy(parameter) else tuple(parameter.shape)
    kinds = {key: [kind_of(*pair, shapes[key]) for pair in pairs] for key, pairs in holders.items()}
    weights = {key for key, found in kinds.items() if any(isinstance(kind, Axes) for kind in found)}
    if masked:
        weights |= {key for key, pairs in holders.items() if any(has_mask(*pair) for pair in pairs)}
    matrices = {key: names for key, names in paths.items() if len(shapes[key]) > 1}
    weights |= matching("include", matrices, include)
    excluded = matching("exclude", matrices, exclude)
    prunables = [Prunable(paths[key][0], tuple(holders[key])) for key in holders if key in weights - excluded]
    left_out = [
        LeftOut(paths[key][0], shapes[key], EXCLUDED if key in excluded else str(found[0]))
        for key, found in kinds.items()
        if len(shapes[key]) > 1 and key not in weights - excluded
    ]
    return Found(prunables, left_out)


def matching(argument: str, paths: Mapping[int, Sequence[str]], given: Patterns) -> set[int]:
    """Find the keys of the parameters (with their dotted paths) that the patterns of an argument match.

    Raises:
        TypeError: if something is not a pattern.
        ValueError: if a pattern matches nothing.
    """
    if not isinstance(given, Iterable):
        raise TypeError(f"{argument} must be a pattern or an iterable of patterns, got {given!r}")
    found: set[int] = set()
    for pattern in [given] if isinstance(given, str) else given:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument} must hold patterns (strings), got {pattern!r}")
        matched = {key for key, names in paths.items() if any(_matches(name, pattern) for name in names)}
        if not matched:
            known = some([name for names in paths.values() for name in names])
            rule = f"{argument} must match a parameter with more than one dimension"
            raise ValueError(f"{rule}, but {pattern!r} matches none of: {known}")
        found |= matched
    return found


def kept_patterns(**patterns: Patterns) -> dict[str, str | list[str]]:
    """Patterns by their argument, to be used several times; a TypeError names one that is none."""
    for argument, given in patterns.items():
        if not isinstance(given, Iterable):
            raise TypeError(f"{argument} must be a pattern or an iterable of patterns, got {given!r}")
    return {argument: given if isinstance(given, str) else list(given) for argument, given in patterns.items()}


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
