"""Algorithm 1: train, measure, prune, rewind, again. A stepper for your own loop, and the loop itself.

Source: Diao et al., ICLR 2023 (arXiv 2302.05601).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer

from torch_sap.decide.bounds import Hyperparameters
from torch_sap.decide.groups import Scope
from torch_sap.iterate.metrics import Metrics, check_callable, evaluate
from torch_sap.iterate.pruner import Stepper
from torch_sap.iterate.resuming import Run
from torch_sap.iterate.rewinding import Rewind
from contextlib import nullcontext as held_back
from torch_sap.records.history import History
from torch_sap.records.round import Round
from torch_sap.stopping import StoppingRule, as_rules


class SAP(Stepper):
    """Sparsity-informed Adaptive Pruning, a step a round, in the manner of a learning-rate scheduler.

    Making it gives the model the form that it keeps in all rounds (``weight_orig``, ``weight_mask`` of ones): the
    names and the Parameter objects do not change from then on, so optimizers, averages and compiled models made
    afterwards go on working.

    Args:
        model: Any module. It is pruned in place.
        scope: What one I, r and c are computed over: "global" (all weights), "layer" (a tensor), "neuron" (an output
            channel).
        p: The smaller norm, ``0 < p < q``.
        q: The larger norm.
        eta_r: Share of the p-th power mass that may be lost; 0 or more. Larger prunes more.
        gamma: Factor on the prunable number ``d - r``; 0 or more. Larger prunes more.
        beta: The largest share of a group that one round prunes, in [0, 1].
        rewind: What a step puts the surviving weights, all other parameters and the buffers back to: "init", their
            values now; a state_dict of the model; "none": training goes on from the trained values.
        exclude: Patterns of what not to prune, see :func:`prunable_parameters`.
        optimizer: An optimizer that lives through all rounds; with the model its state is put
            back to what it was when this was made (nothing, for a new one).
        gini: Whether rounds record the Gini index too. It needs a sort of all weights.

    Raises:
        ValueError: if an argument is out of its range, weights are NaN or infinite, or there is nothing to prune.
        TypeError: if an argument or a weight is of a wrong type.
            The model is as before if anything is raised.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> sap = SAP(model, scope="layer")
        >>> for _ in range(3):
        ...     # train the model here
        ...     found = sap.step(metrics={"accuracy": 0.9})
        >>> sap.history[2].density < 1
        True

    Source: Algorithm 1 of the paper.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        scope: Scope = "layer",
        p: float = 0.5,
        q: float = 1.0,
        eta_r: float = 0.0,
        gamma: float = 1.0,
        beta: float = 0.9,
        rewind: Rewind = "init",
        exclude: str | Iterable[str] = (),
        optimizer: Optimizer | None = None,
        gini: bool = False,
    ) -> None:
        rule = Hyperparameters(p, q, eta_r, gamma, beta)
        super().__init__(model, rule, scope=scope, rewind=rewind, exclude=exclude, optimizer=optimizer, gini=gini)


