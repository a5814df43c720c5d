"""Many runs in parallel processes, with the time that is left."""

from __future__ import annotations

import multiprocessing
import os
import queue
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from paper import runs
from paper.runs import Run


@dataclass(frozen=True)
class Machine:
    """Where runs are done.

    Args:
        out: folder of the runs.
        jobs: processes.
        threads: of each process.
        device: where to train.
        data_dir: where the data lie.
    """

    out: Path
    jobs: int = 1
    threads: int = 1
    device: str = "cpu"
    data_dir: Path | None = None


def complete_all(runs: Sequence[Run], machine: Machine) -> list[str]:
    """Do what is left of all runs, the first first.

    Returns:
        A line for each run that failed.
    """
    open_runs = [run for run in runs if not is_complete(run, machine.out)]
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"{len(runs)} runs, {len(runs) - len(open_runs)} of them done before; written to {machine.out}")
    if not open_runs:
        return []
    context = multiprocessing.get_context("spawn")
    finished: Any = context.Queue()
    pool = ProcessPoolExecutor(machine.jobs, context, _start, (machine, finished, os.getpid()))
    with _bars(console) as bars, pool:
        return _watch({pool.submit(_complete, run): run for run in open_runs}, finished, bars)


def is_complete(run: Run, out: Path) -> bool:
    """Whether a run has its whole history."""
    return (out / run.name / "history.json").exists()


def _bars(console: Console) -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(TextColumn("{task.description}"), *columns, console=console, disable=not console.is_terminal)


def _watch(futures: dict[Future[int], Run], finished: Any, bars: Progress) -> list[str]:
    """Move the bars until all runs are done, and say a line for each."""
    epochs = bars.add_task("epochs", total=sum((run.rounds + 1) * run.epochs for run in futures.values()))
    failures: list[str] = []
    waiting = dict(futures)
    while waiting:
        try:
            finished.get(timeout=0.5)
            bars.advance(epochs)
        except queue.Empty:
            pass
        for future in [future for future in waiting if future.done()]:
            run = waiting.pop(future)
            error = future.exception()
            text = f"{run.name}: failed, {error!r}" if error else f"{run.name}: {future.result()} epochs"
            failures += [text] if error else []
            left = f"{len(futures) - len(waiting)} of {len(futures)}"
            bars.console.print(f"{left}  {text}")
            if not error:  # of a resumed run, epochs done before
                bars.advance(epochs, (run.rounds + 1) * run.epochs - future.result())
    return failures


_machine: Machine
_finished: Any
_parent: int


def _start(machine: Machine, finished: Any, parent: int) -> None:
    global _machine, _finished, _parent
    _machine, _finished, _parent = machine, finished, parent
    torch.set_num_threads(machine.threads)


def _complete(run: Run) -> int:
    """Do a run in a process of the pool; return the epochs that were left of it."""
    done = 0

    def on_epoch(epoch: int, loss: float) -> None:
        nonlocal done
        if os.getppid() != _parent:  # killed: its children end too, and what they did lies in the folders
            os._exit(1)
        done += 1
        _finished.put(epoch)

    runs.complete(run, _machine.out, _machine.device, _machine.data_dir, on_epoch)
    return done
