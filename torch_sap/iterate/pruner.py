"""Iterative pruning, one round at a time: measure, prune, rewind, record. SAP and the paper's baselines.

A round reads the weights once before its pruning and once after it. Everything that can fail is computed before
anything is changed; the copying that is left is finished even if it raises.

Sources: Algorithm 1 of Diao et al., ICLR 2023 (arXiv 2302.05601); Frankle and Carbin, "The lottery ticket hypothesis",
ICLR 2019.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torch.optim import Optimizer

from torch_sap.arguments import check_callable, check_flag, check_model
from torch_sap.decide.bounds import FixedRatio, Hyperparameters
from torch_sap.decide.groups import Entry, Scope, check_scope
from torch_sap.decide.measures import PowerSums, power_sums
from torch_sap.decide.step import GroupValues, StepResult, prune_step
from torch_sap.distributed.fsdp import reshard
from torch_sap.distributed.replicas import share, wrapper_of
from torch_sap.files.checkpoint import differences
from torch_sap.iterate.rewinding import (
    Rewind,
    State,
    check_state,
    copier,
    finish,
    masks_of,
    modes_of,
    rewind_point,
    set_modes,
    snapshot,
)
from torch_sap.masks.guarding import guard, unguard
from torch_sap.masks.holding import check_copies, hold_masks
from torch_sap.masks.linking import hooks_of
from torch_sap.masks.optimizers import check_optimizer
from torch_sap.masks.parameters import entries_of, resolve
from torch_sap.masks.reparametrized import warn_of_reparametrised
from torch_sap.records.history import History
from torch_sap.records.metrics import Metrics, as_metrics
from torch_sap.records.report import tensor_records
from torch_sap.records.round import Measured, Round, Sparsity

FORMAT = 2
"""Of a pruner's state_dict."""


class Plan(NamedTuple):
    """What a round found before its pruning, and what it is to prune; None: nothing."""

    measured: Measured
    pruning: StepResult | None


class Kept(NamedTuple):
    """A trained model that may be given back: the number of its round, its state, the mask of each tensor."""

    number: int
    state: State
    masks: list[Tensor | None]


