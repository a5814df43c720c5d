"""What the calls of the table of bad inputs are about: models, a pruner, a history and files, and how they are."""

import json
import math

import torch
from helpers import fit, mlp, snapshot
from torch import nn
from torch.nn.utils import prune

import torch_sap
import torch_sap.stopping
from torch_sap.decide.bounds import Hyperparameters
from torch_sap.integrations.torch_pruning import shrink
from torch_sap.records.round import Round

try:
    from torch_sap.integrations.lightning import SAPCallback
except ImportError:
    SAPCallback = None


STOPPING = ("StoppingRule", "TargetDensity", "WithinTolerance", "Collapse", "NothingLeft")


def raising(model):
    """A training that fails in the middle."""
    with torch.no_grad():
        model[0].weight.add_(1)
    raise RuntimeError("the training failed")


def make_world(folder):
    """Names that the calls use, each call with new ones."""
    world = {name: getattr(torch_sap, name) for name in torch_sap.__all__}
    world |= {name: getattr(torch_sap.stopping, name) for name in STOPPING} | {"Round": Round, "shrink": shrink}
    world |= {
        "nn": nn,
        "torch": torch,
        "prune": prune,
        "tensor": torch.tensor,
        "ones": torch.ones,
        "nan": math.nan,
        "inf": math.inf,
    }
    world |= {"Hyperparameters": Hyperparameters, "SAPCallback": SAPCallback}
    model, pruned, with_nan, integers = mlp(), mlp(), mlp(), nn.Module()
    torch_sap.layer_unstructured(pruned)
    fit(pruned, torch.optim.SGD(pruned.parameters(), lr=0.1), (5, 6), steps=1)
    with torch.no_grad():
        with_nan[0].weight[1, 2] = math.nan
    integers.weight = nn.Parameter(torch.ones(2, 3, dtype=torch.int32), requires_grad=False)
    world |= {"model": model, "layer": nn.Linear(6, 9), "pruned": pruned, "with_nan": with_nan, "integers": integers}
    sap, other = torch_sap.SAP(mlp()), torch_sap.SAP(nn.Sequential(nn.Linear(3, 2)))
    sap.step({"accuracy": 0.9})
    world |= {"sap": sap, "unrewound": torch_sap.SAP(mlp(), rewind="none"), "history": sap.history}
    world |= {"other_settings": torch_sap.SAP(mlp(), beta=0.5).state_dict(), "other_model": other.state_dict()}
    world |= {"train_fn": lambda model: None, "raising": raising}
    files = {
        "whole": folder / "history.json",
        "truncated": folder / "truncated.json",
        "of_others": folder / "others.json",
    }
    sap.history.to_json(files["whole"])
    files["truncated"].write_text(files["whole"].read_text()[:30])
    files["of_others"].write_text(json.dumps({"accuracy": 1.0}))
    world |= {name: str(path) for name, path in files.items()}
    return world | {"figure": str(folder / "figure.png"), "folder": str(folder)}


def state_of(world, folder):
    """All that a refused call must leave as it is: models with gradients, histories, pruners, files."""
    found = {}
    for name, value in world.items():
        pruner = value if isinstance(value, torch_sap.SAP) else None
        model = pruner.model if pruner else value
        if isinstance(model, nn.Module):
            found[name] = snapshot(model)
            found[name]["values"] = {key: bits.tolist() for key, bits in found[name]["values"].items()}
            found[name]["grads"] = [None if p.grad is None else p.grad.tolist() for p in model.parameters()]
        history = pruner.history if pruner else value
        if isinstance(history, torch_sap.History):
            found[name + " rounds"] = history.to_dict()
        if pruner:
            point = pruner.state_dict()["rewind_point"] or {}
            found[name + " rewind point"] = {key: value.tolist() for key, value in point.items()}
    return found | {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
