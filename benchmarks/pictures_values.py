"""The numbers behind the pictures of docs/maths.md: what torch_sap says of vectors, of a real network and of real runs.

Each function gives plain values (lists, numbers and names), so that a picture can carry a digest of what it shows.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from paper import experiments, figures, tables
from paper.results import Histories, rounded
from pretrained import SAP
from torch import Tensor, nn

import torch_sap
from torch_sap.records.round import Round

Values = dict[str, Any]

# A depthwise convolution of tf_efficientnet_lite0 in which the three scopes take clearly different shares.
LAYER = "blocks.4.0.conv_dw.weight"
NORMS = ((0.5, 1.0), (1.0, 2.0))
# Zeros added for each entry of a vector: shares of 0, 50, 75 and 90 %.
ZEROS = (0, 1, 3, 9)
POINTS = 100
BINS, SHOWN = 50, 0.85  # of the histogram, and the share of the magnitudes that it has room for
SETTINGS: dict[str, dict[str, dict[str, float]]] = {
    "p and q": {
        "p=0.2, q=1": {"p": 0.2},
        "p=0.5, q=1": {},
        "p=1, q=2": {"p": 1, "q": 2},
        "p=1, q=4": {"p": 1, "q": 4},
    },
    "gamma and beta": {
        "gamma=0.5": {"gamma": 0.5},
        "gamma=1": {},
        "gamma=2": {"gamma": 2},
        "gamma=5": {"gamma": 5},
        "gamma=5, beta=0.5": {"gamma": 5, "beta": 0.5},
    },
    "eta_r": {f"eta_r={eta_r:g}": {"eta_r": eta_r} for eta_r in (0, 0.01, 0.1, 0.3, 1)},
}


HEADLINE = {
    "SAP, which counts": "SAP global (p=1, q=2)",
    "Lottery Ticket, 20% per round": "Lottery Ticket",
    "one ranking for all rounds (One Shot)": "One Shot",
    "random": "random",
}
"""The methods of the picture of the README, and how figures describe them."""


def vectors(model: nn.Module) -> dict[str, Tensor]:
    """Magnitudes from the most equal to the least, and those of a trained layer; quantiles in place of random numbers.

    Returns:
        One-dimensional tensors by name.
    """
    middles = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    large = torch.ones(100)
    large[0] = 100
    return {
        "equal": torch.ones(1000),
        "normal": torch.erfinv(middles),
        "Laplace": -torch.log1p(-middles),
        "trained layer": model.get_parameter(LAYER).detach().flatten().abs(),
        "one is large": large,
    }


def measured(model: nn.Module) -> Values:
    """Of each vector its sorted magnitudes, thinned out, and its PQ Index with ever more zeros added."""
    found = {}
    for name, w in vectors(model).items():
        heights = (w / w.max()).sort(descending=True).values[:: len(w) // POINTS]
        with_zeros = [torch.cat([w, w.new_zeros(times * len(w))]) for times in ZEROS]
        indices = {f"p={p:g}, q={q:g}": [float(torch_sap.pq_index(v, p, q)) for v in with_zeros] for p, q in NORMS}
        found[name] = {"d": len(w), "heights": heights.tolist(), "index": indices}
    return found


def counted(model: nn.Module) -> Values:
    """Share that a round prunes, over the PQ Index, for the settings of each panel; and of each layer of a model."""
    grid, size = np.linspace(0, 1, 201), 10**6
    found: Values = {}
    for panel, of_panel in SETTINGS.items():
        found[panel] = {}
        for name, setting in of_panel.items():
            groups = torch_sap.layer_unstructured(copy.deepcopy(model), **setting).groups
            found[panel][name] = {
                "curve": (torch_sap.prune_count(grid, size, **setting) / size).tolist(),
                "layers": [[float(group.index[0]), group.c[0] / group.d[0]] for group in groups.values()],
                "layer": list(groups).index(LAYER),
            }
    return found


def chosen(model: nn.Module) -> Values:
    """In each scope, how many of a layer's magnitudes stay and go, in bins; and its groups' d, I, r and c."""
    dense = model.get_parameter(LAYER).detach().abs()
    edges = np.linspace(0, float(dense.quantile(SHOWN)), BINS + 1)
    found: Values = {"edges": edges.tolist(), "name": LAYER, "shape": list(dense.shape)}
    for scope, prune in SAP.items():
        pruned = copy.deepcopy(model)
        group = prune(pruned).groups["global" if scope == "global" else LAYER]
        mask = pruned.get_submodule(LAYER.rpartition(".")[0]).weight_mask
        found[scope] = {
            "stay": np.histogram(dense[mask].numpy(), edges)[0].tolist(),
            "go": np.histogram(dense[~mask].numpy(), edges)[0].tolist(),
            "share": float((~mask).double().mean()),
            "largest that goes": float(dense[~mask].max()),
            "smallest that stays": float(dense[mask].min()),
            **{key: getattr(group, key).tolist() for key in ("d", "index", "r", "c")},
        }
    return found


def ran(histories: Histories) -> Values:
    """Of the runs of docs/does-it-work.md (MLP, FashionMNIST) what each round measures and prunes, by method."""
    own = tables.selected(histories, experiments.figure2(experiments.REDUCED["mlp", "fashion-mnist"]))
    groups = figures.grouped({run: history for run, history in own.items() if run.method != "one-shot"})
    columns: tuple[figures.Column, ...] = (
        ("weights that remain (%)", lambda found: 100 * found.density),
        ("PQ Index that the run measures", lambda found: found.pqi),
        ("share that the round prunes (%)", _pruned_share),
        ("test accuracy (%)", lambda found: 100 * found.metrics["accuracy"]),
    )
    found: Values = {title: {} for title, _ in columns}
    for name, of_method in groups.items():
        for title, value in columns:
            found[title][name] = figures.over_seeds(of_method, value).tolist()
    found["stops"] = {
        name: [list(tables.stop(history, tables.RULES[tables.TOLERANCE])) for history in of_method.values()]
        for name, of_method in groups.items()
    }
    return found


def headlined(histories: Histories) -> Values:
    """Remaining weights and test accuracy of each round, by method, of the runs of docs/does-it-work.md (MLP)."""
    own = tables.selected(histories, experiments.audit(experiments.REDUCED["mlp", "fashion-mnist"]))
    groups = figures.grouped({run: history for run, history in own.items() if run.method != "plain"})
    found: Values = {}
    for name, described in HEADLINE.items():
        of_method = groups[described]
        accuracy = figures.over_seeds(of_method, lambda found: found.metrics["accuracy"])
        found[name] = {
            "remaining": figures.over_seeds(of_method, lambda found: found.density).mean(0).tolist(),
            "accuracy": accuracy.mean(0).tolist(),
            "deviation": accuracy.std(0, ddof=1).tolist(),
        }
    return found


def digest(values: Mapping[str, Any]) -> str:
    """A short name of what a picture shows: equal for equal values, of which six digits count."""
    return hashlib.sha256(json.dumps(rounded(values)).encode()).hexdigest()[:16]


def _pruned_share(found: Round) -> float:
    """NaN in the last round, which is a training only."""
    return 100 * found.pruned_count / found.remaining if found.pruned_count else np.nan
