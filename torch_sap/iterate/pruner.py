"""Iterative pruning, one round at a time: measure, prune, rewind, record. SAP and the paper's baselines.

A round reads the weights once before its pruning and once after it. Everything that can fail is computed before
anything is changed; the copying that is left is finished even if it raises.

Sources: Algorithm 1 of Diao et al., ICLR 2023 (arXiv 2302.05601); Frankle and Carbin, "The lottery ticket hypothesis",
ICLR 2019.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torch.optim import Optimizer

from torch_sap.arguments import check_callable, check_flag, check_model
from torch_sap.decide.bounds import FixedRatio, Hyperparameters
from torch_sap.decide.groups import Entry, Scope, check_scope
from torch_sap.decide.step import StepResult, group_values, prune_step
from torch_sap.decide.sums import check_finite, count_remaining, power_sums
from torch_sap.distributed.fsdp import reshard
from torch_sap.distributed.replicas import share, wrapper_of
from torch_sap.distributed.sharded import is_dtensor
from torch_sap.files.checkpoint import differences
from torch_sap.iterate.rewinding import Rewind, State, check_state, copier, masks_of, modes_of, set_modes, snapshot
from torch_sap.iterate.starts import Starts, Stateful, as_schedulers, is_starts
from torch_sap.masks.guards import guard, unguard
from torch_sap.masks.mask import check_copies, finish, hold_masks, hooks_of
from torch_sap.masks.parameters import ImportanceScores, Patterns, entries_of, resolve, warn_of_left_out
from torch_sap.masks.reparametrized import warn_of_reparametrized
from torch_sap.masks.zeros import check_optimizer
from torch_sap.records.history import History
from torch_sap.records.metrics import Metrics, as_metrics
from torch_sap.records.report import tensor_records
from torch_sap.records.round import Measured, Round, Sparsity

if TYPE_CHECKING:
    from typing_extensions import Unpack

FORMAT = 3
"""Of a pruner's state_dict."""


class Settings(TypedDict, total=False):
    """Keyword arguments of all pruners.

    Attributes:
        scope: What one I, r and c are computed over: "global" (all weights), "layer" (a tensor), "neuron" (an output
            channel). Default "layer": a network that is trained again after each pruning adapts to layers of very
            different density, and no layer loses everything at once.
        rewind: What the surviving weights, all other parameters and the buffers are set back to: "init" (default,
            their state now), "none" (nothing, training continues), or a state_dict from before or after pruning.
        exclude: Patterns of what not to prune, see :func:`prunable_parameters`.
        include: Patterns of what to prune, too, such as lookup tables.
        optimizer: An optimizer that lives through all rounds, if there is one. Rewinding sets it back to its start,
            its state now: momentum and averages, and the learning rates of its groups with all that schedules move. A
            scheduler that is made anew for each round then starts right.
        scheduler: A scheduler of the optimizer that lives through all rounds, or several, each with ``state_dict`` and
            ``load_state_dict``. Rewinding sets it back too, so it is a schedule for one round. Optimizer and scheduler
            may also come later, see :meth:`Pruner.attach`.
        importance_scores: What ranks weights in place of their magnitudes, in the count and in the order: a dict from
            (module, name) to a tensor, or a callable from the model to such a dict, as those of
            :mod:`torch_sap.scores`, which is asked before each pruning and never stored.
        gini: Whether to measure the Gini index in each round, which sorts all weights. Default False.
    """

    scope: Scope
    rewind: Rewind
    exclude: Patterns
    include: Patterns
    optimizer: Optimizer | None
    scheduler: Stateful | Iterable[Stateful] | None
    importance_scores: ImportanceScores | None
    gini: bool


class SAPSettings(Settings, total=False):
    """Keyword arguments of :class:`SAP`, which explains p, q, eta_r, gamma and beta."""

    p: float
    q: float
    eta_r: float
    gamma: float
    beta: float


