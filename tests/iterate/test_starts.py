"""Every round starts at the learning rates, the momentum and the optimizer's state of the first one."""

import copy
import math

import pytest
import torch
from helpers import assert_held, fit, mlp, snapshot
from iterating import ARGUMENTS, saved
from torch import nn
from torch.optim import lr_scheduler

from torch_sap import SAP, LotteryTicket, OneShot, iterative_sap, layer_unstructured

SHAPE = (6, 6)
STEPS = 6


def one_after_the_other(optimizer):
    """A SequentialLR. That of PyTorch 2.5 makes ``lr`` and ``initial_lr`` one tensor, and then moves both."""
    parts = [
        lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2),
        lr_scheduler.CosineAnnealingLR(optimizer, T_max=4),
    ]
    scheduler = lr_scheduler.SequentialLR(optimizer, parts, milestones=[2])
    for group in optimizer.param_groups:
        group["lr"] = copy.deepcopy(group["lr"])
    return scheduler


SCHEDULERS = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=STEPS),
    "step": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    "milestones": lambda o: lr_scheduler.MultiStepLR(o, milestones=[2, 4], gamma=0.1),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.7),
    "one cycle with momentum": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=STEPS + 1),
    "cyclic with momentum": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=4),
    "warm-up": lambda o: lr_scheduler.LambdaLR(o, lambda step: min(step / 3, 1.0)),
    "warm-up, then cosine": lambda o: lr_scheduler.LambdaLR(  # transformers' get_cosine_schedule_with_warmup
        o, lambda step: step / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / STEPS))
    ),
    "one after the other": one_after_the_other,
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
}


def two_groups(model):
    biases = [p for p in model.parameters() if p.dim() < 2]
    weights = [p for p in model.parameters() if p.dim() >= 2]
    return [{"params": weights, "lr": 0.1}, {"params": biases, "lr": 0.03, "momentum": 0.5}]


OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "two groups": lambda model: torch.optim.SGD(two_groups(model), lr=0.1, momentum=0.9),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.05),
    "tensor": lambda model: torch.optim.Adam(model.parameters(), lr=torch.tensor(0.05), foreach=False),
}


def train(model, optimizer, scheduler, seed=0):
    """Train a round, and return the hyperparameters of each of its steps."""
    seen = []
    for step in range(STEPS):
        seen.append(
            [(float(group["lr"]), group.get("momentum"), group.get("betas")) for group in optimizer.param_groups]
        )
        fit(model, optimizer, SHAPE, steps=1, seed=seed + step)
        scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
    return seen


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("make_scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("how", ["anew", "given", "attached", "both attached"])
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")  # SequentialLR's own call
def test_rounds_have_the_same_rates(make_optimizer, make_scheduler, how):
    model = mlp()
    optimizer = make_optimizer(model)
    if how == "given":
        scheduler = make_scheduler(optimizer)
        sap = SAP(model, optimizer=optimizer, scheduler=scheduler, **ARGUMENTS)
    elif how == "both attached":
        sap, scheduler = SAP(model, **ARGUMENTS), make_scheduler(optimizer)
        sap.attach(optimizer=optimizer, scheduler=scheduler)
    else:
        sap, scheduler = SAP(model, optimizer=optimizer, **ARGUMENTS), make_scheduler(optimizer)
        if how == "attached":
            sap.attach(scheduler=scheduler)
    rounds = []
    for number in range(3):
        if how == "anew" and number:
            scheduler = make_scheduler(optimizer)
        rounds.append(train(model, optimizer, scheduler))
        sap.step()
        assert not optimizer.state
    assert rounds[0] == rounds[1] == rounds[2]
    assert len({rate for step in rounds[0] for rate, *_ in step}) > 1


def test_schedulers_of_timm():
    timm = pytest.importorskip("timm.scheduler")
    model = mlp()
    optimizer = torch.optim.SGD(two_groups(model), lr=0.1, momentum=0.9)
    sap, rounds = SAP(model, optimizer=optimizer, **ARGUMENTS), []
    for _ in range(3):
        settings = dict(warmup_epochs=2, warmup_lr=0.001, min_lr=0.01, decay_epochs=2)
        scheduler, _ = timm.create_scheduler_v2(optimizer, sched="cosine", num_epochs=STEPS, **settings)
        rates = []
        for epoch in range(STEPS):
            rates.append([group["lr"] for group in optimizer.param_groups])
            scheduler.step(epoch + 1)
        rounds.append(rates)
        sap.step()
    assert rounds[0] == rounds[1] == rounds[2]
    assert rounds[0][0] == [0.001, 0.001]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.03]


