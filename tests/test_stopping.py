"""Rules that end an iterative pruning, on synthetic histories and in the loop."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import assert_held, fit, masks_of
from torch import nn

from torch_sap import SAP, History, LotteryTicket, iterative_sap
from torch_sap.stopping import Collapse, NothingLeft, StoppingRule, TargetDensity, WithinTolerance


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 20), nn.BatchNorm1d(20), nn.Linear(20, 5))


class Training:
    """Changes a model differently each round, and returns the next accuracy."""

    def __init__(self, accuracies):
        self.accuracies, self.states = iter(accuracies), []

    def __call__(self, model):
        torch.manual_seed(100 + len(self.states))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
            model[1].running_mean.add_(1 + len(self.states))
            for module in (model[0], model[2]):
                module.weight_orig.mul_(module.weight_mask)
        self.states.append(copy.deepcopy(model.state_dict()))
        return {"accuracy": next(self.accuracies)}


def same_state(model, state):
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[key], state[key]) for key in own)


@pytest.fixture(scope="module")
def template():
    return iterative_sap(make_model(), lambda model: 0.0, iterations=1)[0]


def synthetic(template, accuracies, densities=None, pqi=None, pruned=1):
    """A history with the accuracies, densities and PQ Indices given."""
    rounds = []
    for number, accuracy in enumerate(accuracies):
        share = 1.0 if densities is None else densities[number]
        tensors = tuple(replace(tensor, remaining=round(share * tensor.total)) for tensor in template.tensors)
        index = 0.5 - 0.01 * number if pqi is None else pqi[number]
        sparsity = replace(template.retrained, pqi={"global": {"global": np.array([index])}})
        groups = {name: replace(group, c=group.c * 0 + pruned) for name, group in template.groups.items()}
        change = {"tensors": tensors, "retrained": sparsity, "metrics": {"accuracy": accuracy}, "groups": groups}
        rounds.append(replace(template, number=number, **change))
    return History(rounds)


def ends_at(rule, history):
    """Number of the first round at which a rule ends, and the accepted rounds until then."""
    accepted = []
    for number in range(len(history)):
        seen = history[: number + 1]
        if rule.accepts(seen):
            accepted.append(number)
        if rule.ends(seen):
            return number, accepted
    return None, accepted


def test_target_density(template):
    history = synthetic(template, [0.9] * 4, densities=[1.0, 0.5, 0.2, 0.1])
    assert ends_at(TargetDensity(0.2), history) == (2, [0, 1, 2])
    assert ends_at(TargetDensity(0.05), history) == (None, [0, 1, 2, 3])
    assert ends_at(TargetDensity(1), history) == (0, [0])


def test_within_tolerance(template):
    history = synthetic(template, [0.90, 0.92, 0.89, 0.88, 0.895, 0.8, 0.8, 0.9])
    assert ends_at(WithinTolerance(0.01), history) == (3, [0, 1, 2])
    assert ends_at(WithinTolerance(0.01, patience=2), history) == (6, [0, 1, 2, 4])
    assert ends_at(WithinTolerance(0.01, patience=3), history) == (None, [0, 1, 2, 4, 7])
    assert ends_at(WithinTolerance(0.0), history) == (2, [0, 1])
    assert ends_at(WithinTolerance(0.5), history) == (None, list(range(8)))
    falling = synthetic(template, [1.0, 0.5, 1.1, 1.2])
    assert ends_at(WithinTolerance(0.1, metric="accuracy", mode="min"), falling) == (3, [0, 1, 2])


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_nan_and_infinity_are_outside_any_tolerance(template, value):
    assert ends_at(WithinTolerance(1e9), synthetic(template, [0.9, value])) == (1, [0])


def test_collapse(template):
    history = synthetic(template, [0.9, 0.9, 0.87, 0.80], pqi=[0.5, 0.4, 0.45, 0.3])
    assert ends_at(Collapse(), history) == (3, [0, 1, 2])
    assert ends_at(Collapse(significant=0.2), history) == (None, [0, 1, 2, 3])


def test_nothing_left(template):
    assert ends_at(NothingLeft(), synthetic(template, [0.9, 0.9])) == (None, [0, 1])
    assert ends_at(NothingLeft(), synthetic(template, [0.9], pruned=0)) == (0, [0])


def test_without_rules_all_rounds_and_the_last_model():
    model, training = make_model(), Training([0.9, 0.1, 0.5])
    history = iterative_sap(model, training, iterations=2)
    assert len(history) == 3
    assert history.returned is None
    assert same_state(model, training.states[2])


def test_the_sparsest_model_within_the_tolerance_comes_back():
    model, training = make_model(), Training([0.9, 0.91, 0.895, 0.7, 0.9])
    history = iterative_sap(model, training, iterations=4, stop=WithinTolerance(0.01), scope="global")
    assert len(history) == 4
    assert history.returned == 2
    assert same_state(model, training.states[2])  # weights, biases, masks, batch-norm statistics
    remaining = sum(int(mask.sum()) for name, mask in model.named_buffers() if name.endswith("_mask"))
    assert remaining == history[2].remaining > history[3].remaining


def test_a_run_that_is_not_ended_gives_back_the_last_accepted_round():
    model, training = make_model(), Training([0.9, 0.9, 0.5, 0.5])
    history = iterative_sap(model, training, iterations=3, stop=WithinTolerance(0.01, patience=9))
    assert (len(history), history.returned) == (4, 1)
    assert same_state(model, training.states[1])


def test_the_target_is_the_last_round_and_prunes_no_more():
    model, training = make_model(), Training([0.9] * 20)
    history = iterative_sap(model, training, iterations=19, stop=TargetDensity(0.3))
    assert history[-1].density <= 0.3 < history[-2].density
    assert history.returned == history[-1].number
    assert history[-1].pruned_count == 0
    assert same_state(model, training.states[-1])


def test_no_training_is_wasted_when_nothing_is_left():
    training = Training([0.9] * 5)
    sap = LotteryTicket(make_model(), ratio=0.0)
    assert len(iterative_sap(sap, training, iterations=4, stop=NothingLeft())) == 1
    assert len(training.states) == 1


def test_several_rules():
    model, training = make_model(), Training([0.9, 0.9, 0.8, 0.8, 0.8])
    rules = [WithinTolerance(0.01, patience=9), TargetDensity(0.65)]
    history = iterative_sap(model, training, iterations=4, stop=rules)
    assert history[-1].density <= 0.65 < history[-2].density
    assert history.returned == 1 < len(history) - 1
    assert same_state(model, training.states[1])


class Never(StoppingRule):
    def accepts(self, rounds):
        return False


def test_a_custom_rule_that_accepts_nothing_leaves_the_last_model():
    model, training = make_model(), Training([0.9, 0.8])
    history = iterative_sap(model, training, iterations=1, stop=Never())
    assert history.returned is None
    assert same_state(model, training.states[1])


class Recording:
    """A training that changes nothing and returns the next metrics."""

    def __init__(self, *metrics):
        self.metrics, self.calls = metrics, 0

    def __call__(self, model):
        self.calls += 1
        return self.metrics[self.calls - 1]


@pytest.mark.parametrize("rule", [WithinTolerance(0.01), Collapse()], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("metrics", [{"test_Loss": 0.5}, {"top1": 0.9, "top5": 1.0}])
def test_the_metric_to_judge_by_is_not_guessed(rule, metrics):
    model, training = make_model(), Recording(metrics)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="metric must be named where it is not clear by what to judge") as caught:
        iterative_sap(model, training, stop=[TargetDensity(0.0), rule])
    assert f"round 0 has {list(metrics)}; pass metric=" in str(caught.value)
    assert 'mode="min"' in str(caught.value)
    assert training.calls == 1
    assert same_state(model, before)


def test_a_run_with_rounds_is_judged_before_the_next_training():
    sap = SAP(make_model())
    sap.step({"top1": 0.9, "top5": 1.0})
    with pytest.raises(ValueError, match="metric must be named"):
        iterative_sap(sap, pytest.fail, stop=WithinTolerance(0.01))
    with pytest.raises(ValueError, match="metric 'f1' must be recorded in every round"):
        iterative_sap(sap, pytest.fail, stop=Collapse(metric="f1"))
    assert len(sap.history) == 1


def test_rules_are_shown_as_they_are_made():
    rules = [WithinTolerance(0.01, metric="f1"), TargetDensity(0.2), NothingLeft(), Never()]
    assert repr(rules[0]) == "WithinTolerance(tolerance=0.01, metric='f1', mode='max', patience=1)"
    assert list(map(repr, rules[1:])) == ["TargetDensity(density=0.2)", "NothingLeft()", "Never()"]
    assert vars(eval(repr(Collapse(noise=0.01)))) == vars(Collapse(noise=0.01))


def test_accuracy_is_the_default_for_max_only():
    both = [{"loss": 0.5, "accuracy": 0.9}, {"loss": 0.1, "accuracy": 0.8}, {}]
    history = iterative_sap(make_model(), Recording(*both), iterations=2, stop=WithinTolerance(0.01))
    assert (len(history), history.returned) == (2, 0)
    with pytest.raises(ValueError, match="metric must be named"):
        iterative_sap(make_model(), Recording(*both), stop=WithinTolerance(0.01, mode="min"))


def test_a_resumed_run_still_gives_the_kept_model_back():
    accuracies = [0.9, 0.91, 0.7, 0.7]
    rule = WithinTolerance(0.01, patience=2)
    model, training = make_model(), Training(accuracies)
    sap = SAP(model)

    def interrupt(found):
        if found.number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        iterative_sap(sap, training, iterations=5, stop=rule, callback=interrupt)
    saved = copy.deepcopy((model.state_dict(), sap.state_dict()))

    other, rest = make_model(1), Training(accuracies[3:])
    rest.states.extend(training.states)
    resumed = SAP(other)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    iterative_sap(resumed, rest, iterations=5, stop=rule)
    assert resumed.history.returned == 1
    assert same_state(other, training.states[1])


def test_the_returned_model_can_be_trained_further():
    model, training = make_model(), Training([0.9, 0.9, 0.5])
    iterative_sap(model, training, iterations=5, stop=WithinTolerance(0.01))
    masks = masks_of(model)
    fit(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), (8, 20))
    assert all(torch.equal(mask, training.states[1][name + "_mask"]) for name, mask in masks.items())
    assert_held(model)
