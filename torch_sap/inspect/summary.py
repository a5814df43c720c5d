"""A table of a model's weights: what remains of each, how sparse it is, and what it costs to compute."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from torch_sap.decide.measures import measure
from torch_sap.distributed.replicas import unwrap
from torch_sap.distributed.sharded import is_dtensor
from torch_sap.inspect.macs import count_macs
from torch_sap.inspect.verify import arguments_of, as_it_was
from torch_sap.masks.parameters import Prunable, entries_of, resolve
from torch_sap.records.codec import to_plain

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class LayerSummary:
    """One weight tensor.

    Attributes:
        name: Dotted path of the parameter before it was pruned.
        module: Class of the module that has it.
        shape: Its shape.
        weights: Entries.
        remaining: Unpruned ones; of a tensor without a mask, as :func:`remove` leaves it, those that are not zero.
        pqi: PQ Index as a pruning step would measure it, of the entries that no mask prunes; NaN if undefined.
        empty_rows: Output channels of which nothing remains, by number.
        macs: Multiply-accumulate operations that the example does with it; None without an example.
    """

    name: str
    module: str
    shape: tuple[int, ...]
    weights: int
    remaining: int
    pqi: float
    empty_rows: tuple[int, ...]
    macs: int | None

    @property
    def density(self) -> float:
        """remaining / weights; NaN if there is no entry."""
        return self.remaining / self.weights if self.weights else float("nan")

    @property
    def sparsity(self) -> float:
        """1 - density."""
        return 1 - self.density

    @property
    def sparse_macs(self) -> int | None:
        """``macs * density``, rounded: what a computation would do that skips every pruned entry."""
        return None if self.macs is None else round(self.macs * self.remaining / max(self.weights, 1))

    def row(self) -> dict[str, Any]:
        """The record as a line of a table."""
        columns = {"name": self.name, "module": self.module, "shape": self.shape, "weights": self.weights}
        columns |= {"remaining": self.remaining, "sparsity": self.sparsity, "pqi": self.pqi}
        columns |= {"empty_rows": len(self.empty_rows)}
        return columns if self.macs is None else columns | {"macs": self.macs, "sparse_macs": self.sparse_macs}


@dataclass(frozen=True)
class Summary:
    """What :func:`summary` found, a record for each weight tensor in the model's order.

    Attributes:
        layers: The records.
        pqi: PQ Index of all weights together; NaN if undefined.
        parameters: All parameters of the model, biases and norms too.
        other_macs: Multiply-accumulate operations of the example in which no weight takes part, as in attention; None
            without an example.
    """

    layers: tuple[LayerSummary, ...]
    pqi: float
    parameters: int
    other_macs: int | None

    @property
    def weights(self) -> int:
        """Entries of all weight tensors."""
        return sum(layer.weights for layer in self.layers)

    @property
    def remaining(self) -> int:
        """Unpruned entries of all weight tensors."""
        return sum(layer.remaining for layer in self.layers)

    @property
    def density(self) -> float:
        """remaining / weights; NaN if there is no entry."""
        return self.remaining / self.weights if self.weights else float("nan")

    @property
    def sparsity(self) -> float:
        """1 - density."""
        return 1 - self.density

    @property
    def macs(self) -> int | None:
        """Multiply-accumulate operations of the example, dense, other_macs included."""
        return None if self.other_macs is None else self.other_macs + sum(layer.macs or 0 for layer in self.layers)

    @property
    def sparse_macs(self) -> int | None:
        """The same with every tensor's operations times its density."""
        if self.other_macs is None:
            return None
        return self.other_macs + sum(layer.sparse_macs or 0 for layer in self.layers)

    @property
    def empty_rows(self) -> dict[str, tuple[int, ...]]:
        """The output channels of which nothing remains, of those tensors that have some."""
        return {layer.name: layer.empty_rows for layer in self.layers if layer.empty_rows}

    def rows(self) -> list[dict[str, Any]]:
        """One :meth:`LayerSummary.row` a tensor."""
        return [layer.row() for layer in self.layers]

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; None for an index that is not defined."""
        layers = [
            asdict(layer) | {"pqi": to_plain(layer.pqi), "sparse_macs": layer.sparse_macs} for layer in self.layers
        ]
        for layer in layers:
            layer |= {"shape": list(layer["shape"]), "empty_rows": list(layer["empty_rows"])}
        total = {"weights": self.weights, "remaining": self.remaining, "pqi": to_plain(self.pqi)}
        total |= {"parameters": self.parameters, "other_macs": self.other_macs}
        return {**total, "macs": self.macs, "sparse_macs": self.sparse_macs, "layers": layers}

    def to_frame(self) -> pd.DataFrame:
        """The tensors as a pandas DataFrame, a row each.

        Raises:
            ImportError: if pandas is not installed (extra "frame").
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("Summary.to_frame needs pandas: pip install 'torch_sap[frame]'") from error
        return pd.DataFrame(self.rows())

    def __str__(self) -> str:
        """A table with a line a tensor and one in total."""
        cells = self._cells()
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        lines = [
            "  ".join(
                cell.ljust(width) if i < 3 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in cells
        ]
        rule = "-" * max(map(len, lines))
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], *self._notes()])

    def _repr_html_(self) -> str:
        """The same table for a notebook."""
        head, *body = (
            "<tr>"
            + "".join(
                f'<{tag} style="text-align:{"left" if i < 3 else "right"}">{html.escape(cell)}</{tag}>'
                for i, cell in enumerate(line)
            )
            + "</tr>"
            for tag, line in zip(["th"] + ["td"] * len(self.layers) + ["th"], self._cells(), strict=True)
        )
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self._notes())
        return f"<table><thead>{head}</thead><tbody>{''.join(body)}</tbody></table>{notes}"

    def _cells(self) -> list[list[str]]:
        """Texts of the table: head, a line a tensor, total."""
        head = ["weight", "module", "shape", "weights", "remaining", "sparsity", "PQI", "empty rows"]
        lines = [
            [layer.name, layer.module, str(layer.shape), *_texts(layer, len(layer.empty_rows))] for layer in self.layers
        ]
        lines.append(["total", "", "", *_texts(self, sum(map(len, self.empty_rows.values())))])
        return [head if self.other_macs is None else [*head, "MACs", "sparse MACs"], *lines]

    def _notes(self) -> list[str]:
        if not self.other_macs:
            return []
        return [f"total MACs with {_short(self.other_macs)} in which no weight takes part (attention, for one)"]


