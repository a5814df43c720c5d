"""PQ Index of freshly initialized models: the formula written down in float32, and torch_sap.

    python benchmarks/precision.py

float32 norms of many entries drift with their number and with the number of threads that add them up; the number of
entries to prune follows. Prints the figures of the table in docs/speed.md.
"""

from __future__ import annotations

import argparse

import timm
import torch

import torch_sap

MODELS = ["resnet50", "vit_base_patch16_224", "vit_large_patch16_224"]


def literal(w: torch.Tensor, p: float = 0.5, q: float = 1.0) -> float:
    """The formula in the type of w."""
    norms = torch.linalg.vector_norm(w, p) / torch.linalg.vector_norm(w, q)
    return float(1 - w.numel() ** (1 / q - 1 / p) * norms)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    arguments = parser.parse_args()
    print("| model | weights | computed in | PQ Index | entries to prune |\n|---|---|---|---|---|")
    for name in arguments.models:
        torch.manual_seed(0)
        pairs = torch_sap.prunable_parameters(timm.create_model(name))
        w = torch.cat([getattr(*pair).detach().flatten() for pair in pairs])
        found = {}
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found[f"float32, {threads} thread{'s' * (threads > 1)}"] = literal(w)
        found["float64"] = literal(w.double())
        found["torch_sap"] = torch_sap.pq_index(w).item()
        for kind, index in found.items():
            print(f"| {name} | {len(w):,} | {kind} | {index:.6f} | {torch_sap.prune_count(index, len(w)):,} |")


if __name__ == "__main__":
    main()