class Pruner:
    """Iterative pruning by a rule, one round per call, like a learning-rate scheduler; base of SAP and the baselines.

    Creating one gives the model the form that it keeps in all rounds (``weight_orig``, ``weight_mask`` of ones): names
    and Parameter objects do not change any more, so optimizers, averages and compiled models created afterwards keep
    working. A subclass overrides :meth:`rank` to rank entries by something else than the weights. Methods that begin
    with an underscore are for the loop in :mod:`torch_sap.iterative`.

    Args:
        model: Any module. It is pruned in place.
        rule: How many entries of a group a round prunes.
        scope: What one I, r and c are computed over: "global" (all weights), "layer" (a tensor), "neuron" (an output
            channel). The default is "layer": a network that is trained again after each pruning can do with layers of
            very different density, and no layer loses everything at once.
        rewind: What the surviving weights, all other parameters and the buffers are set back to: "init" (their state
            now), "none" (nothing: training goes on), or a state_dict of the model from before or after pruning.
        exclude: Patterns of what not to prune, see :func:`prunable_parameters`.
        optimizer: An optimizer that lives through all rounds, if there is one: rewinding sets its state back to what
            it is now. Its learning rate stays as the user's schedule has it.
        gini: Whether to measure the Gini index in each round, too. It needs a sort of all weights.

    Attributes:
        history: The rounds so far.
        prunables: The tensors that are pruned.

    Raises:
        ValueError: if an argument is out of its range, weights are NaN or infinite, or there is nothing to prune.
        TypeError: if an argument or a weight is of a wrong type. The model is as before if anything is raised.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: Hyperparameters,
        *,
        scope: Scope = "layer",
        rewind: Rewind = "init",
        exclude: str | Iterable[str] = (),
        optimizer: Optimizer | None = None,
        gini: bool = False,
    ) -> None:
        check_scope(scope)
        check_flag("gini", gini)
        check_model(model)
        check_optimizer(optimizer, model)
        self.model, self.rule, self.scope, self.optimizer, self.gini = model, rule, scope, optimizer, gini
        self.history = History()
        self.prunables = resolve(model, exclude)
        warn_of_reparametrised(model, stacklevel=3)
        self.check_finite()
        if gini and (sharded := [entry.name for entry in self._entries() if entry.part is not None]):
            raise NotImplementedError(f"gini needs whole tensors, but {sharded[0]} is sharded; leave it out")
        self._rewind_point = rewind_point(model, rewind)
        self._at_rewind_point = rewind == "init"
        self._optimizer_start = None if optimizer is None else copy.deepcopy(optimizer.state_dict())
        self._new = [prunable for prunable in self.prunables if prunable.mask is None]
        self._kept: Kept | None = None
        self._ended = time.perf_counter()
        try:
            hold_masks(self.prunables, [prunable.mask for prunable in self.prunables])
            guard(model)
        except BaseException:
            self._remove_masks()
            raise

    def rank(self, entries: list[Entry]) -> list[Entry]:
        """Give the entries the scores that rank them; here the weights themselves."""
        return entries

    def step(self, metrics: Metrics = None, eval_fn: Callable[[nn.Module], Metrics] | None = None) -> Round:
        """Measure the trained model, prune it, and rewind what is left.

        Args:
            metrics: Metrics of the trained model, for the history: a number (recorded as "metric") or a mapping of
                numbers.
            eval_fn: Called with the pruned model before it is rewound; its result is recorded as ``pruned_metrics``.

        Returns:
            The round, now the last of ``history``.

        Raises:
            ValueError: if a weight is NaN or infinite; the parameter is named and nothing is changed.
            TypeError: if the metrics are neither None, a number nor a mapping of numbers; nothing is changed.
            Exception: whatever eval_fn raises; the round is then complete and in the history, without pruned_metrics.
        """
        check_callable("eval_fn", eval_fn)
        return self._prune(self._plan(metrics), eval_fn)

    def record(self, metrics: Metrics = None) -> Round:
        """Measure the trained model and prune nothing: the last training of an iterative pruning.

        Arguments, result and errors are those of :meth:`step`.
        """
        return self._record(self._measure(metrics))

    def set_rewind_point(self) -> None:
        """Let later rounds rewind to the model's state at this moment (late rewinding), which is copied.

        Call it inside a training, for example after the first epochs.

        Raises:
            ValueError: if the pruner does not rewind.
        """
        if self._rewind_point is None:
            raise ValueError('rewind must not be "none" for set_rewind_point')
        self._rewind_point = snapshot(self.model)

    def state_dict(self) -> dict[str, Any]:
        """Collect what the states of model and optimizer do not hold, as plain values and tensors.

        Settings, rewind point, the optimizer's state at the start, the model that was kept to be given back, the
        history, and the seconds since the last round.
        """
        return {
            "format": FORMAT,
            "settings": self._settings(),
            "rewind_point": None if self._rewind_point is None else dict(self._rewind_point),
            "optimizer_start": self._optimizer_start,
            "kept": None if self._kept is None else self._kept._asdict(),
            "history": self.history.to_dict(),
            "seconds": time.perf_counter() - self._ended,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state_dict`, after the model has loaded its own (masks and weights).

        Raises:
            ValueError: if the state has another format, other settings or another model; nothing is changed.
        """
        types: dict[str, Any] = {"settings": Mapping, "history": Mapping, "seconds": float}
        types |= dict.fromkeys(("rewind_point", "optimizer_start", "kept"), Mapping | None)
        ours = isinstance(state, Mapping) and state.get("format") == FORMAT and types.keys() <= state.keys()
        if not ours or not all(isinstance(state[name], kind) for name, kind in types.items()):
            raise ValueError(f"state must be a state_dict of a torch_sap pruner in format {FORMAT}")
        if different := differences(self._settings(), state["settings"], "in the state"):
            raise ValueError(f"state must come from a pruner with the same settings, but they differ: {different}")
        kept = state["kept"]
        point = None if state["rewind_point"] is None else check_state(self.model, state["rewind_point"])
        if kept is not None:
            kept = Kept(kept["number"], check_state(self.model, kept["state"]), kept["masks"])
        self.history = History.from_dict(state["history"])
        self._rewind_point, self._kept, self._at_rewind_point = point, kept, False
        self._optimizer_start = state["optimizer_start"] or self._optimizer_start
        self._ended = time.perf_counter() - state["seconds"]

    def check_finite(self) -> None:
        """Raise a ValueError that names the first weight with NaN or infinite entries."""
        power_sums(self._entries(), self.rule.p, self.rule.q)

    def _settings(self) -> dict[str, Any]:
        return {
            "class": type(self).__name__,
            "scope": self.scope,
            **self.rule.to_dict(),
            "rewinds": self._rewind_point is not None,
            "gini": self.gini,
            "tensors": {prunable.name: list(prunable.weight.shape) for prunable in self.prunables},
        }

    def _entries(self) -> list[Entry]:
        reshard(self.model.modules())
        return entries_of(self.prunables, None)

    def _plan(self, metrics: Metrics = None) -> Plan:
        """Measure the trained model and decide what to prune, changing nothing; argument and errors as of step."""
        recorded, entries = as_metrics(metrics, "metrics"), self._entries()
        with torch.no_grad():
            ranked = self.rank(entries)
            found = prune_step(ranked, self.scope, self.rule)
            sums = found.sums if ranked is entries else power_sums(entries, self.rule.p, self.rule.q)
            return Plan(self._measured(recorded, entries, sums, found.groups), found)

    def _measure(self, metrics: Metrics = None) -> Plan:
        """Measure the trained model for a round that prunes nothing, without masks; argument and errors as of step."""
        recorded, entries = as_metrics(metrics, "metrics"), self._entries()
        with torch.no_grad():
            ranked, rule = self.rank(entries), self.rule
            found = power_sums(ranked, rule.p, rule.q)
            sums = found if ranked is entries else power_sums(entries, rule.p, rule.q)
            index = found.index(self.scope)
            groups = {
                name: GroupValues(d, index[name], rule.retain(index[name], d), rule.count(index[name], d))
                for name, d in found.d(self.scope).items()
            }
            return Plan(self._measured(recorded, entries, sums, groups), None)

    def _measured(
        self, metrics: Mapping[str, float], entries: list[Entry], sums: PowerSums, groups: Mapping[str, GroupValues]
    ) -> Measured:
        return Measured(
            number=len(self.history),
            scope=self.scope,
            hyperparameters=self.rule.to_dict(),
            groups=groups,
            tensors=tensor_records(self.prunables, sums.remaining),
            retrained=Sparsity.of(sums, entries if self.gini else None),
            metrics=metrics,
        )

    def _prune(self, plan: Plan, eval_fn: Callable[[nn.Module], Metrics] | None = None) -> Round:
        """Prune the model for which a plan was made, and rewind what is left; arguments and errors as of step."""
        assert plan.pruning is not None
        masks, point, metrics = plan.pruning.masks, self._rewind_point, {}
        with torch.no_grad():
            copies = wrapper_of(self.model)
            check_copies(copies, self.prunables, masks)
            share(copies, point or {})
            left = [replace(entry, mask=mask) for entry, mask in zip(self._entries(), masks, strict=True)]
            pruned = Sparsity.of(power_sums(left, self.rule.p, self.rule.q), left if self.gini else None)
        after = tensor_records(self.prunables, plan.pruning.remaining)
        prune = copier(self.model, None, self.prunables, masks)
        changes = copier(self.model, point, self.prunables, masks), self._start_optimizer()
        try:
            if eval_fn is not None:  # else masks and rewound values come together, and zeros are made once
                finish(prune)
                metrics = evaluate(self.model, eval_fn)
        finally:
            try:
                finish(lambda: [change() for change in changes])
                self._at_rewind_point = point is not None
            finally:
                found = self._append(plan.measured, tensors_after=after, pruned=pruned, pruned_metrics=metrics)
        return found

    def _start_optimizer(self) -> Callable[[], None]:
        """Prepare to start the optimizer again, with its state of the start and its learning rates of now."""
        optimizer, start = self.optimizer, self._optimizer_start
        if optimizer is None or start is None or self._rewind_point is None:
            return lambda: None
        fresh = {**optimizer.state_dict(), "state": copy.deepcopy(start["state"])}  # it writes into what it loads
        return lambda: optimizer.load_state_dict(fresh)

    def _record(self, plan: Plan) -> Round:
        """Add the round of a plan without its pruning."""
        found = plan.measured
        groups = {name: replace(group, c=group.c * 0) for name, group in found.groups.items()}
        return self._append(found, groups=groups, tensors_after=found.tensors, pruned=None, pruned_metrics={})

    def _append(self, measured: Measured, **pruning: Any) -> Round:
        """Complete the record of a round with what its pruning did, and add it to the history."""
        now = time.perf_counter()
        found = Round(**{**vars(measured), **pruning}, seconds=now - self._ended)
        self._ended = now
        self.history.append(found)
        return found

    def _keep(self) -> None:
        """Copy the trained model, so that :meth:`_give_back` can return it after later rounds."""
        masks = [None if mask is None else mask.clone() for mask in masks_of(self.prunables)]
        self._kept = Kept(len(self.history), snapshot(self.model), masks)

    def _give_back(self) -> None:
        """Give the model the weights, buffers and masks that were kept last, if any were."""
        if self._kept is not None:
            finish(copier(self.model, self._kept.state, self.prunables, self._kept.masks))
            self.history.returned = self._kept.number
            self._kept = None

    @contextmanager
    def _unchanged_on_error(self) -> Iterator[None]:
        """Put the model's values and modes back to what they are now if a training fails."""
        start, modes = self._rewind_point if self._at_rewind_point else snapshot(self.model), modes_of(self.model)
        self._at_rewind_point = False
        try:
            yield
        except BaseException:
            set_modes(modes)
            finish(copier(self.model, start, self.prunables, masks_of(self.prunables)))
            raise

    def _remove_masks(self) -> None:
        """Take away the masks that this pruner brought, before it has pruned anything."""
        reshard(self.model.modules())
        for prunable in self._new:
            for module, name in prunable.holders:
                if hooks_of(module, name):
                    torch_prune.remove(module, name)
        if len(self._new) == len(self.prunables):
            unguard(self.model)


