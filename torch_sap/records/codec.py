"""Records as JSON and back: frozen dataclasses of numbers, strings, arrays, mappings, sequences and other records.

NaN becomes null, an infinity "inf" or "-inf", and an array a list; the annotations of the dataclass say how to read
them back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

Record = TypeVar("Record")
_hints = cache(get_type_hints)


def to_plain(value: Any) -> Any:
    """Convert a record to values that JSON can hold: None for NaN, "inf" and "-inf" for infinities."""
    if is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return value.tolist() if np.isfinite(value).all() else to_plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def from_plain(kind: type[Record], values: Any) -> Record:
    """Read a record that :func:`to_plain` converted; a ValueError says what is missing or of another type."""
    try:
        return _read(kind, values)  # type: ignore[no-any-return]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        name, found = kind.__name__, f"no {error}" if isinstance(error, KeyError) else str(error)
        text = f"{name.lower()} must be what {name}.to_dict wrote, but is not or is damaged: {found}"
        raise ValueError(text) from error


def _read(kind: Any, value: Any) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is UnionType:  # always "X | None"
        return None if value is None else _read(arguments[0], value)
    if is_dataclass(kind):
        _check(value, Mapping)
        names, hints = [each.name for each in fields(kind)], _hints(kind)  # type: ignore[arg-type]
        return kind(**{name: _read(hints[name], value[name]) for name in names})  # type: ignore[operator]
    if origin in (np.ndarray, NDArray):  # NDArray is a type of its own from NumPy 2.5 and Python 3.12 on
        _check(value, list)
        dtype, *_ = get_args(arguments[-1]) or arguments
        return np.array([math.nan if item is None else item for item in value], dtype)
    if kind is float:
        return math.nan if value is None else float(value)
    if origin is None:
        _check(value, kind)
        return value
    if issubclass(origin, Mapping):
        _check(value, Mapping)
        return {key: _read(arguments[1], item) for key, item in value.items()}
    _check(value, (list, tuple))
    return tuple(_read(arguments[0], item) for item in value)


def _check(value: Any, kind: Any) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"expected {getattr(kind, '__name__', 'list').lower()}, got {type(value).__name__}")
