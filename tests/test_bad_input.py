"""Bad input is refused by name, rule and value, and the model stays bitwise as it was (issue 2, Bad input)."""

import copy
import math

import pytest
import torch
from helpers import FUNCTIONS, SCOPES, arrays, assert_held, assert_unchanged, masks_of, mlp, snapshot
from torch import nn
from torch.nn.utils import prune

import torch_sap
from torch_sap import SAP, iterative_sap

REFUSALS = (ValueError, TypeError)

NUMBERS = [
    ({"p": 2.0, "q": 1.0}, ValueError, ["p must be smaller than q", "p=2.0", "q=1.0"]),
    ({"p": 1.0}, ValueError, ["p must be smaller than q", "p=1.0", "q=1.0"]),
    ({"p": 0.0}, ValueError, ["p ", "0"]),
    ({"p": -0.5}, ValueError, ["p ", "-0.5"]),
    ({"p": math.nan}, ValueError, ["p", "nan"]),
    ({"q": math.inf}, ValueError, ["q", "inf"]),
    ({"p": "0.5"}, TypeError, ["p", "0.5"]),
    ({"eta_r": -0.1}, ValueError, ["eta_r", "-0.1"]),
    ({"eta_r": math.nan}, ValueError, ["eta_r", "nan"]),
    ({"eta_r": None}, TypeError, ["eta_r", "None"]),
    ({"gamma": -1.0}, ValueError, ["gamma", "-1.0"]),
    ({"gamma": math.nan}, ValueError, ["gamma", "nan"]),
    ({"beta": -0.1}, ValueError, ["beta", "-0.1"]),
    ({"beta": 1.1}, ValueError, ["beta", "1.1"]),
    ({"beta": math.nan}, ValueError, ["beta", "nan"]),
    ({"beta": [0.5]}, TypeError, ["beta", "0.5"]),
    ({"exclude": "no_such_layer"}, ValueError, ["exclude", "no_such_layer"]),
    ({"exclude": ["0", "*.weigth"]}, ValueError, ["exclude", "*.weigth"]),
    ({"exclude": "*"}, ValueError, ["exclude"]),
    ({"exclude": 3}, TypeError, ["exclude", "3"]),
]
SAP_ONLY = [
    ({"scope": "layers"}, ValueError, ["scope", "layers", "global", "layer", "neuron"]),
    ({"scope": None}, REFUSALS, ["scope", "None"]),
    ({"rewind": "start"}, ValueError, ["rewind", "start", "init", "none"]),
    ({"rewind": 3}, TypeError, ["rewind", "3"]),
    ({"rewind": {"0.weight": torch.zeros(9, 6)}}, ValueError, ["rewind"]),
    ({"optimizer": "sgd"}, TypeError, ["optimizer"]),
]


def pruned_mlp():
    model = mlp()
    torch_sap.layer_unstructured(model, eta_r=0.1)
    return model


def no_training(model):
    raise AssertionError("refused before the first training")


def stepper(model, **arguments):
    return SAP(model, **arguments)


def loop(model, **arguments):
    return iterative_sap(model, no_training, iterations=1, **arguments)


CALLS = {**FUNCTIONS, "SAP": stepper, "iterative_sap": loop}
MODELS = {"dense": mlp, "pruned": pruned_mlp}


def assert_refused(call, model, error, texts):
    before = snapshot(model)
    with pytest.raises(error) as caught:
        call(model)
    for text in texts:
        assert text in str(caught.value), str(caught.value)
    assert_unchanged(model, before)


@pytest.mark.parametrize("state", MODELS)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("arguments", "error", "texts"), NUMBERS)
def test_arguments(name, state, arguments, error, texts):
    assert_refused(lambda model: CALLS[name](model, **arguments), MODELS[state](), error, texts)


@pytest.mark.parametrize("state", MODELS)
@pytest.mark.parametrize("name", ["SAP", "iterative_sap"])
@pytest.mark.parametrize(("arguments", "error", "texts"), SAP_ONLY)
def test_arguments_of_sap(name, state, arguments, error, texts):
    assert_refused(lambda model: CALLS[name](model, **arguments), MODELS[state](), error, texts)


@pytest.mark.parametrize(
    ("arguments", "error", "texts"),
    [
        ({"iterations": -1}, ValueError, ["iterations", "-1"]),
        ({"iterations": 1.5}, TypeError, ["iterations", "1.5"]),
        ({"train_fn": None}, TypeError, ["train_fn", "None"]),
        ({"eval_fn": "accuracy"}, TypeError, ["eval_fn", "accuracy"]),
        ({"callback": 3}, TypeError, ["callback", "3"]),
    ],
)
def test_arguments_of_iterative_sap(arguments, error, texts):
    arguments = {"train_fn": no_training, **arguments}
    assert_refused(lambda model: iterative_sap(model, **arguments), mlp(), error, texts)