def iterative_sap(
    model: nn.Module,
    train_fn: Callable[[nn.Module], Metrics],
    *,
    iterations: int = 10,
    eval_fn: Callable[[nn.Module], Metrics] | None = None,
    callback: Callable[[Round], object] | None = None,
    stop: StoppingRule | Iterable[StoppingRule] = (),
    checkpoint: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> History:
    """Prune a model by SAP: train, measure, prune, rewind, ``iterations`` times, and train once more.

    Args:
        model: Any module. It is trained and pruned in place.
        train_fn: Called as ``train_fn(model)``; trains the model in place, with an optimizer of its own. It may
            return a number (recorded as "metric") or a mapping of numbers.
        iterations: Prunings; 0 or more.
        eval_fn: Called as ``eval_fn(model)`` after each training and after each pruning, before rewinding. It returns
            what train_fn may; of equal names its value is recorded. The model's train and eval modes are put back
            afterwards.
        callback: Called with each round when it is complete.
        stop: When to end before that, and which model to give back: :class:`TargetDensity`,
            :class:`WithinTolerance`, :class:`Collapse`, :class:`NothingLeft`, a :class:`StoppingRule` of your own, or
            several: it ends when one of them says so, and the model is that of the sparsest round which all accept.
        checkpoint: A file that makes the run survive its process. If it exists the run goes on from it, bit for bit as
            if it had not been interrupted; otherwise it begins. It is written at the start, after each training and
            after each pruning; see ``docs/checkpoints.md``.
        settings: Keyword arguments of :class:`SAP`: scope, p, q, eta_r, gamma, beta, rewind, exclude, optimizer, gini.

    Returns:
        ``iterations + 1`` rounds, or less if a rule ended it. The model is the trained one of the last round; with
        ``stop`` that of the last round which the rules accept, whose number is ``history.returned``.

    Raises:
        ValueError, TypeError: as :class:`SAP` does.
        ValueError: if a rule of ``stop`` has no metric to judge by, or several; after the first training, since
            train_fn may return it.
        TypeError: if train_fn or eval_fn return something else.
        ValueError: if the checkpoint is damaged, or of a run with other arguments or another model; nothing is changed.
        OSError: if the checkpoint cannot be written; the one before stays.
        Exception: whatever train_fn and eval_fn raise. The model's values are then those from before the training
            that failed; if it was the first, the model is as if nothing had been called.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> history = iterative_sap(model, train_fn=lambda model: None, iterations=2, scope="neuron")
        >>> len(history)
        3

    Source: Algorithm 1 of the paper.
    """
    _check_functions(train_fn, eval_fn, iterations)
    check_callable("callback", callback)
    stop = as_rules(stop)
    sap = SAP(model, **settings)
    try:
        rounds = sap_rounds(sap, train_fn, iterations=iterations, eval_fn=eval_fn, stop=stop, checkpoint=checkpoint)
        for found in rounds:
            if callback is not None:
                callback(found)
    except BaseException:
        if not sap.history:
            sap.undo()
        raise
    return sap.history


def sap_rounds(
    sap: Stepper,
    train_fn: Callable[[nn.Module], Metrics],
    *,
    iterations: int = 10,
    eval_fn: Callable[[nn.Module], Metrics] | None = None,
    stop: StoppingRule | Iterable[StoppingRule] = (),
    checkpoint: str | os.PathLike[str] | None = None,
) -> Iterator[Round]:
    """The rounds of :func:`iterative_sap` one by one, with a stepper of yours.

    Args:
        sap: A :class:`SAP`, :class:`LotteryTicket` or :class:`OneShot`. Rounds in its history count: it goes on from
            there.
        train_fn: As of iterative_sap.
        iterations: Prunings altogether.
        eval_fn: As of iterative_sap.
        stop: As of iterative_sap.
        checkpoint: As of iterative_sap. What you change between two rounds is in the file too.

    Yields:
        Each round when it is complete; after the last one the model is the one to give back.

    Raises:
        TypeError: if ``sap`` is no stepper, when the first round is asked for.
        ValueError, OSError: as of iterative_sap.
    """
    if not isinstance(sap, Stepper):
        raise TypeError(
            f"sap must be a stepper (SAP, LotteryTicket or OneShot), got {type(sap).__name__}; make one of the model "
            "first, as in sap_rounds(SAP(model), train_fn)"
        )
    _check_functions(train_fn, eval_fn, iterations)
    rules = as_rules(stop)
    run = Run(sap, checkpoint, iterations, rules)
    while len(sap.history) <= iterations and not run.finished:
        with sap.unchanged_on_error():
            metrics = run.train(train_fn)
            if eval_fn is not None:
                metrics |= evaluate(sap.model, eval_fn)
            plan = sap.plan(metrics)
            seen = History([*sap.history, plan.round])
            accepted = bool(rules) and all(rule.accepts(seen) for rule in rules)
            ended = plan.round.number == iterations or any(rule.ends(seen) for rule in rules)
        if accepted:
            sap.keep()
        if ended:
            with held_back():
                sap.give_back()
                last = sap.end(plan)
            yield last
            run.end_round(finished=True)
            return
        yield sap.apply(plan, eval_fn)
        run.end_round()


def _check_functions(train_fn: object, eval_fn: object, iterations: object) -> None:
    if not callable(train_fn):
        raise TypeError(f"train_fn must be callable, got {train_fn!r}")
    check_callable("eval_fn", eval_fn)
    if not isinstance(iterations, int) or isinstance(iterations, bool):
        raise TypeError(f"iterations must be an int, got {iterations!r}")
    if iterations < 0:
        raise ValueError(f"iterations must not be negative, got iterations={iterations}")
