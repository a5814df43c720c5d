"""A real run of a small model of another library: pruned in each scope, trained, verified, removed, saved, loaded."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import torch_sap
from zoo.libraries import LIBRARIES
from zoo.small import Trial, trial
from zoo.tiny import leaves

SCOPES = {
    "global": torch_sap.global_unstructured,
    "layer": torch_sap.layer_unstructured,
    "neuron": torch_sap.neuron_unstructured,
}
STEPS = 3
ROUNDING = 1e-5
"""How far outputs may lie apart, relative to the largest. Recorded is how far they do."""


@dataclass(frozen=True)
class Lifecycle:
    """One model.

    Attributes:
        library: Its library.
        model: Its name there.
        made: The class that was built.
        parameters: Entries of all its parameters.
        tensors: Weights that were pruned.
        remaining_global, remaining_layer, remaining_neuron: Share of their entries that remains in each scope.
        zeros_received: Share of all pruned entries, in all scopes, that were zero where the computation received them.
        unused: Weights that the computation of the example does not use.
        reload_difference: Largest relative difference of an output after remove and strict loading into a fresh model.
        saved_difference: The same after save_pretrained of the pruned model and from_pretrained; empty without them.
        seconds: For all of it.
        not_run: Why the dense model cannot be made small or does not compute; empty for a real run.
        failure: Empty, or what went wrong with the pruned model.
        made_with: Versions.
    """

    library: str
    model: str
    made: str = ""
    parameters: int = 0
    tensors: int = 0
    remaining_global: float = 0.0
    remaining_layer: float = 0.0
    remaining_neuron: float = 0.0
    zeros_received: float = 0.0
    unused: int = 0
    reload_difference: float = 0.0
    saved_difference: float | str = ""
    seconds: float = 0.0
    not_run: str = ""
    failure: str = ""
    made_with: str = ""


def lifecycle(path: str) -> Lifecycle:
    """Run one model, named as LIBRARY/MODEL."""
    library, _, name = path.partition("/")
    started = time.perf_counter()
    found = Lifecycle(library, name, made_with=LIBRARIES[library].made_with())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            made = trial(library, name)
            if not torch_sap.prunable_parameters(made.model):
                raise ValueError("it has no weights")
            train(copy.deepcopy(made.model), made)
            if difference(computed(made.model, made), computed(made.model, made)):
                raise ValueError("the dense model computes something else each time")
        except Exception as error:
            return replace(found, not_run=_line(error), seconds=round(time.perf_counter() - started, 1))
        try:
            found = _run(found, made)
        except Exception as error:
            found = replace(found, made=type(made.model).__name__, failure=_line(error))
    return replace(found, seconds=round(time.perf_counter() - started, 1))


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def computed(model: nn.Module, made: Trial) -> list[Tensor]:
    """The floating-point outputs of the example, in eval mode."""
    torch.manual_seed(2)  # some models draw masks or noise in eval mode, too
    with torch.no_grad():
        return [leaf for leaf in leaves(made.call(model.eval())) if leaf.is_floating_point()]


def train(model: nn.Module, made: Trial) -> None:
    """Three steps of SGD with momentum and weight decay, in training mode."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)
    model.train()
    for _ in range(STEPS):
        floating = [leaf for leaf in leaves(made.call(model)) if leaf.is_floating_point() and leaf.requires_grad]
        optimizer.zero_grad()
        torch.stack([(leaf - 1).square().mean() for leaf in floating]).sum().backward()
        optimizer.step()


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference of two outputs, relative to the largest value of each tensor."""
    found = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if not (a.isfinite() == b.isfinite()).all():
            raise FloatingPointError("an output is not finite where the other is")
        a, b = a.double().nan_to_num(), b.double().nan_to_num()
        found = max(found, float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))) if a.numel() else found
    return found


def masks_of(model: nn.Module) -> Mapping[str, Tensor]:
    """The masks by the names of the parameters before pruning, each once."""
    return {name.removesuffix("_mask"): mask for name, mask in model.named_buffers() if name.endswith("_mask")}


def _run(found: Lifecycle, made: Trial) -> Lifecycle:
    pruned = revived = 0
    for scope, prune in SCOPES.items():
        model = copy.deepcopy(made.model)
        report = prune(model, gamma=3.0)
        train(model, made)
        masks = {n: m for n, m in masks_of(model).items() if n + "_orig" in dict(model.named_parameters())}
        verification = torch_sap.verify(model, made.example)
        pruned += report.total - report.remaining
        revived += sum(weight.revived for weight in verification.weights)
        expected = computed(model, made)
        saved = difference(computed(made.saved(model), made), expected) if made.saved else ""
        state = torch_sap.remove(model).state_dict()
        for name, mask in masks.items():
            if name in state and torch.count_nonzero(state[name][~mask]):
                raise AssertionError(f"{name} of the removed model has pruned entries that are not zero")
        fresh = copy.deepcopy(made.model)
        fresh.load_state_dict(state, strict=True)
        reload = difference(computed(fresh, made), expected)
        found = replace(
            found,
            made=type(made.model).__name__,
            parameters=sum(parameter.numel() for parameter in made.model.parameters()),
            tensors=len(report.tensors),
            **{f"remaining_{scope}": round(report.density, 4)},
            zeros_received=1 - revived / pruned,
            unused=sum(weight.effective_sparsity is None for weight in verification.weights),
            reload_difference=max(found.reload_difference, reload),
            saved_difference=saved if saved == "" else max(float(found.saved_difference or 0), float(saved)),
        )
        if revived:
            reasons = {weight.reason for weight in verification.weights if weight.revived}
            return replace(found, failure=f"pruned entries are not zero where they are received: {sorted(reasons)}")
    if found.reload_difference > ROUNDING:
        return replace(found, failure="the reloaded model computes something else")
    if float(found.saved_difference or 0) > ROUNDING:
        return replace(found, failure="the saved model computes something else")
    return found