@pytest.mark.parametrize("method", [torch_sap.PQIGlobal, torch_sap.PQILayer, torch_sap.PQINeuron])
@pytest.mark.parametrize(("arguments", "error", "texts"), [row for row in NUMBERS if "exclude" not in row[0]])
def test_arguments_of_the_classes(method, arguments, error, texts):
    with pytest.raises(error) as caught:
        method(**arguments)
    for text in texts:
        assert text in str(caught.value)


@pytest.mark.parametrize("ratio", [-0.1, 1.5, math.nan])
@pytest.mark.parametrize("baseline", [torch_sap.LotteryTicket, torch_sap.OneShot])
def test_ratio_of_the_baselines(baseline, ratio):
    assert_refused(lambda model: baseline(model, ratio=ratio), mlp(), ValueError, ["ratio", str(ratio)])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("state", MODELS)
@pytest.mark.parametrize("name", SCOPES)
def test_weights_that_are_not_finite(name, state, value):
    model = MODELS[state]()
    place = masks_of(model)["3.weight"].nonzero()[-1].tolist()
    with torch.no_grad():
        model[3].weight[place[0], place[1]] = value
    assert_refused(FUNCTIONS[name], model, ValueError, ["3.weight"])


@pytest.mark.parametrize("scope", SCOPES)
def test_weights_that_are_not_finite_in_a_step_of_sap(scope):
    model = mlp()
    sap = SAP(model, scope=scope)
    with torch.no_grad():
        model[3].weight[-1, -1] = math.nan
    assert_refused(lambda _: sap.step(), model, ValueError, ["3.weight"])
    assert len(sap.history) == 0


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.int8])
@pytest.mark.parametrize("name", SCOPES)
def test_weights_without_real_magnitudes(name, dtype):
    model = nn.Sequential(nn.Linear(4, 3), nn.Module())
    model[1].weight = nn.Parameter(torch.ones(3, 4).to(dtype), requires_grad=dtype.is_complex)
    assert_refused(FUNCTIONS[name], model, TypeError, ["1.weight", str(dtype).removeprefix("torch.")])


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("make", [nn.Sequential, lambda: nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())])
def test_a_model_with_nothing_to_prune(name, make):
    assert_refused(CALLS[name], make(), ValueError, ["prune"])


@pytest.mark.parametrize("name", SCOPES)
@pytest.mark.parametrize("thing", [3, None, "model", torch.ones(3, 3), [3], ["weight"], [("fc", "weight")], []])
def test_things_that_are_not_a_model(name, thing):
    with pytest.raises(REFUSALS):
        FUNCTIONS[name](thing)


@pytest.mark.parametrize("name", SCOPES)
@pytest.mark.parametrize("own", ["wieght", "weight_orig", 3, "forward"])
def test_pairs_without_such_a_parameter(name, own):
    model = mlp()
    pairs = [(model[0], "weight"), (model[3], own)]
    assert_refused(lambda _: FUNCTIONS[name](pairs), model, REFUSALS, [str(own)])


@pytest.mark.parametrize("name", SCOPES)
@pytest.mark.parametrize("state", MODELS)
@pytest.mark.parametrize(
    ("scores", "error"),
    [
        (lambda model: torch.ones(9, 6), (TypeError,)),
        (lambda model: {(model[3], "weight"): torch.ones(6, 9)}, (ValueError, AssertionError)),
        (lambda model: {(model[3], "weight"): torch.full((4, 9), math.nan)}, (ValueError,)),
        (lambda model: {(model[3], "weight"): torch.ones(4, 9, dtype=torch.complex64)}, (TypeError,)),
    ],
)
def test_importance_scores(name, state, scores, error):
    model = MODELS[state]()
    assert_refused(
        lambda _: FUNCTIONS[name](model, importance_scores=scores(model)), model, error, ["importance_scores"]
    )


@pytest.mark.parametrize("name", SCOPES)
def test_a_model_pruned_by_a_foreign_method_works(name):
    model = mlp()
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.random_unstructured(model[3], "weight", 0.5)
    before, (_, masks) = masks_of(model), arrays(model)
    report = FUNCTIONS[name](model, eta_r=0.3)
    assert sum(int(group.d.sum()) for group in report.groups.values()) == sum(
        int(mask.sum()) for mask in masks.values()
    )
    for path, mask in masks_of(model).items():
        assert not (mask & ~before[path]).any()
    assert_held(model)


@pytest.mark.parametrize("name", SCOPES)
def test_all_or_nothing(name):
    """A refusal in the last tensor leaves the first as it was, under a foreign mask too."""
    model = mlp()
    with torch.no_grad():
        prune.l1_unstructured(model[0], "weight", 0.5)
        model[3].weight[0, 0] = math.nan
    assert_refused(FUNCTIONS[name], model, ValueError, ["3.weight"])


def test_a_refused_call_does_not_change_training():
    model, inputs = pruned_mlp(), torch.randn(5, 6)
    twin = copy.deepcopy(model)
    with pytest.raises(ValueError, match="beta"):
        torch_sap.layer_unstructured(model, beta=2.0)
    for each in (model, twin):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            each(inputs).square().mean().backward()
            optimizer.step()
    assert_held(model)
    for (key, value), other in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(value, other), key
