"""Iterative pruning one round at a time: measure, prune, rewind, record. What is pruned is up to a rule."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim import Optimizer

from torch_sap.bounds import FixedRatio, Hyperparameters
from torch_sap.fsdp import reshard
from torch_sap.functional import check_copies, count_remaining, hold_masks
from torch_sap.groups import Entry, Scope
from torch_sap.guarding import guard, unguard
from torch_sap.history import History
from torch_sap.measures import measure, measure_gini
from torch_sap.parameters import entries_of, resolve
from torch_sap.records import TensorRecord
from torch_sap.reparametrised import warn_of_reparametrised
from torch_sap.rewinding import State, check_state, restore, snapshot
from torch_sap.rounds import Round, Sparsity
from torch_sap.step import prune_step

Metrics = float | Mapping[str, float] | Tensor | None
Rewind = Literal["init", "none"] | Mapping[str, Tensor]
SCOPES: tuple[Scope, ...] = ("global", "layer", "neuron")
FORMAT = 1


class Stepper:
    """What :class:`SAP` and the baselines share; they say by which rule entries are pruned."""

    def __init__(
        self,
        model: nn.Module,
        rule: Hyperparameters,
        *,
        scope: Scope,
        rewind: Rewind,
        exclude: str | Iterable[str],
        optimizer: Optimizer | None,
        gini: bool,
    ) -> None:
        if scope not in SCOPES:
            raise ValueError(f"scope must be one of {', '.join(map(repr, SCOPES))}, got scope={scope!r}")
        if isinstance(rewind, str) and rewind not in ("init", "none"):
            raise ValueError(f'rewind must be "init", "none" or a state_dict, got rewind={rewind!r}')
        if optimizer is not None and not hasattr(optimizer, "state"):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.model, self.rule, self.scope, self.optimizer, self.gini = model, rule, scope, optimizer, gini
        self.history = History()
        self._optimizer_state = None if optimizer is None else copy.deepcopy(optimizer.state_dict()["state"])
        self._prunables = resolve(model, exclude)
        warn_of_reparametrised(model, stacklevel=3)
        self._sparsity()  # raises here if a weight is not finite
        self._rewinds = rewind != "none" if isinstance(rewind, str) else True
        self._rewind_point: State | None = None
        if rewind == "init":
            self._rewind_point = snapshot(model)
        elif not isinstance(rewind, str):
            self._rewind_point = check_state(model, rewind)
        self._at_rewind_point = rewind == "init"
        self._new = [prunable for prunable in self._prunables if prunable.mask is None]
        hold_masks(self._prunables, [prunable.mask for prunable in self._prunables])
        guard(model)
        self._ended = time.perf_counter()

    def step(self, metrics: Metrics = None, eval_fn: Callable[[nn.Module], Metrics] | None = None) -> Round:
        """Measure the trained model, prune it, and rewind what is left.

        Args:
            metrics: Metrics of the trained model, for the history: a number (recorded as "metric") or a mapping of
                numbers.
            eval_fn: Called with the pruned model before it is rewound; what it returns is recorded as
                ``pruned_metrics``.

        Returns:
            The round, which is the last of ``history`` now.

        Raises:
            ValueError: if a weight is NaN or infinite; the parameter is named and nothing is changed.
            TypeError: if the metrics are neither None, a number nor a mapping of numbers; nothing is changed.
            Whatever eval_fn raises; the round is complete then and in the history, without its ``pruned_metrics``.
        """
        recorded = as_metrics(metrics, "metrics")
        check_callable("eval_fn", eval_fn)
        entries = self._entries()
        retrained, before = self._sparsity(), count_remaining(self._prunables)
        with torch.no_grad():
            result = prune_step(entries, self.scope, self.rule)
            check_copies(self.model, self._prunables, result.masks)
            hold_masks(self._prunables, result.masks)
        pruned, after = self._sparsity(), count_remaining(self._prunables)
        pruned_metrics: dict[str, float] = {}
        try:
            if eval_fn is not None:
                pruned_metrics = evaluate(self.model, eval_fn)
        finally:
            self._rewind()
            found = self._append(result.groups, before, after, retrained, pruned, recorded, pruned_metrics)
        return found

    def record(self, metrics: Metrics = None) -> Round:
        """Measure the trained model and prune nothing: the last training of an iterative pruning.

        Arguments, result and errors are those of :meth:`step`.
        """
        recorded = as_metrics(metrics, "metrics")
        retrained, counts = self._sparsity(), count_remaining(self._prunables)
        with torch.no_grad():
            groups = prune_step(self._entries(), self.scope, FixedRatio(**self._norms(), ratio=0.0)).groups
        return self._append(groups, counts, counts, retrained, None, recorded, {})

    def set_rewind_point(self) -> None:
        """Make the model's state at this moment the one that later rounds rewind to (late rewinding).

        Call it inside a training, after the first epochs for example. The state is copied.

        Raises:
            ValueError: if the stepper does not rewind.
        """
        if not self._rewinds:
            raise ValueError('rewind must not be "none" for set_rewind_point')
        self._rewind_point = snapshot(self.model)

    def state_dict(self) -> dict[str, Any]:
        """What the model's state_dict does not hold, as plain values and tensors: settings, rewind point, history."""
        return {
            "format": FORMAT,
            "settings": self._settings(),
            "rewind_point": None if self._rewind_point is None else dict(self._rewind_point),
            "history": self.history.to_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`, after the model has loaded its own (masks and weights).

        Raises:
            ValueError: if the state is of another format, of other settings or of another model; nothing is changed.
        """
        if not isinstance(state, Mapping) or state.get("format") != FORMAT:
            raise ValueError(f"state must be a state_dict of a torch_sap stepper of format {FORMAT}")
        own, other = self._settings(), dict(state["settings"])
        different = sorted(key for key in own.keys() | other.keys() if own.get(key) != other.get(key))
        if different:
            listed = "; ".join(f"{key}: {own.get(key)!r} here, {other.get(key)!r} in the state" for key in different)
            raise ValueError(f"state must come from a stepper with the same settings, but they differ: {listed}")
        point, history = state["rewind_point"], History.from_dict(state["history"])
        self._rewind_point = None if point is None else check_state(self.model, point)
        self.history = history
        self._at_rewind_point = False

    def _settings(self) -> dict[str, Any]:
        tensors = {prunable.name: list(prunable.weight.shape) for prunable in self._prunables}
        return {
            "class": type(self).__name__,
            "scope": self.scope,
            **self.rule.to_dict(),
            "rewinds": self._rewinds,
            "tensors": tensors,
        }

    def _norms(self) -> dict[str, float]:
        return {key: value for key, value in self.rule.to_dict().items() if key != "ratio"}

    def _entries(self) -> list[Entry]:
        """What is ranked: the weights."""
        reshard(self.model.modules())
        return entries_of(self._prunables, None)

    def _sparsity(self) -> Sparsity:
        reshard(self.model.modules())
        entries = entries_of(self._prunables, None)
        with torch.no_grad():
            pqi: dict[str, Any] = {str(scope): measure(entries, scope, self.rule.p, self.rule.q) for scope in SCOPES}
            gini: dict[str, Any] = {str(scope): measure_gini(entries, scope) for scope in SCOPES if self.gini}
        return Sparsity(pqi, gini or None)

    def _rewind(self) -> None:
        if self._rewind_point is not None:
            restore(self.model, self._rewind_point, self._prunables)
            self._at_rewind_point = True
            if self.optimizer is not None:  # not just cleared: some fill their state when they are made
                state = copy.deepcopy(self._optimizer_state)  # the optimizer takes the tensors, and writes into them
                self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})

    def _append(
        self,
        groups: Mapping[str, Any],
        before: tuple[TensorRecord, ...],
        after: tuple[TensorRecord, ...],
        retrained: Sparsity,
        pruned: Sparsity | None,
        metrics: dict[str, float],
        pruned_metrics: dict[str, float],
    ) -> Round:
        now = time.perf_counter()
        found = Round(
            number=len(self.history),
            scope=self.scope,
            hyperparameters=self.rule.to_dict(),
            groups=groups,
            tensors=before,
            tensors_after=after,
            retrained=retrained,
            pruned=pruned,
            metrics=metrics,
            pruned_metrics=pruned_metrics,
            seconds=now - self._ended,
        )
        self._ended = now
        self.history.append(found)
        return found

    @contextmanager
    def unchanged_on_error(self) -> Iterator[None]:
        """Put the model's values back to what they are now if a training fails."""
        start = self._rewind_point if self._at_rewind_point else snapshot(self.model)
        self._at_rewind_point = False
        try:
            yield
        except Exception:
            assert start is not None
            restore(self.model, start, self._prunables)
            raise

    def undo(self) -> None:
        """Take masks away that this stepper brought, before it has pruned anything."""
        reshard(self.model.modules())
        for prunable in self._new:
            for module, name in prunable.holders:
                prune.remove(module, name)
        if len(self._new) == len(self._prunables):
            unguard(self.model)


def check_callable(name: str, function: object) -> None:
    """Raise a TypeError that names a function argument unless it is callable or None."""
    if function is not None and not callable(function):
        raise TypeError(f"{name} must be callable or None, got {function!r}")


def evaluate(model: nn.Module, eval_fn: Callable[[nn.Module], Metrics]) -> dict[str, float]:
    """What eval_fn says of the model, with the modules' train and eval modes put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        return as_metrics(eval_fn(model), "eval_fn")
    finally:
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
