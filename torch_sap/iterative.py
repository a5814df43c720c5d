"""Algorithm 1: train, measure, prune, rewind, again.

Source: Diao et al., ICLR 2023 (arXiv 2302.05601).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from torch import nn

from torch_sap.arguments import check_callable, check_flag, check_int
from torch_sap.iterate.pruner import SAP, Pruner, SAPSettings, evaluate
from torch_sap.iterate.resuming import Run
from torch_sap.progress import rounds_bar
from torch_sap.records.history import History
from torch_sap.records.metrics import Metrics, measured_by
from torch_sap.records.round import Round
from torch_sap.stopping import StoppingRule, as_rules

if TYPE_CHECKING:
    from typing_extensions import Unpack


def iterative_sap(
    model: nn.Module | Pruner,
    train_fn: Callable[[nn.Module], Metrics],
    *,
    iterations: int = 10,
    eval_fn: Callable[[nn.Module], Metrics] | None = None,
    callback: Callable[[Round], object] | None = None,
    stop: StoppingRule | Iterable[StoppingRule] = (),
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
    **settings: Unpack[SAPSettings],
) -> History:
    """Prune a model by SAP: train, measure, prune, rewind, ``iterations`` times, and train once more.

    Args:
        model: Any module; it is trained and pruned in place, by ``SAP(model, **settings)``. Or your own pruner
            (:class:`SAP`, :class:`LotteryTicket`, :class:`OneShot`), without settings: it continues after the rounds
            in its history.
        train_fn: Called as ``train_fn(model)``; trains the model in place, with its own optimizer. It may return a
            number (recorded as "metric") or a mapping of numbers.
        iterations: Total number of prunings; 0 or more.
        eval_fn: Called as ``eval_fn(model)`` after each training and after each pruning, before rewinding. It returns
            a mapping of numbers, or a number, which is recorded under the function's name ("metric" for a lambda). Its
            metrics replace those of train_fn with the same name. The model's train and eval modes are restored.
        callback: Called with each complete round.
        stop: When to end early, and which model to give back: one rule of :mod:`torch_sap.stopping` or several. The
            run ends when one of them says so, and the model is the one of the sparsest round that all accept.
        checkpoint: File that lets the run outlive its process. If it exists, the run resumes from it bit for bit;
            otherwise it begins. It is written at the start, after each training and after each pruning; see
            ``docs/checkpoints.md``.
        progress: Whether to show a bar with the round, what remains, the metric, and the time left (extra "progress").
        settings: Keyword arguments of :class:`SAP`.

    Returns:
        ``iterations + 1`` rounds, or fewer if a rule ended the run. The model is the trained one of the last round;
        with ``stop`` it is the last one that all rules accept, from round ``history.returned``.

    Raises:
        ValueError, TypeError: as :class:`SAP` does.
        ValueError: if a rule of ``stop`` has no metric to judge by, or several; after the first training, or before
            it if the pruner has rounds already.
        TypeError: if train_fn or eval_fn returns something else.
        ValueError: if the checkpoint is damaged, or from a run with other arguments or another model; nothing is
            changed.
        OSError: if the checkpoint cannot be written; the previous one stays.
        Exception: any error of train_fn and eval_fn. The model then has its values from before the training that
            failed; if that was the first one, the model is as before the call.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> history = iterative_sap(model, train_fn=lambda model: None, iterations=2, scope="neuron")
        >>> len(history)
        3

    Source: Algorithm 1 of the paper.
    """
    if not callable(train_fn):
        raise TypeError(f"train_fn must be callable, got {train_fn!r}")
    check_callable("eval_fn", eval_fn)
    check_callable("callback", callback)
    check_int("iterations", iterations, low=0)
    check_flag("progress", progress)
    measure = None if eval_fn is None else measured_by(eval_fn)
    rules = as_rules(stop)
    if isinstance(model, Pruner) and settings:
        raise TypeError(f"settings must be given to the pruner when it is made, got {', '.join(settings)} here")
    pruner = model if isinstance(model, Pruner) else SAP(model, **settings)
    try:
        run = Run(pruner, checkpoint, iterations, rules)
        for rule in rules if pruner.history else ():
            rule.accepts(pruner.history)  # raises before the training if it has no metric to judge by
        with rounds_bar(len(pruner.history), iterations + 1, shown=progress) as show:
            while len(pruner.history) <= iterations and not run.finished:
                last = len(pruner.history) == iterations
                with pruner._unchanged_on_error():
                    metrics = run.train(train_fn)
                    if measure is not None:
                        metrics |= evaluate(pruner.model, measure)
                    measured, pruning = pruner._measure(metrics, prune=not last)
                    rounds = [*pruner.history, measured]
                    accepted = bool(rules) and all(rule.accepts(rounds) for rule in rules)
                    last |= any(rule.ends(rounds) for rule in rules)
                if accepted:
                    pruner._keep()
                if last:
                    pruner._give_back()
                found = pruner._record(measured) if last else pruner._prune(measured, pruning, measure)
                show(found)
                if callback is not None:
                    callback(found)
                run.end_round(finished=last)
    except BaseException:
        if pruner is not model and not pruner.history:
            pruner._remove_masks()
        raise
    return pruner.history
