"""A progress bar over the rounds of an iterative pruning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from torch_sap.arguments import needs
from torch_sap.records.metrics import choose_metric
from torch_sap.records.round import Round


@contextmanager
def rounds_bar(done: int, total: int, *, shown: bool) -> Iterator[Callable[[Round], object]]:
    """Show the rounds, what remains, the metric, and the time left on stderr; the block calls a function per round.

    Of several processes only the first one shows a bar.

    Raises:
        ImportError: if the bar is to be shown and tqdm is not installed (extra "progress").
    """
    among_others = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not shown or (among_others and torch.distributed.get_rank() > 0):
        yield lambda found: None
        return
    with needs("progress=True", "tqdm", "progress"):
        from tqdm import tqdm  # not tqdm.auto, which warns in notebooks without ipywidgets
    with tqdm(total=total, initial=done, desc=f"round {done}", unit="round", dynamic_ncols=True) as bar:

        def show(found: Round) -> None:
            name = choose_metric(list(found.metrics))
            metric = {} if name is None else {name: f"{found.metrics[name]:.4g}"}
            bar.set_postfix({"remaining": f"{found.density:.1%}", **metric}, refresh=False)
            bar.set_description(f"round {min(found.number + 1, total - 1)}", refresh=False)
            bar.update()

        yield show
