"""A callback that writes rounds to TensorBoard, during a run or afterwards."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from torch_sap.arguments import needs
from torch_sap.records.round import Round, Sparsity, mean_defined

with needs("torch_sap.integrations.tensorboard", "TensorBoard", "tensorboard"):
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardCallback:
    """Write each round as TensorBoard events, with the round's number as the step.

    Tags of the retrained model and, with the prefix ``pruned_``, of the pruned model before rewinding:
    ``sap/density``, ``sap/remaining``, ``sap/pruned``, ``sap/seconds``; ``pqi/global``, ``pqi/layer_mean``,
    ``pqi/neuron_mean``, and ``gini/...`` where it was measured; ``metrics/NAME``; for each tensor
    ``layer_density/NAME``, ``layer_pqi/NAME``, and the histogram ``neuron_pqi/NAME``.

    Args:
        writer: Your SummaryWriter, which stays open, or the folder for a new one, which :meth:`close` closes.
        layers: Whether to write tags for each tensor.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> with TensorBoardCallback("runs/sap") as tensorboard:
        ...     history = iterative_sap(model, train_fn=lambda model: None, iterations=2, callback=tensorboard)
    """

    def __init__(self, writer: SummaryWriter | str | os.PathLike[str], *, layers: bool = True) -> None:
        self._owned = not isinstance(writer, SummaryWriter)
        self.writer: Any = SummaryWriter(os.fspath(writer)) if not isinstance(writer, SummaryWriter) else writer
        self.layers = layers

    def __call__(self, round: Round) -> None:
        """Write a round."""
        counts = {"density": round.density, "remaining": round.remaining, "pruned": round.pruned_count}
        self._scalars("sap/", {**counts, "seconds": round.seconds}, round)
        self._scalars("metrics/", round.metrics, round)
        self._scalars("pruned_metrics/", round.pruned_metrics, round)
        self._sparsity("", round.retrained, round)
        if round.pruned is not None:
            self._sparsity("pruned_", round.pruned, round)
        if self.layers:
            density = {tensor.name: tensor.density for tensor in round.tensors if tensor.total}
            self._scalars("layer_density/", density, round)
            layers = {name: _defined(index) for name, index in round.retrained.pqi["layer"].items()}
            self._scalars("layer_pqi/", {name: float(index[0]) for name, index in layers.items() if len(index)}, round)
            for name, index in round.retrained.pqi["neuron"].items():
                if len(defined := _defined(index)):
                    self.writer.add_histogram(f"neuron_pqi/{name}", defined, round.number)
        self.writer.flush()

    def _scalars(self, prefix: str, values: Mapping[str, float], round: Round) -> None:
        for name, value in values.items():
            self.writer.add_scalar(prefix + name, value, round.number)

    def _sparsity(self, prefix: str, sparsity: Sparsity, round: Round) -> None:
        for measure, scopes in (("pqi", sparsity.pqi), ("gini", sparsity.gini)):
            for scope, groups in (scopes or {}).items():
                if not np.isnan(mean := mean_defined(groups)):
                    name = scope if scope == "global" else f"{scope}_mean"
                    self._scalars(f"{prefix}{measure}/", {name: mean}, round)

    def close(self) -> None:
        """Close the writer, unless you passed it."""
        if self._owned:
            self.writer.close()

    def __enter__(self) -> TensorBoardCallback:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _defined(values: Any) -> Any:
    return values[~np.isnan(values)]