def test_several_schedulers():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedulers = [SCHEDULERS["warm-up"](optimizer), SCHEDULERS["plateau"](optimizer)]
    sap = SAP(model, optimizer=optimizer, scheduler=schedulers, **ARGUMENTS)
    for _ in range(2):
        fit(model, optimizer, SHAPE)
        for loss in (1.0, 2.0, 3.0):
            schedulers[0].step()
            schedulers[1].step(loss)
        sap.step()
        assert [each.last_epoch for each in schedulers] == [0, 0]
        assert schedulers[1].best == float("inf")
        assert optimizer.param_groups[0]["lr"] == 0.0


def test_nothing_is_set_back_without_rewinding():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = SCHEDULERS["exponential"](optimizer)
    sap = SAP(model, rewind="none", optimizer=optimizer, scheduler=scheduler, **ARGUMENTS)
    first = train(model, optimizer, scheduler)
    sap.step()
    second = train(model, optimizer, scheduler)
    assert second[0][0][0] == pytest.approx(first[-1][0][0] * 0.7)
    assert optimizer.state


def test_a_rate_that_is_a_tensor_is_the_same_tensor_and_no_part_of_the_start():
    model, rate = mlp(), torch.tensor(0.05)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, foreach=False)
    sap = SAP(model, optimizer=optimizer, **ARGUMENTS)
    for _ in range(3):
        rate.fill_(0.001)
        fit(model, optimizer, SHAPE)
        sap.step()
        assert optimizer.param_groups[0]["lr"] is rate
        assert float(rate) == pytest.approx(0.05)


def test_what_others_add_to_an_optimizer_stays():
    """Lightning's StochasticWeightAveraging adds keys, BackboneFinetuning adds groups."""
    model, backbone = mlp(), nn.Linear(6, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sap = SAP(model, optimizer=optimizer, **ARGUMENTS)
    optimizer.add_param_group({"params": list(backbone.parameters()), "lr": 0.007})
    for group in optimizer.param_groups:
        group["swa_lr"] = 0.5
    for _ in range(2):
        fit(nn.Sequential(backbone, model), optimizer, SHAPE)
        assert len(optimizer.state) == len(list(model.parameters())) + 2
        optimizer.param_groups[0]["lr"] = 0.0
        sap.step()
        assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.007]
        assert all(group["swa_lr"] == 0.5 for group in optimizer.param_groups)
        assert not optimizer.state
        assert optimizer.param_groups[1]["params"][0] is backbone.weight


def test_states_go_to_their_parameters_when_a_group_has_grown():
    model, more = mlp(), nn.Linear(6, 6)
    groups = two_groups(model)
    optimizer = torch.optim.Adagrad(groups, lr=0.05, initial_accumulator_value=0.25)
    sap = SAP(model, optimizer=optimizer, **ARGUMENTS)
    optimizer.param_groups[0]["params"].extend(more.parameters())
    for parameter in more.parameters():
        optimizer.state[parameter] = {"sum": torch.ones_like(parameter), "step": torch.tensor(0.0)}
    fit(nn.Sequential(more, model), optimizer, SHAPE)
    sap.step()
    assert all(optimizer.state[p]["sum"].shape == p.shape for p in model.parameters())
    assert all((optimizer.state[p]["sum"] == 0.25).all() for p in model.parameters())
    assert not any(p in optimizer.state for p in more.parameters())


