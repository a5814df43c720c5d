"""Iterative pruning one round at a time: measure, prune, rewind, record. What is pruned is up to a rule."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim import Optimizer

from torch_sap.arguments import check_flag
from torch_sap.decide.bounds import Hyperparameters
from torch_sap.decide.groups import Entry, Scope, check_scope
from torch_sap.decide.step import prune_step
from torch_sap.distributed.fsdp import reshard
from torch_sap.distributed.replicas import share, wrapper_of
from torch_sap.distributed.sharded import local
from torch_sap.files.checkpoint import differences
from torch_sap.iterate.metrics import Metrics, as_metrics, check_callable, evaluate, modes_of, set_modes
from torch_sap.iterate.rewinding import Rewind, State, anew, check_state, restore, rewind_point, snapshot
from torch_sap.masks.guards import guard, unguard
from torch_sap.masks.mask import check_copies, hold_masks
from contextlib import nullcontext as held_back
from torch_sap.masks.mask import finish as complete
from torch_sap.masks.mask import hooks_of
from torch_sap.masks.zeros import check_optimizer
from torch_sap.masks.parameters import entries_of, resolve
from torch_sap.masks.reparametrized import warn_of_reparametrized
from torch_sap.records.history import History
from torch_sap.records.round import Round, Sparsity

FORMAT = 1


class Plan(NamedTuple):
    """What a step would do to the trained model: the round so far, and the new mask of each tensor (None: as it is)."""

    round: Round
    masks: list[Tensor | None]


class Kept(NamedTuple):
    """A trained model that may be given back: the number of its round, its state, the mask of each tensor."""

    number: int
    state: State
    masks: list[Tensor | None]


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
        check_scope(scope)
        check_flag("gini", gini)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        check_optimizer(optimizer, model)
        self.model, self.rule, self.scope, self.optimizer, self.gini = model, rule, scope, optimizer, gini
        self.history = History()
        self._optimizer_start = None if optimizer is None else copy.deepcopy(optimizer.state_dict())
        self._prunables = resolve(model, exclude)
        warn_of_reparametrized(model, stacklevel=3)
        self._sparsity()  # raises here if a weight is not finite
        self._rewind_point = rewind_point(model, rewind)
        self._rewinds = self._rewind_point is not None
        self._at_rewind_point = rewind == "init"
        self._new = [prunable for prunable in self._prunables if prunable.mask is None]
        self._kept: Kept | None = None
        self._ended = time.perf_counter()
        try:
            with held_back():
                hold_masks(self._prunables, [prunable.mask for prunable in self._prunables])
                guard(model)
        except BaseException:
            self.undo()
            raise

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
            Exception: whatever eval_fn raises; the round is then complete and in the history, without pruned_metrics.
        """
        check_callable("eval_fn", eval_fn)
        return self.apply(self.plan(metrics), eval_fn)

    def plan(self, metrics: Metrics = None) -> Plan:
        """Measure the trained model and decide what a step prunes, changing nothing; argument and errors as of step."""
        recorded = as_metrics(metrics, "metrics")
        entries = self._entries()
        retrained = self._sparsity()
        from torch_sap.records.report import TensorRecord
        from torch_sap.decide.sums import power_sums
        mk=lambda rem: tuple(TensorRecord(p.name, tuple(p.weight.shape), r, p.weight.numel()) for p, r in zip(self._prunables, rem))
        counts = mk(power_sums(entries, self.rule.p, self.rule.q).remaining)
        with torch.no_grad():
            result = prune_step(entries, self.scope, self.rule)
        found = Round(
            number=len(self.history),
            scope=self.scope,
            hyperparameters=self.rule.to_dict(),
            groups=result.groups,
            tensors=counts,
            tensors_after=counts,
            retrained=retrained,
            pruned=None,
            metrics=recorded,
        )
        return Plan(found, result.masks)

    def apply(self, plan: Plan, eval_fn: Callable[[nn.Module], Metrics] | None = None) -> Round:
        """Prune the model, which is as it was planned for, and rewind what is left; arguments and errors as of step."""
        with torch.no_grad():
            copies = wrapper_of(self.model)
            check_copies(copies, self._prunables, plan.masks)
            share(copies, self._rewind_point or {})
            masks = [p.whole(mask) for p, mask in zip(self._prunables, plan.masks, strict=True)]
        from torch_sap.records.report import TensorRecord
        from torch_sap.decide.sums import power_sums
        mk=lambda rem: tuple(TensorRecord(p.name, tuple(p.weight.shape), r, p.weight.numel()) for p, r in zip(self._prunables, rem))
        after = mk(power_sums([replace(e, mask=m) for e, m in zip(entries_of(self._prunables, None), plan.masks)], self.rule.p, self.rule.q).remaining)
        found = replace(plan.round, pruned=self._sparsity(plan.masks), tensors_after=after)
        rewind = self._prepare_rewinding()
        with held_back():  # from here on to the end, whatever is raised
            try:
                with torch.no_grad():
                    hold_masks(self._prunables, masks)
                if eval_fn is not None:
                    found = replace(found, pruned_metrics=evaluate(self.model, eval_fn))
            finally:
                try:
                    complete(rewind)
                finally:
                    found = self._append(found)
        return found

    def record(self, metrics: Metrics = None) -> Round:
        """Measure the trained model and prune nothing: the last training of an iterative pruning.

        Arguments, result and errors are those of :meth:`step`.
        """
        return self.end(self.plan(metrics))

    def end(self, plan: Plan) -> Round:
        """Record the round that was planned, without its pruning."""
        groups = {name: replace(group, c=group.c * 0) for name, group in plan.round.groups.items()}
        return self._append(replace(plan.round, groups=groups))

    def keep(self) -> None:
        """Copy the trained model, to be given back by :meth:`give_back` whatever later rounds do to it."""
        masks = [None if (mask := p.mask) is None else local(mask).clone() for p in self._prunables]
        self._kept = Kept(len(self.history), snapshot(self.model), masks)

    def give_back(self) -> None:
        """Give the model the weights, buffers and masks that were kept last, if any were."""
        if self._kept is not None:
            self.put(self._kept.state, self._kept.masks)
            self.history.returned = self._kept.number
            self._kept = None

    def put(self, state: State, masks: Sequence[Tensor | None]) -> None:
        """Give the model a state and masks: all of it or, if there is no memory, nothing."""
        with torch.no_grad():
            whole = [p.whole(mask) for p, mask in zip(self._prunables, masks, strict=True)]
            with held_back():
                try:
                    hold_masks(self._prunables, whole)
                finally:
                    complete(lambda: restore(self.model, state, self._prunables))

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
        """What the model's state_dict does not hold, as plain values and tensors.

        Settings, rewind point, the model that was kept to be given back, history.
        """
        return {
            "format": FORMAT,
            "settings": self._settings(),
            "rewind_point": None if self._rewind_point is None else dict(self._rewind_point),
            "kept": None if self._kept is None else self._kept._asdict(),
            "history": self.history.to_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`, after the model has loaded its own (masks and weights).

        Raises:
            ValueError: if the state is of another format, of other settings or of another model; nothing is changed.
        """
        types = {"settings": Mapping, "rewind_point": Mapping | None, "kept": Mapping | None, "history": Mapping}
        ours = isinstance(state, Mapping) and state.get("format") == FORMAT and types.keys() <= state.keys()
        if not ours or not all(isinstance(state[name], kind) for name, kind in types.items()):
            raise ValueError(f"state must be a state_dict of a torch_sap stepper of format {FORMAT}")
        if different := differences(self._settings(), state["settings"], "in the state"):
            raise ValueError(f"state must come from a stepper with the same settings, but they differ: {different}")
        kept = state["kept"]
        point = None if state["rewind_point"] is None else check_state(self.model, state["rewind_point"])
        if kept is not None:
            kept = Kept(kept["number"], check_state(self.model, kept["state"]), kept["masks"])
        self.history = History.from_dict(state["history"])
        self._rewind_point, self._kept, self._at_rewind_point = point, kept, False

    def _settings(self) -> dict[str, Any]:
        return {
            "class": type(self).__name__,
            "scope": self.scope,
            **self.rule.to_dict(),
            "rewinds": self._rewinds,
            "tensors": {prunable.name: list(prunable.weight.shape) for prunable in self._prunables},
        }

    def _entries(self) -> list[Entry]:
        """What is ranked: the weights."""
        reshard(self.model.modules())
        return entries_of(self._prunables, None)

    def _sparsity(self, masks: Sequence[Tensor | None] | None = None) -> Sparsity:
        """Of the model as it is, or with other masks."""
        reshard(self.model.modules())
        entries = entries_of(self._prunables, None)
        if masks is not None:
            entries = [replace(entry, mask=mask) for entry, mask in zip(entries, masks, strict=True)]
        return Sparsity.of(entries, self.rule.p, self.rule.q, gini=self.gini)

    def _prepare_rewinding(self) -> Callable[[], None]:
        """What rewinds model and optimizer, with nothing left to compute."""
        point, optimizer, start = self._rewind_point, self.optimizer, self._optimizer_start
        if point is None:
            return lambda: None
        fresh = None if optimizer is None or start is None else anew(optimizer, start)

        def rewind() -> None:
            restore(self.model, point, self._prunables)
            if optimizer is not None and fresh is not None:
                optimizer.load_state_dict(fresh)
            self._at_rewind_point = True

        return rewind

    def _append(self, found: Round) -> Round:
        now = time.perf_counter()
        found, self._ended = replace(found, seconds=now - self._ended), now
        self.history.append(found)
        return found

    @contextmanager
    def unchanged_on_error(self) -> Iterator[None]:
        """Put the model's values and modes back to what they are now if a training fails."""
        start, modes = self._rewind_point if self._at_rewind_point else snapshot(self.model), modes_of(self.model)
        assert start is not None
        self._at_rewind_point = False
        try:
            yield
        except BaseException:
            with held_back():
                set_modes(modes)
                complete(lambda: restore(self.model, start, self._prunables))
            raise

    def undo(self) -> None:
        """Take masks away that this stepper brought, before it has pruned anything."""
        reshard(self.model.modules())
        with held_back():
            for prunable in self._new:
                for module, name in prunable.holders:
                    if hooks_of(module, name):
                        prune.remove(module, name)
            if len(self._new) == len(self._prunables):
                unguard(self.model)
