"""The record of an iterative pruning: a Round an iteration, a History of them, as JSON, CSV, data frame and figure."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

from torch_sap.arguments import check_path
from torch_sap.records.phases import Mode, Phase, label_phases, metric_values
from torch_sap.records.round import Round

if TYPE_CHECKING:
    import pandas as pd

Path = str | os.PathLike[str]
FORMAT = 1


class History(Sequence[Round]):
    """The rounds of an iterative pruning, in order.

    Args:
        rounds: The rounds.

    Raises:
        TypeError: if something else is among them.

    Attributes:
        returned: Number of the round whose model the user got back, where a stopping rule chose one; else None.

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
            raise TypeError(f"rounds must be rounds (torch_sap.Round), got {rounds!r}")
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

    def __iter__(self) -> Iterator[Round]:
        return iter(self._rounds)

    def __repr__(self) -> str:
        """A line a round."""
        return "\n".join(map(repr, self)) or "<History without rounds>"

    def append(self, round: Round) -> None:
        """Add a round at the end.

        Raises:
            TypeError: if it is no round.
        """
        if not isinstance(round, Round):
            raise TypeError(f"rounds must be rounds (torch_sap.Round), got {round!r}")
        self._rounds.append(round)

    def rows(self) -> list[dict[str, Any]]:
        """One :meth:`Round.row` a round."""
        return [round.row() for round in self]

    def to_frame(self) -> pd.DataFrame:
        """The rounds as a pandas DataFrame, a row a round.

        Raises:
            ImportError: if pandas is not installed (extra "frame").
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("History.to_frame needs pandas: pip install 'torch_sap[frame]'") from error
        return pd.DataFrame(self.rows())

    def to_csv(self, path: Path) -> None:
        """Write a line a round."""
        check_path("path", path)
        rows = self.rows()
        columns = list(dict.fromkeys(column for row in rows for column in row))
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {"format": FORMAT, "rounds": [round.to_dict() for round in self], "returned": self.returned}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> History:
        """The history that :meth:`to_dict` wrote.

        Raises:
            ValueError: if the values are of another format or not complete.
        """
        if not isinstance(values, Mapping) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, Mapping) else type(values).__name__
            raise ValueError(f"history must have format {FORMAT} of torch_sap, got {found!r}")
        rounds, returned = values.get("rounds"), values.get("returned")
        if not isinstance(rounds, list):
            raise ValueError(f"history must hold a list of rounds, got {rounds!r}; it is damaged or of another program")
        if returned is not None and not isinstance(returned, int):
            raise ValueError(f"history must hold the number of the returned round or None, got {returned!r}")
        history = cls([Round.from_dict(item) for item in rounds])
        history.returned = returned
        return history

    def to_json(self, path: Path) -> None:
        """Write all there is, so that :meth:`from_json` gives an equal history."""
        check_path("path", path)
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.to_dict(), file, allow_nan=False)

    @classmethod
    def from_json(cls, path: Path) -> History:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: if the file is damaged or of another format.
        """
        check_path("path", path)
        with open(path, "rb") as file:
            text = file.read()
        try:
            values = json.loads(text)
        except ValueError as error:  # not UTF-8, too
            raise ValueError(
                f"path must be a file that History.to_json wrote, but {path} is damaged: {error}"
            ) from error
        return cls.from_dict(values)

    def phases(
        self, *, metric: str | None = None, mode: Mode = "max", noise: float = 0.005, significant: float = 0.05
    ) -> list[Phase | None]:
        """Label each round regularisation, compression or collapse, as the paper's hypothesis says; None for neither.

        The rule is written down at :func:`torch_sap.records.phases.label_phases`; it looks at the PQ Index of the
        retrained models over all weights, and at one metric of theirs.

        Args:
            metric: Name of the metric. By default "accuracy", or else the first there is.
            mode: "max" if a larger metric is better, "min" if a smaller one is.
            noise: Largest loss that is no loss, in the units of the metric.
            significant: Largest loss that is moderate.

        Raises:
            ValueError: if a round lacks the metric, or an argument is out of its range.
        """
        values = metric_values(self, metric)
        return label_phases([round.pqi for round in self], values, mode=mode, noise=noise, significant=significant)

    def plot(self, path: Path, *, metric: str | None = None, phases: Sequence[Phase | None] = ()) -> None:
        """Draw the rounds as the paper's Figure 2 does: (a) the retrained models, (b) the pruned models.

        Args:
            path: File to write; the suffix decides the format.
            metric: Name of the metric to draw. By default "accuracy", or else the first there is.
            phases: Labels to show as bands behind the curves, one a round: what :meth:`phases` returns.

        Raises:
            ImportError: if matplotlib is not installed (extra "plot").
            ValueError: if there is no round, or no such metric.
        """
        from torch_sap.records.plots import plot_rounds

        check_path("path", path)
        plot_rounds(self.rows(), path, metric=metric, phases=phases)
