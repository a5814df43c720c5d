"""The two runs on docs/command-line.md: a small network on scikit-learn's digits, pruned in two scopes; seconds.

python benchmarks/digits_runs.py docs/results/runs     # writes digits-global and digits-layer there
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import torch_sap


def main(folder: Path) -> None:
    """Prune the network in each scope and write its history and settings."""
    images, labels = (torch.as_tensor(values) for values in load_digits(return_X_y=True))
    images = images.float() / 16

    def train(model: nn.Module) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        for _ in range(150):
            optimizer.zero_grad()
            F.cross_entropy(model(images[:1300]), labels[:1300]).backward()
            optimizer.step()

    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"accuracy": (model(images[1300:]).argmax(1) == labels[1300:]).double().mean().item()}

    for scope in ("global", "layer"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        history = torch_sap.iterative_sap(model, train, iterations=6, scope=scope, eta_r=0.2, eval_fn=evaluate)
        run = folder / f"digits-{scope}"
        run.mkdir(parents=True, exist_ok=True)
        history.to_json(run / "history.json")
        settings = {"scope": scope, "eta_r": 0.2, "epochs": 150, "seed": 0}
        (run / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
