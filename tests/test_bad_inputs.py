"""Every wrong call raises an error that names the argument, the rule, and the value, and changes nothing."""

import ast
import importlib.util
import math
import re

import pytest
import torch
from bad_inputs import CASES, TABLE, SAPCallback, make_world, state_of, write_table
from helpers import FUNCTIONS, SCOPES, assert_unchanged, mlp, snapshot
from torch import nn
from torch.nn.utils import prune

import torch_sap

ROWS = [row for cases in CASES.values() for row in cases]


@pytest.mark.parametrize(("call", "error", "message"), ROWS, ids=[row[0] for row in ROWS])
def test_refused_by_name_and_nothing_is_changed(call, error, message, tmp_path):
    if call.startswith("SAPCallback") and SAPCallback is None:
        pytest.skip("needs the package lightning")
    if call.startswith("shrink(") and importlib.util.find_spec("torch_pruning") is None:
        pytest.skip("needs the package torch_pruning")
    world = make_world(tmp_path)
    before = state_of(world, tmp_path)
    with pytest.raises(Exception) as caught:  # noqa: PT011  # its type and text are compared below
        eval(call, world)
    text = str(caught.value).replace(str(tmp_path), "FOLDER")
    found = " ".join(text.split()).removeprefix("addmm: ")  # one of PyTorch's own differs from version to version
    assert (type(caught.value).__name__, found) == (error, message)
    after = state_of(world, tmp_path)
    for name, value in before.items():
        assert repr(after[name]) == repr(value), name
    assert after.keys() == before.keys()


def test_the_table_of_the_page_has_these_rows():
    assert len(ROWS) >= 40
    assert TABLE.read_text(encoding="utf-8") == write_table()


def test_every_public_name_that_takes_arguments_has_a_row():
    used = {node.id for call, *_ in ROWS for node in ast.walk(ast.parse(call)) if isinstance(node, ast.Name)}
    results = {"PruningReport", "Round", "Verification", "VerifiedWeight", "Summary", "LayerSummary", "Shrunk"}
    assert set(torch_sap.__all__) - results <= used


NUMBERS = [
    ({"p": 2.0, "q": 1.0}, ValueError),
    ({"p": 1.0}, ValueError),
    ({"p": 0.0}, ValueError),
    ({"p": math.nan}, ValueError),
    ({"q": math.inf}, ValueError),
    ({"p": "0.5"}, TypeError),
    ({"eta_r": -0.1}, ValueError),
    ({"eta_r": None}, TypeError),
    ({"gamma": -1.0}, ValueError),
    ({"gamma": math.nan}, ValueError),
    ({"beta": -0.1}, ValueError),
    ({"beta": 1.1}, ValueError),
    ({"beta": [0.5]}, TypeError),
]
CALLS = {
    **FUNCTIONS,
    "prune_count": lambda model, **numbers: torch_sap.prune_count(0.5, 10, **numbers),
    "SAP": torch_sap.SAP,
    "iterative_sap": lambda model, **numbers: torch_sap.iterative_sap(model, pytest.fail, iterations=1, **numbers),
    "methods": lambda model, **numbers: torch_sap.PQILayer.apply(model[3], "weight", **numbers),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_call_checks_the_numbers(name):
    model = mlp()
    torch_sap.layer_unstructured(model, eta_r=0.1)
    before = snapshot(model)
    for numbers, error in NUMBERS:
        argument, value = next(iter(numbers.items()))
        with pytest.raises(error, match=f"^{argument} .*{re.escape(str(value))}"):
            CALLS[name](model, **numbers)
        assert_unchanged(model, before)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("scope", SCOPES)
def test_all_or_nothing(scope, value):
    """A refusal in the last tensor leaves the first one unchanged, under a foreign mask too."""
    model = mlp()
    sap = torch_sap.SAP(model, scope=scope)
    prune.l1_unstructured(model[0], "weight", 0.5)
    with torch.no_grad():
        model[3].weight[-1, -1] = value
    before = snapshot(model)
    for call in (FUNCTIONS[scope], lambda model: sap.step(), torch_sap.SAP):
        with pytest.raises(ValueError, match=r"3\.weight of shape \(4, 9\) has (NaN|infinite) entries"):
            call(model)
        assert_unchanged(model, before)
    assert len(sap.history) == 0


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8])
@pytest.mark.parametrize("scope", SCOPES)
def test_weights_without_real_magnitudes(scope, dtype):
    model = nn.Sequential(nn.Linear(4, 3), nn.Module())
    model[1].weight = nn.Parameter(torch.ones(3, 4).to(dtype), requires_grad=dtype.is_complex)
    before = snapshot(model)
    with pytest.raises(TypeError, match=f"1.weight must be a real floating-point tensor .* got {dtype}"):
        FUNCTIONS[scope](model)
    assert_unchanged(model, before)