def _texts(record: LayerSummary | Summary, empty_rows: int) -> list[str]:
    pqi = "undefined" if record.pqi != record.pqi else f"{record.pqi:.3f}"
    texts = [f"{record.weights:,}", f"{record.remaining:,}", f"{record.sparsity:.1%}", pqi, f"{empty_rows:,}"]
    if record.macs is None or record.sparse_macs is None:
        return texts
    return [*texts, _short(record.macs), _short(record.sparse_macs)]


def _short(number: float) -> str:
    """Four digits and a unit."""
    for unit in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.4g}{unit}"
        number /= 1000
    return f"{number:.4g}T"


def summary(model: nn.Module, example_input: Any = None) -> Summary:
    """A table of a model's weights: shape, remaining, sparsity, PQ Index, empty rows, and dense and sparse MACs.

    The model is left exactly as it was: modes, buffers, attributes of modules, gradients, random numbers. It computes
    the example in eval mode, without gradients, eagerly. MACs are counted by the formulas of torch.utils.flop_counter
    and given to the tensors that take part in each operation, also where a weight is read without calling its module.

    Args:
        model: Any module, pruned or not, with a parameter that :func:`prunable_parameters` names.
        example_input: A tensor, a tuple of positional arguments or a dict of keyword arguments for the model. None
            leaves MACs out.

    Returns:
        A record for each weight tensor, shared ones once. Print it, or show it in a notebook; ``to_frame`` and
        ``to_dict`` have it as values.

    Raises:
        TypeError: if the model is no module, or a weight is not of a real floating-point type.
        ValueError: if it has no such weight, or a weight is NaN or infinite; it is named.
        NotImplementedError: if a weight is sharded.
        Exception: whatever the model raises for the example.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> print(summary(model, torch.ones(1, 64)).macs)
        2368
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    model = unwrap(model)
    prunables = resolve(model)
    for prunable in prunables:
        if is_dtensor(prunable.weight):
            raise NotImplementedError(
                f"{prunable.name} is sharded (a DTensor), which summary cannot count; load the full state_dict into a "
                "model on one process and summarise that"
            )
    with torch.no_grad():
        entries = entries_of(prunables, None)
        pqi = measure(entries, "layer", 0.5, 1.0)
        counted = None if example_input is None else _macs(model, prunables, example_input)
        layers = [
            _layer(prunable, float(pqi[prunable.name][0]), None if counted is None else counted[0][i])
            for i, prunable in enumerate(prunables)
        ]
        whole = float(measure(entries, "global", 0.5, 1.0)["global"][0])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Summary(tuple(layers), whole, parameters, None if counted is None else counted[1])


def _layer(prunable: Prunable, pqi: float, macs: int | None) -> LayerSummary:
    weight, mask = prunable.weight, prunable.mask
    kept = weight.detach() != 0 if mask is None else mask
    rows = torch.cat([part.flatten(1).any(1) for part in prunable.entry().rows(kept)])
    return LayerSummary(
        name=prunable.name,
        module=type(prunable.holders[0][0]).__name__,
        shape=tuple(weight.shape),
        weights=weight.numel(),
        remaining=int(kept.sum()),
        pqi=pqi,
        empty_rows=tuple((~rows).nonzero().flatten().tolist()),
        macs=macs,
    )


def _macs(model: nn.Module, prunables: Sequence[Prunable], example: Any) -> tuple[list[int], int]:
    args, kwargs = arguments_of(example)
    tensors = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]
    with as_it_was(model):
        return count_macs(lambda: model(*args, **kwargs), [p.weight for p in prunables], tensors)