@pytest.mark.parametrize("order", ["load, attach", "attach, load", "load, given before"])
@pytest.mark.parametrize("make_scheduler", [SCHEDULERS["one cycle with momentum"], SCHEDULERS["milestones"]])
def test_the_start_outlives_a_resume(order, make_scheduler):
    def make():
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, optimizer, make_scheduler(optimizer)

    model, optimizer, scheduler = make()
    sap = SAP(model, optimizer=optimizer, scheduler=scheduler, **ARGUMENTS)
    whole = [train(model, optimizer, scheduler)]
    states = [saved(each.state_dict()) for each in (model, optimizer)]
    of_scheduler, of_sap = scheduler.state_dict(), copy.deepcopy(sap.state_dict())
    sap.step()
    whole.append(train(model, optimizer, scheduler))

    again, its_optimizer, its_scheduler = make()
    its_optimizer.param_groups[0]["lr"] = 0.77
    given = order == "load, given before"
    settings = dict(optimizer=its_optimizer, scheduler=its_scheduler) if given else {}
    resumed = SAP(again, **settings, **ARGUMENTS)
    again.load_state_dict(states[0])
    its_optimizer.load_state_dict(states[1])
    its_scheduler.load_state_dict(of_scheduler)
    if order == "attach, load":
        resumed.attach(optimizer=its_optimizer, scheduler=its_scheduler)
    resumed.load_state_dict(of_sap)
    if order == "load, attach":
        resumed.attach(optimizer=its_optimizer)
        resumed.attach(scheduler=its_scheduler)
    resumed.step()
    assert train(again, its_optimizer, its_scheduler) == whole[1] == whole[0]
    for one, other in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_a_new_optimizer_comes_without_the_schedulers_of_the_old_one():
    model = mlp()
    first, second = (torch.optim.SGD(model.parameters(), lr=rate) for rate in (0.1, 0.2))
    sap = SAP(model, optimizer=first, scheduler=SCHEDULERS["step"](first), **ARGUMENTS)
    sap.attach(optimizer=second)
    assert sap.starts.schedulers == sap.state_dict()["scheduler_starts"] == []
    scheduler = SCHEDULERS["step"](second)
    train(model, second, scheduler)
    sap.step()
    assert second.param_groups[0]["lr"] == 0.2
    assert scheduler.last_epoch == STEPS


