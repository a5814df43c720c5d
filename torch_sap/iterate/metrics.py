"""What train_fn and eval_fn say of a model, as a dict of floats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Real

from torch import Tensor, nn

from contextlib import nullcontext as allowed, nullcontext as held_back

Metrics = float | Mapping[str, float] | Tensor | None


def check_callable(name: str, function: object) -> None:
    """Raise a TypeError that names a function argument unless it is callable or None."""
    if function is not None and not callable(function):
        raise TypeError(f"{name} must be callable or None, got {function!r}")


def evaluate(model: nn.Module, eval_fn: Callable[[nn.Module], Metrics]) -> dict[str, float]:
    """What eval_fn says of the model, with the modules' train and eval modes put back afterwards."""
    modes = modes_of(model)
    with held_back():
        try:
            with allowed():
                return as_metrics(eval_fn(model), "eval_fn")
        finally:
            set_modes(modes)


def modes_of(model: nn.Module) -> dict[nn.Module, bool]:
    """Whether each module is in train mode."""
    return {module: module.training for module in model.modules()}


def set_modes(modes: Mapping[nn.Module, bool]) -> None:
    """Put modules in the modes that :func:`modes_of` found."""
    for module, training in modes.items():
        module.training = training


def as_metrics(value: Metrics, source: str) -> dict[str, float]:
    """Metrics as a dict of floats."""
    if value is None:
        return {}
    items = value.items() if isinstance(value, Mapping) else [("metric", value)]
    metrics = {}
    for key, number in items:
        scalar = number.numel() == 1 if isinstance(number, Tensor) else isinstance(number, Real)
        if not scalar or not isinstance(key, str):
            raise TypeError(f"{source} must give None, a number or a mapping from names to numbers, got {value!r}")
        metrics[key] = float(number)
    return metrics