class Pruner:
    """Iterative pruning by a rule, one round per call, like a learning-rate scheduler; base of SAP and the baselines.

    Creating a pruner gives the model the form that it keeps in all rounds (``weight_orig``, ``weight_mask`` of ones),
    so create optimizers, averages and compiled models afterwards: names and Parameter objects do not change any more.
    A subclass overrides :meth:`rank` to rank entries by other scores. :mod:`torch_sap.iterative` is the loop that
    calls the private methods.

    Args:
        model: Any module. It is pruned in place.
        rule: How many entries of a group a round prunes.
        scope, rewind, exclude, include, optimizer, scheduler, importance_scores, gini: See :class:`Settings`.

    Attributes:
        history: The rounds so far.
        prunables: The tensors that are pruned.
        starts: The optimizer and the schedulers that rewinding sets back, and the states that they started from.
        left_out: Parameters with more than one dimension that are not, each with a name, a shape, and the reason.

    Raises:
        ValueError: if an argument is out of range, a weight is NaN or infinite, or there is nothing to prune.
        TypeError: if an argument or a weight has the wrong type. If anything is raised, the model is unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: Hyperparameters,
        *,
        scope: Scope = "layer",
        rewind: Rewind = "init",
        exclude: Patterns = (),
        include: Patterns = (),
        optimizer: Optimizer | None = None,
        scheduler: Stateful | Iterable[Stateful] | None = None,
        importance_scores: ImportanceScores | None = None,
        gini: bool = False,
        **unknown: object,
    ) -> None:
        if unknown:
            raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {next(iter(unknown))!r}")
        check_scope(scope)
        check_flag("gini", gini)
        check_model(model)
        check_optimizer(optimizer, model)
        schedulers = as_schedulers(scheduler, optimizer)
        self.model, self.rule, self.scope, self.gini = model, rule, scope, gini
        self.history = History()
        self.prunables, self.left_out = found = resolve(model, exclude, include)
        warn_of_reparametrized(model, stacklevel=3)
        warn_of_left_out(model, found, stacklevel=3)
        check_finite(entries := self._entries())
        self.importance_scores = importance_scores
        if not callable(importance_scores):
            entries_of(self.prunables, importance_scores)  # raises here if they do not fit
        if gini and (sharded := [entry.name for entry in entries if entry.part is not None]):
            raise NotImplementedError(f"gini needs whole tensors, but {sharded[0]} is sharded; leave it out")
        if isinstance(rewind, str) and rewind not in ("init", "none"):
            raise ValueError(f'rewind must be "init", "none" or a state_dict, got rewind={rewind!r}')
        self._rewind_point: State | None = None
        if rewind != "none":
            self._rewind_point = snapshot(model) if rewind == "init" else check_state(model, rewind)
        self._at_rewind_point = rewind == "init"
        self._at_start = self._counts(count_remaining(entries))
        self.starts = Starts(optimizer, schedulers)
        self._new = [prunable for prunable in self.prunables if prunable.mask is None]
        self._kept: dict[str, Any] | None = None  # number, state and masks of a model that may be given back
        self._ended = time.perf_counter()
        try:
            hold_masks(self.prunables, [prunable.mask for prunable in self.prunables])
            guard(model)
        except BaseException:
            self._remove_masks()
            raise

    def __repr__(self) -> str:
        """One line: the rule, the model, and what remains; from the record alone, which reads no tensor."""
        numbers = ", ".join(f"{name}={value:g}" for name, value in self.rule.to_dict().items())
        text = f"{type(self).__name__} of {type(self.model).__name__}: {self.scope} scope, {numbers}"
        text += f"; {sum(prunable.weight.numel() for prunable in self.prunables):,} weights"
        if rounds := len(self.history):
            remaining = [(one.remaining, one.total) for one in self.history[-1].tensors_after]
            share = sum(left for left, _ in remaining) / max(sum(total for _, total in remaining), 1)
            text += f", {share:.1%} remaining after {rounds} round{'s' * (rounds > 1)}"
        return f"<{text}>"

    def rank(self, entries: list[Entry]) -> list[Entry]:
        """Return the entries with the scores that rank them: the importance_scores, or the weights themselves."""
        if self.importance_scores is None:
            return entries
        return entries_of(self.prunables, self.importance_scores, self.model)

    def step(self, metrics: Metrics = None, eval_fn: Callable[[nn.Module], Metrics] | None = None) -> Round:
        """Measure the trained model, prune it, and rewind what is left.

        Args:
            metrics: Metrics of the trained model: a number (recorded as "metric") or a mapping of numbers.
            eval_fn: Called with the pruned model before rewinding; its result is recorded as ``pruned_metrics``.

        Returns:
            The round, now the last of ``history``.

        Raises:
            ValueError: if a weight is NaN or infinite; the parameter is named and nothing is changed.
            RuntimeError: if a mask was removed since the pruner was made; nothing is changed.
            TypeError: if the metrics are neither None, a number nor a mapping of numbers; nothing is changed.
            Exception: any error of eval_fn; the round is then complete, in the history without pruned_metrics.
        """
        check_callable("eval_fn", eval_fn)
        return self._prune(*self._measure(metrics, prune=True), eval_fn)

    def record(self, metrics: Metrics = None) -> Round:
        """Measure the trained model and prune nothing: the last training of an iterative pruning.

        Arguments, result and errors are those of :meth:`step`.
        """
        measured, _ = self._measure(metrics, prune=False)
        return self._record(measured)

    def attach(
        self, *, optimizer: Optimizer | None = None, scheduler: Stateful | Iterable[Stateful] | None = None
    ) -> None:
        """Set back an optimizer and its schedulers too, to the state that they have now.

        For those that are made after the pruner; they replace those given before. A start that :meth:`load_state_dict`
        has loaded stays the start.

        Args:
            optimizer: See :class:`Settings`.
            scheduler: See :class:`Settings`. It may come alone if there is an optimizer already.

        Raises:
            ValueError: if the optimizer is not of this model, the scheduler not of the optimizer, or a loaded state has
                another number of schedulers; nothing is changed.
            TypeError: if they are none; nothing is changed.
        """
        self.starts.attach(self.model, optimizer, scheduler)

    def set_rewind_point(self) -> None:
        """Copy the model's present state as the rewind point of later rounds (late rewinding).

        Call it during training, for example after the first epochs.

        Raises:
            ValueError: if the pruner does not rewind.
        """
        if self._rewind_point is None:
            raise ValueError('rewind must not be "none" for set_rewind_point')
        self._rewind_point = snapshot(self.model)

    def state_dict(self) -> dict[str, Any]:
        """Collect what the states of model and optimizer do not hold, as plain values and tensors."""
        return {
            "format": FORMAT,
            "settings": self._settings(),
            "rewind_point": None if self._rewind_point is None else dict(self._rewind_point),
            **self.starts.state(),
            "remaining": self._remaining(),
            "kept": self._kept,
            "history": self.history.to_dict(),
            "seconds": time.perf_counter() - self._ended,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state_dict`, after the model has loaded its own (masks and weights).

        Raises:
            ValueError: if the state has another format, other settings, another model or a model with other masks;
                nothing is changed.
        """
        self._continue(state, count_remaining(self._entries()))

    def _continue(self, state: Mapping[str, Any], remaining: Sequence[int]) -> None:
        """Load a state for a model that has, or is going to have, so many unpruned entries in each tensor."""
        types: dict[str, Any] = {"settings": Mapping, "history": Mapping, "remaining": Mapping, "seconds": float}
        types |= dict.fromkeys(("rewind_point", "optimizer_start", "kept"), Mapping | None)
        ours = isinstance(state, Mapping) and state.get("format") == FORMAT
        whole = ours and all(name in state and isinstance(state[name], kind) for name, kind in types.items())
        if not whole or not is_starts(state.get("scheduler_starts")):
            raise ValueError(f"state must be a state_dict of a torch_sap pruner in format {FORMAT}")
        if different := differences(self._settings(), state["settings"], "in the state"):
            raise ValueError(f"state must come from a pruner with the same settings, but they differ: {different}")
        here, there = self._counts(remaining), state["remaining"]
        if wrong := next((name for name in here if here[name] != there.get(name)), None):
            raise ValueError(
                f"state must belong to the masks of the model, but {wrong} has {here[wrong]} entries left here, "
                f"{there.get(wrong)} in the state: load the model's state first, of the same moment"
            )
        self.starts.check(state)
        kept = state["kept"]
        point = None if state["rewind_point"] is None else check_state(self.model, state["rewind_point"])
        if kept is not None:
            kept = {"number": kept["number"], "state": check_state(self.model, kept["state"]), "masks": kept["masks"]}
        self.history = History.from_dict(state["history"])
        self._rewind_point, self._kept, self._at_rewind_point = point, kept, False
        self._at_start = there
        self.starts.load(state)
        self._ended = time.perf_counter() - state["seconds"]

    def _settings(self) -> dict[str, Any]:
        scores = self.importance_scores
        return {
            **({} if scores is None else {"importance_scores": "a callable" if callable(scores) else "a dict"}),
            "class": type(self).__name__,
            "scope": self.scope,
            **self.rule.to_dict(),
            "rewinds": self._rewind_point is not None,
            "gini": self.gini,
            "tensors": {prunable.name: list(prunable.weight.shape) for prunable in self.prunables},
        }

    def _counts(self, remaining: Sequence[int]) -> dict[str, int]:
        return {prunable.name: count for prunable, count in zip(self.prunables, remaining, strict=True)}

    def _remaining(self) -> dict[str, int]:
        """Unpruned entries of each tensor; those of sharded ones as of the last round, since adding up would wait."""
        masks = [prunable.mask for prunable in self.prunables]
        if not any(map(is_dtensor, masks)):
            return self._counts([int(mask.sum()) for mask in masks if mask is not None])
        returned, last = self.history.returned, self.history[-1:]
        if not last:
            return dict(self._at_start)
        tensors = last[0].tensors_after if returned is None else self.history[returned].tensors
        return {tensor.name: tensor.remaining for tensor in tensors}

    def _entries(self) -> list[Entry]:
        reshard(self.model.modules())
        return entries_of(self.prunables, None)

    def _measure(self, metrics: Metrics = None, *, prune: bool) -> tuple[Measured, StepResult | None]:
        """Measure the trained model and decide what to prune, changing nothing; arguments and errors as of step."""
        if lost := next((prunable.name for prunable in self.prunables if prunable.mask is None), None):
            raise RuntimeError(
                f"{lost} must have the mask that this {type(self).__name__} gave it, but it was removed since; make a "
                "new one to prune the model further"
            )
        recorded, entries, p, q = as_metrics(metrics, "metrics"), self._entries(), self.rule.p, self.rule.q
        with torch.no_grad():
            ranked = self.rank(entries) if prune or not callable(self.importance_scores) else entries
            pruning = prune_step(ranked, self.scope, self.rule) if prune else None
            sums = pruning.sums if pruning else power_sums(ranked, p, q)
            groups = pruning.groups if pruning else group_values(sums, self.scope, self.rule)
            if ranked is not entries:
                sums = power_sums(entries, p, q)
            measured = Measured(
                number=len(self.history),
                scope=self.scope,
                hyperparameters=self.rule.to_dict(),
                groups=groups,
                tensors=tensor_records(self.prunables, sums.remaining),
                retrained=Sparsity.of(sums, entries if self.gini else None),
                metrics=recorded,
            )
        return measured, pruning

    def _prune(
        self, measured: Measured, pruning: StepResult | None, eval_fn: Callable[[nn.Module], Metrics] | None = None
    ) -> Round:
        """Prune the measured model and rewind the rest; errors as of step."""
        assert pruning is not None
        masks, point, metrics = pruning.masks, self._rewind_point, {}
        with torch.no_grad():
            copies = wrapper_of(self.model)
            check_copies(copies, self.prunables, masks)
            share(copies, {name: value for name, value in (point or {}).items() if value is not None})
            left = [replace(entry, mask=mask) for entry, mask in zip(self._entries(), masks, strict=True)]
            pruned = Sparsity.of(power_sums(left, self.rule.p, self.rule.q), left if self.gini else None)
        after = tensor_records(self.prunables, pruning.remaining)
        starts = [] if point is None else self.starts.resetters()
        changes = [copier(self.model, point, self.prunables, masks), *starts]
        try:
            if eval_fn is not None:  # else masks and rewound values come together, and zeros are restored once
                hold_masks(self.prunables, masks)
                metrics = evaluate(self.model, eval_fn)
        finally:
            try:
                finish(lambda: [change() for change in changes])
                self._at_rewind_point = point is not None
            finally:
                self.history.returned = None  # the model is no longer the one that was given back
                found = self._append(measured, tensors_after=after, pruned=pruned, pruned_metrics=metrics)
        return found

    def _record(self, measured: Measured) -> Round:
        """Add a round without pruning."""
        groups = {name: replace(group, c=group.c * 0) for name, group in measured.groups.items()}
        return self._append(measured, groups=groups, tensors_after=measured.tensors, pruned=None, pruned_metrics={})

    def _append(self, measured: Measured, **pruning: Any) -> Round:
        now = time.perf_counter()
        found = Round(**{**vars(measured), **pruning}, seconds=now - self._ended)
        self._ended = now
        self.history.append(found)
        return found

    def _keep(self) -> None:
        """Copy the trained model, so that :meth:`_give_back` can return it after later rounds."""
        masks = [None if mask is None else mask.clone() for mask in masks_of(self.prunables)]
        self._kept = {"number": len(self.history), "state": snapshot(self.model), "masks": masks}

    def _give_back(self) -> None:
        """Give the model the weights, buffers and masks that were kept last, if any were."""
        if self._kept is not None:
            finish(copier(self.model, self._kept["state"], self.prunables, self._kept["masks"]))
            self.history.returned = self._kept["number"]
            self._kept = None

    @contextmanager
    def _unchanged_on_error(self) -> Iterator[None]:
        """Restore the model's present values and modes if the training inside fails."""
        start, modes = self._rewind_point if self._at_rewind_point else snapshot(self.model), modes_of(self.model)
        self._at_rewind_point = False
        try:
            yield
        except BaseException:
            set_modes(modes)
            finish(copier(self.model, start, self.prunables, masks_of(self.prunables)))
            raise

    def _remove_masks(self) -> None:
        """Remove the masks that this pruner added, before it has pruned anything."""
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
    magnitudes. Errors, attributes and methods are those of :class:`torch_sap.iterate.pruner.Pruner`.

    Args:
        model: Any module. It is pruned in place.
        p: The smaller norm, ``0 < p < q``.
        q: The larger norm.
        eta_r: Share of the p-th power mass that may be lost; 0 or more. Larger prunes more.
        gamma: Factor on the prunable number ``d - r``; 0 or more. Larger prunes more.
        beta: The largest share of a group that one round prunes, in [0, 1].
        settings: scope, rewind, exclude, include, optimizer, scheduler, importance_scores, gini; see
            :class:`torch_sap.iterate.pruner.Settings`.

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
        **settings: Unpack[Settings],
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
        self, model: nn.Module, *, ratio: float = 0.2, p: float = 0.5, q: float = 1.0, **settings: Unpack[Settings]
    ) -> None:
        super().__init__(model, FixedRatio(p, q, ratio=ratio), **settings)


class OneShot(LotteryTicket):
    """One Shot as the paper's authors run it: a :class:`LotteryTicket` ranked by the first trained weights."""

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

    def _continue(self, state: Mapping[str, Any], remaining: Sequence[int]) -> None:
        super()._continue(state, remaining)
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