def test_iterative_sap_takes_both_as_settings():
    model, rates = mlp(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = SCHEDULERS["one cycle with momentum"](optimizer)
    settings = dict(optimizer=optimizer, scheduler=scheduler, **ARGUMENTS)
    iterative_sap(model, lambda model: rates.append(train(model, optimizer, scheduler)), iterations=2, **settings)
    assert rates[0] == rates[1] == rates[2]


def test_what_is_attached_after_the_loaded_start_was_used_begins_anew():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sap = SAP(model, optimizer=optimizer, **ARGUMENTS)
    state = copy.deepcopy(sap.state_dict())
    later = SAP(mlp(), **ARGUMENTS)
    later.load_state_dict(state)
    other = torch.optim.SGD(later.model.parameters(), lr=0.5)
    later.attach(optimizer=other)
    later.step()
    assert other.param_groups[0]["lr"] == 0.1  # the start of the state
    other.param_groups[0]["lr"] = 0.2
    later.attach(optimizer=other)
    other.param_groups[0]["lr"] = 0.3
    later.step()
    assert other.param_groups[0]["lr"] == 0.2


@pytest.mark.parametrize("pruner", [SAP, LotteryTicket, OneShot])
@pytest.mark.parametrize("moment", ["older model", "newer model", "no masks loaded", "start"])
def test_a_state_of_other_masks_is_refused(pruner, moment):
    model = mlp()
    sap = pruner(model)
    models, states = [copy.deepcopy(model.state_dict())], [copy.deepcopy(sap.state_dict())]
    for seed in range(3):
        fit(model, torch.optim.SGD(model.parameters(), lr=0.1), SHAPE, seed=seed)
        sap.step()
        models.append(copy.deepcopy(model.state_dict()))
        states.append(copy.deepcopy(sap.state_dict()))
    of_model, of_sap = {"older model": (1, 2), "newer model": (3, 2), "no masks loaded": (0, 3), "start": (2, 0)}[
        moment
    ]
    again = mlp()
    other = pruner(again)
    again.load_state_dict(models[of_model])
    before = snapshot(again)
    with pytest.raises(ValueError, match=r"0\.weight has \d+ entries left here, \d+ in the state: load the model's"):
        other.load_state_dict(states[of_sap])
    assert snapshot(again)["keys"] == before["keys"]
    assert len(other.history) == 0
    again.load_state_dict(models[of_sap])
    other.load_state_dict(states[of_sap])
    assert len(other.history) == of_sap


def test_a_second_stepper_continues_on_the_masks_of_the_first():
    model = mlp()
    first = SAP(model, scope="layer", **ARGUMENTS)
    fit(model, torch.optim.SGD(model.parameters(), lr=0.1), SHAPE)
    left = sum(tensor.remaining for tensor in first.step().tensors_after)
    second = SAP(model, scope="global", p=1.0, q=2.0)
    for pruner in (second, first, second, first):  # also in turn: each measures the masks as they are
        fit(model, torch.optim.SGD(model.parameters(), lr=0.1), SHAPE)
        found = pruner.step()
        assert sum(tensor.remaining for tensor in found.tensors) == left
        left = sum(tensor.remaining for tensor in found.tensors_after)
        assert_held(model)
    assert left < 50
    states = saved(model.state_dict()), saved(second.state_dict())  # though the first has pruned since its last round
    again = mlp()
    other = SAP(again, scope="global", p=1.0, q=2.0)
    again.load_state_dict(states[0])
    other.load_state_dict(states[1])
    assert other.step().remaining == second.step().remaining


def test_a_second_stepper_on_a_model_that_was_pruned_starts_from_it():
    model = mlp()
    layer_unstructured(model, eta_r=0.3)
    sap = SAP(model, **ARGUMENTS)
    states = saved(model.state_dict()), saved(sap.state_dict())
    again = mlp()
    other = SAP(again, **ARGUMENTS)
    with pytest.raises(ValueError, match="load the model's state first"):
        other.load_state_dict(states[1])
    again.load_state_dict(states[0])
    other.load_state_dict(states[1])
    assert other.step().remaining == sap.step().remaining


class Own:
    """A scheduler without an optimizer."""

    def __init__(self):
        self.number = 0

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        self.number = state["number"]


def test_wrong_ones_are_refused_and_nothing_changes():
    model, other = mlp(), mlp()
    optimizer, foreign = (torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, other))
    cosine = SCHEDULERS["cosine"]
    sap = SAP(model, **ARGUMENTS)
    with pytest.raises(ValueError, match="scheduler must come with its optimizer"):
        sap.attach(scheduler=cosine(optimizer))
    with pytest.raises(ValueError, match="optimizer must hold parameters of the model"):
        sap.attach(optimizer=foreign)
    with pytest.raises(ValueError, match="scheduler must belong to the optimizer, but this CosineAnnealingLR"):
        sap.attach(optimizer=optimizer, scheduler=[cosine(optimizer), cosine(foreign)])
    with pytest.raises(TypeError, match=r"scheduler must have state_dict and load_state_dict, .* got float"):
        sap.attach(optimizer=optimizer, scheduler=0.1)
    with pytest.raises(TypeError, match="got CosineAnnealingLR"):
        sap.attach(optimizer=optimizer, scheduler=lr_scheduler.CosineAnnealingLR)
    assert sap.starts.optimizer is None
    assert sap.starts.schedulers == []
    own = Own()
    sap.attach(optimizer=optimizer, scheduler=own)
    own.number = 4
    state = copy.deepcopy(sap.state_dict())
    sap.step()
    assert own.number == 0
    twice = SAP(other, optimizer=foreign, scheduler=[Own(), Own()], **ARGUMENTS)
    with pytest.raises(ValueError, match="as many schedulers as the state has, 1, got 2"):
        twice.load_state_dict(state)
    late = SAP(mlp(), **ARGUMENTS)
    late.load_state_dict(state)
    optimizer = torch.optim.SGD(late.model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="as many schedulers as the state has, 1, got 2"):
        late.attach(optimizer=optimizer, scheduler=[Own(), Own()])
    assert late.starts.optimizer is None