class SAP(Pruner):
    """Sparsity-informed Adaptive Pruning: the PQ Index of each group decides how much of it a round prunes.

    A round takes ``c = floor(min(gamma * (d - r), beta * d))`` entries of each group, those with the smallest
    magnitudes. The keyword arguments ``scope``, ``rewind``, ``exclude``, ``optimizer`` and ``gini``, the errors and
    attributes are those of :class:`torch_sap.iterate.pruner.Pruner`.

    Args:
        model: Any module. It is pruned in place.
        p: The smaller norm, ``0 < p < q``.
        q: The larger norm.
        eta_r: Share of the p-th power mass that may be lost; 0 or more. Larger prunes more.
        gamma: Factor on the prunable number ``d - r``; 0 or more. Larger prunes more.
        beta: The largest share of a group that one round prunes, in [0, 1].
        settings: scope ("layer"), rewind ("init"), exclude, optimizer, gini (False).

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> sap = SAP(model, scope="neuron")
        >>> # ... train the model ...
        >>> sap.step({"accuracy": 0.9}).metrics
        {'accuracy': 0.9}

    Source: Algorithm 1 of the paper.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        p: float = 0.5,
        q: float = 1.0,
        eta_r: float = 0.0,
        gamma: float = 1.0,
        beta: float = 0.9,
        **settings: Any,
    ) -> None:
        super().__init__(model, Hyperparameters(p, q, eta_r, gamma, beta), **settings)


class LotteryTicket(Pruner):
    """Iterative magnitude pruning with rewinding: a round prunes the share ``ratio`` of what is left of each group.

    Args:
        model: Any module. It is pruned in place.
        ratio: Share P of the unpruned entries of each group that a round prunes, rounded to whole entries; in [0, 1].
        p: The smaller norm of the PQ Index that is recorded, ``0 < p < q``.
        q: The larger norm.
        settings: As of :class:`SAP`.

    Source: Frankle and Carbin, "The lottery ticket hypothesis", ICLR 2019; P = 0.2 in the SAP paper.
    """

    def __init__(
        self, model: nn.Module, *, ratio: float = 0.2, p: float = 0.5, q: float = 1.0, **settings: Any
    ) -> None:
        super().__init__(model, FixedRatio(p, q, ratio=ratio), **settings)


class OneShot(LotteryTicket):
    """One Shot as the paper's authors run it: a :class:`LotteryTicket` always ranked by the first trained weights."""

    _first: dict[str, Tensor] | None = None

    def rank(self, entries: list[Entry]) -> list[Entry]:
        """Rank by the weights of the first round, which are copied then."""
        if not self.history or self._first is None:
            self._first = {entry.name: entry.scores.clone() for entry in entries}
            return entries
        return [replace(entry, scores=self._first[entry.name]) for entry in entries]

    def state_dict(self) -> dict[str, Any]:
        """As of :class:`SAP`, with the first trained weights."""
        return {**super().state_dict(), "first": self._first}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As of :class:`SAP`."""
        super().load_state_dict(state)
        weights = {prunable.name: prunable.weight.device for prunable in self.prunables}
        first = state["first"]
        self._first = None if first is None else {name: first[name].to(device) for name, device in weights.items()}


def evaluate(model: nn.Module, eval_fn: Callable[[nn.Module], Metrics]) -> dict[str, float]:
    """Call eval_fn, put the modules' train and eval modes back, and return its metrics."""
    modes = modes_of(model)
    try:
        return as_metrics(eval_fn(model), "eval_fn")
    finally:
        set_modes(modes)
