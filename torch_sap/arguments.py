"""Checks of arguments at the public edge, with one form of message: name, rule, value."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from numbers import Real

from torch import nn


def check_number(name: str, value: object, *, low: float | None = None, high: float | None = None) -> None:
    """Raise unless a value is a finite real number (no bool), not below ``low`` and not above ``high``."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a real number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {name}={value}")
    _check_range(name, value, low, high)


def check_int(name: str, value: object, *, low: int | None = None, high: int | None = None) -> None:
    """Raise unless a value is an int and not a bool, not below ``low`` and not above ``high``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    _check_range(name, value, low, high)


def _check_range(name: str, value: Real | int, low: float | None, high: float | None) -> None:
    if (low is None or value >= low) and (high is None or value <= high):  # type: ignore[operator]
        return
    at_least = "not be negative" if low == 0 else f"be {low} or more"
    rule = at_least if high is None else f"lie in [{low}, {high}]"
    raise ValueError(f"{name} must {rule}, got {name}={value}")


def check_norms(p: float, q: float) -> None:
    """Raise unless ``0 < p < q`` and both are finite numbers."""
    check_number("p", p)
    check_number("q", q)
    if p <= 0:
        raise ValueError(f"p must be positive, got p={p}")
    if p >= q:
        raise ValueError(f"p must be smaller than q, got p={p}, q={q}")


def check_flag(name: str, value: object) -> None:
    """Raise unless a value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise unless a value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {name}={value!r}")


def check_callable(name: str, function: object) -> None:
    """Raise unless a value is callable or None."""
    if function is not None and not callable(function):
        raise TypeError(f"{name} must be callable or None, got {function!r}")


def check_model(model: object) -> None:
    """Raise unless a value is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


_SHOWN = 5
"""Names that a message lists before it counts the rest."""


def some(names: Sequence[str], separator: str = ", ") -> str:
    """List the first few names, and how many more there are."""
    shown, more = separator.join(names[:_SHOWN]), len(names) - _SHOWN
    return shown if more <= 0 else f"{shown}{separator}and {more} more"


def check_path(name: str, path: object) -> None:
    """Raise unless a value can be the path of a file."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{name} must be the path of a file, got {path!r}")
    if os.path.isdir(path):
        raise IsADirectoryError(f"{name} must be the path of a file, but {path} is a folder; name a file in it")


@contextmanager
def needs(user: str, package: str, extra: str) -> Iterator[None]:
    """Name the extra to install if an import in the block fails."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{user} needs {package}: pip install 'torch_sap[{extra}]'") from error
