"""How much of a model's matrices torch_sap finds, without values, and whether it warns about the rest."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from torch_sap.masks.parameters import Found, LeftOut, _in_model, warn_of_left_out
from torch_sap.masks.reparametrized import warn_of_reparametrized
from zoo.libraries import LIBRARIES

ENOUGH = 0.9
"""The share of the matrix entries that are found without a word."""


@dataclass(frozen=True)
class Coverage:
    """One model.

    Attributes:
        library: Its library.
        model: Its name there.
        made: The class that was built.
        tensors: Weights that torch_sap prunes; shared ones count once.
        entries: Entries of the parameters with at least two dimensions larger than one that are in no lookup table.
        found: How many of them are pruned.
        share: found / entries.
        warned: What is named by a warning: "", "left out", or "computed".
        left_out: The largest parameters that are not pruned, with the reason, if they are more than a tenth.
        failure: Empty, or why the model cannot be built.
        made_with: Versions.
    """

    library: str
    model: str
    made: str = ""
    tensors: int = 0
    entries: int = 0
    found: int = 0
    share: float = 0.0
    warned: str = ""
    left_out: str = ""
    failure: str = ""
    made_with: str = ""


def coverage(path: str) -> Coverage:
    """Build a model, named as LIBRARY/MODEL, on the meta device and count what torch_sap finds in it."""
    library, _, name = path.partition("/")
    made_with = LIBRARIES[library].made_with()
    try:
        model = without_values(partial(LIBRARIES[library].build, name))
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return Coverage(library, name, failure=text[:200], made_with=made_with)
    found = _in_model(model, (), ())
    entries = sum(parameter.numel() for parameter in matrices(model))
    pruned = sum(parameter.numel() for parameter in matrices(model, {id(one.weight) for one in found.prunables}))
    share = pruned / entries if entries else 1.0
    return Coverage(
        library,
        name,
        type(model).__name__,
        tensors=len(found.prunables),
        entries=entries,
        found=pruned,
        share=round(share, 4),
        warned=warned(model, found),
        left_out="" if share >= ENOUGH else largest(found.left_out),
        made_with=made_with,
    )


def without_values(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model on the meta device, or on the CPU if it computes with values while it is built."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                return build()
        except (NotImplementedError, RuntimeError) as error:
            if "meta tensor" not in str(error):
                raise
        return build()


def is_table(module: nn.Module) -> bool:
    """Whether a module is a lookup table: nn.Embedding, or the copy of it that I-BERT has of its own."""
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or type(module).__name__ == "QuantEmbedding"


def matrices(model: nn.Module, of: set[int] | None = None) -> list[nn.Parameter]:
    """The parameters, or those of some, with at least two dimensions larger than one that are in no lookup table."""
    tables = {id(p) for m in model.modules() if is_table(m) for p in m.parameters(recurse=False)}
    return [
        parameter
        for parameter in model.parameters()
        if not is_lazy(parameter)
        and sum(size > 1 for size in parameter.shape) > 1
        and id(parameter) not in tables
        and (of is None or id(parameter) in of)
    ]


def warned(model: nn.Module, found: Found) -> str:
    """What the functions and SAP would warn about."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_left_out(model, found, 1)
        about = ["left out"] if caught else []
        warn_of_reparametrized(model, 1)
        if len(caught) > len(about):
            about.append("computed")
    return " and ".join(about)


def largest(left_out: Sequence[LeftOut], count: int = 4) -> str:
    """The names of the parameters that hold the most entries, without their places in the model, and the reason."""
    sizes: Counter[str] = Counter()
    for one in left_out:
        sizes[f"{'.'.join(one.name.split('.')[-2:])} ({one.reason})"] += math.prod(one.shape)
    return ", ".join(name for name, _ in sizes.most_common(count))
