"""The rounds of an iterative pruning in order, with exports to JSON, CSV, data frame and figure."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

from torch_sap.arguments import check_path, needs
from torch_sap.records.metrics import Mode, metric_values
from torch_sap.records.phases import Phase, label_phases
from torch_sap.records.round import Round, rounds_table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Path = str | os.PathLike[str]
FORMAT = 1


class History(Sequence[Round]):
    """The rounds of an iterative pruning, in order.

    Attributes:
        returned: Number of the round whose model a stopping rule gave back; None if no rule chose one.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> history = iterative_sap(model, train_fn=lambda model: None, iterations=2)
        >>> [round.number for round in history]
        [0, 1, 2]
        >>> history[2].density < history[1].density < history[0].density == 1.0
        True
    """

    def __init__(self, rounds: Iterable[Round] = ()) -> None:
        if not isinstance(rounds, Iterable):
            raise TypeError(f"rounds must be an iterable of Round, got {rounds!r}")
        self._rounds: list[Round] = []
        for round in rounds:
            self.append(round)
        self.returned: int | None = None

    @overload
    def __getitem__(self, index: int) -> Round: ...
    @overload
    def __getitem__(self, index: slice) -> History: ...
    def __getitem__(self, index: int | slice) -> Round | History:
        return History(self._rounds[index]) if isinstance(index, slice) else self._rounds[index]

    def __len__(self) -> int:
        return len(self._rounds)

    def __repr__(self) -> str:
        """One line per round."""
        return "\n".join(map(repr, self)) or "<History without rounds>"

    def _repr_html_(self) -> str:
        returned = "" if self.returned is None else f"; the model is that of round {self.returned}"
        return rounds_table(self, f"{len(self)} round{'s' * (len(self) != 1)}{returned}")

    def append(self, round: Round) -> None:
        """Add a round at the end; raise a TypeError for anything else."""
        if not isinstance(round, Round):
            raise TypeError(f"rounds must hold Round (torch_sap.records.round), got {round!r}")
        self._rounds.append(round)

    def rows(self) -> list[dict[str, Any]]:
        """List one :meth:`Round.row` per round."""
        return [round.row() for round in self]

    def to_frame(self) -> pd.DataFrame:
        """Convert to a pandas DataFrame (extra "frame"), one row per round."""
        with needs("History.to_frame", "pandas", "frame"):
            import pandas as pd
        return pd.DataFrame(self.rows())

    def to_csv(self, path: Path) -> None:
        """Write a CSV file with a header and one line per round."""
        check_path("path", path)
        rows = self.rows()
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(column for row in rows for column in row)))
            writer.writeheader()
            writer.writerows(rows)

    def to_dict(self) -> dict[str, Any]:
        """Convert to values that JSON can hold."""
        return {"format": FORMAT, "rounds": [round.to_dict() for round in self], "returned": self.returned}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> History:
        """Read the values of :meth:`to_dict`; a ValueError says what is missing or damaged."""
        if not isinstance(values, Mapping) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, Mapping) else type(values).__name__
            raise ValueError(f"history must have format {FORMAT} of torch_sap, got {found!r}")
        rounds, returned = values.get("rounds"), values.get("returned")
        if not isinstance(rounds, list):
            raise ValueError(f"history must hold a list of rounds, got {rounds!r}; it is damaged or not from torch_sap")
        if returned is not None and not isinstance(returned, int):
            raise ValueError(f"history must hold the number of the returned round or None, got {returned!r}")
        history = cls(map(Round.from_dict, rounds))
        history.returned = returned
        return history

    def to_json(self, path: Path) -> None:
        """Write a JSON file that :meth:`from_json` reads back as an equal history."""
        check_path("path", path)
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.to_dict(), file, allow_nan=False)

    @classmethod
    def from_json(cls, path: Path) -> History:
        """Read a file of :meth:`to_json`; raise a ValueError if it is damaged or has another format."""
        check_path("path", path)
        try:
            with open(path, encoding="utf-8") as file:
                values = json.load(file)
        except ValueError as error:
            text = f"path must be a file that History.to_json wrote, but {path} is damaged: {error}"
            raise ValueError(text) from error
        return cls.from_dict(values)

    def phases(
        self, *, metric: str | None = None, mode: Mode = "max", noise: float = 0.005, significant: float = 0.05
    ) -> list[Phase | None]:
        """Label each round regularization, compression or collapse by the paper's hypothesis, or None.

        Rule, other arguments and errors: :func:`torch_sap.records.phases.label_phases`. ``metric`` is the name of a
        metric that every round has; by default "accuracy", or else the first one.
        """
        values = metric_values(self, metric)
        return label_phases([round.pqi for round in self], values, mode=mode, noise=noise, significant=significant)

    def plot(
        self, path: Path | None = None, *, metric: str | None = None, phases: Sequence[Phase | None] = ()
    ) -> Figure:
        """Draw the rounds as in the paper's Figure 2: (a) the retrained models, (b) the pruned models.

        What was not measured has no panel: the Gini index without ``gini=True``, metrics without ``eval_fn``.

        Args:
            path: File to write; the suffix decides the format. None writes none.
            metric: Name of the metric to draw. By default "accuracy", or else the first one.
            phases: The result of :meth:`phases`, to show the labels as bands behind the curves.

        Returns:
            A figure of matplotlib, which a notebook shows.

        Raises:
            ImportError: if matplotlib is not installed (extra "plot").
            ValueError: if there is no round, or no such metric.
        """
        from torch_sap.records.plots import plot_rounds

        if path is not None:
            check_path("path", path)
        figure = plot_rounds(self, metric=metric, phases=phases)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure
