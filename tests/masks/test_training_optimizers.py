"""timm's optimizers, parameter groups and schedulers on pruned timm models: bitwise as masked by hand."""

import pytest
import torch
from helpers import assert_held, masked_by_hand, masks_of
from timm_training import (
    Hand,
    assert_same_training,
    assert_same_values,
    batches,
    each_kind,
    make,
    optim,
    plain_step,
    scheduler,
    twins,
)

from torch_sap import SAP, layer_unstructured

NAMED = [
    "sgd",
    "momentum",
    "nesterov",
    "adamw",
    "nadamw",
    "lamb",
    "lars",
    "lion",
    "adafactor",
    "adafactorbv",
    "muon",
    "rmsproptf",
]
ELSEWHERE = ("bnb", "fused", "kron", "adahessian")  # other packages; a compiler; second derivatives
EVERY = [name for name in optim.list_optimizers() if not name.startswith(ELSEWHERE)]
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in EVERY if name not in NAMED]


@pytest.mark.parametrize("name", [*[name for name in NAMED if name in EVERY], *OTHERS])
@pytest.mark.parametrize("made", ["before", "after"])
@pytest.mark.parametrize("kind", ["efficientnet", "vit"])
def test_exact_zeros_and_the_values_of_a_model_masked_by_hand(kind, made, name):
    """Those that look at whole tensors (lamb, muon, adafactor) too: masked weights and gradients are all they see."""
    model, dense = twins(kind)
    if made == "after":
        layer_unstructured(model, eta_r=0.1)
        masked_by_hand(dense, masks_of(model))
    optimizers = {each: optim.create_optimizer_v2(each, name, lr=1e-2, weight_decay=0.05) for each in (model, dense)}
    if made == "before":  # momentum of entries that are pruned later
        for each, optimizer in optimizers.items():
            for inputs in batches(2, seed=9):
                plain_step(each, optimizer, inputs, Hand(each))
    assert_same_training(model, dense, optimizer=optimizers.get)


def groups_of(optimizer, model):
    """The groups of an optimizer by the places of their parameters in the model, with all options."""
    places = {parameter: place for place, parameter in enumerate(model.parameters())}
    return [
        {key: [places[p] for p in value] if key == "params" else value for key, value in group.items()}
        for group in optimizer.param_groups
    ]


@each_kind
@pytest.mark.parametrize("options", [{"layer_decay": 0.75}, {}], ids=["layer decay", "weight decay"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_parameter_groups_are_those_of_a_dense_model(kind, options, name):
    if name not in EVERY:
        pytest.skip("needs the package timm in a version that has muon")
    model, dense = twins(kind)
    layer_unstructured(model)
    found, expected = (
        groups_of(optim.create_optimizer_v2(each, name, lr=1e-3, weight_decay=0.05, **options), each)
        for each in (model, dense)
    )
    assert found == expected
    assert len(found) > (2 if options else 1)


@pytest.mark.parametrize("made", ["before", "after"])
@each_kind
def test_layer_decay(kind, made):
    """The rates of layers are the scheduler's work; it is stepped with each batch."""

    def optimizer_and_schedule(model):
        optimizer = optim.create_optimizer_v2(model, "adamw", lr=1e-2, weight_decay=0.05, layer_decay=0.75)
        schedules[optimizer], _ = scheduler.create_scheduler_v2(optimizer, "cosine", num_epochs=6, min_lr=1e-4)
        schedules[optimizer].step(0)
        return optimizer

    def step(model, optimizer, inputs, hand):
        loss = plain_step(model, optimizer, inputs, hand)
        done[optimizer] = done.get(optimizer, 0) + 1
        schedules[optimizer].step(done[optimizer])
        return loss, [group["lr"] for group in optimizer.param_groups]

    schedules, done = {}, {}
    model, dense = twins(kind)
    if made == "after":
        layer_unstructured(model, eta_r=0.1)
        masked_by_hand(dense, masks_of(model))
    assert_same_training(model, dense, step, optimizer_and_schedule)
    assert len({group["lr"] for group in next(iter(done)).param_groups}) > 1


EPOCHS = 3


def epochs_of_a_round(model, optimizer, schedule, hand, first):
    """Losses and rates of a round whose first epoch has this number for the scheduler."""
    found = []
    for epoch in range(EPOCHS):
        rate = optimizer.param_groups[0]["lr"]
        found += [(plain_step(model, optimizer, inputs, hand), rate) for inputs in batches(2, seed=epoch)]
        schedule.step(first + epoch + 1)
    return found


@pytest.mark.parametrize("kind", ["efficientnet", "vit"])
@pytest.mark.parametrize("cycles", ["cosine", "tanh", "poly"])
def test_one_scheduler_through_all_rounds(kind, cycles):
    """A cycle a round, one optimizer: as with a fresh optimizer and scheduler for each round, made by hand."""

    def tools(model, limit):
        optimizer = optim.create_optimizer_v2(model, "adamw", lr=1e-2, weight_decay=0.05)
        options = {"num_epochs": EPOCHS, "cycle_limit": limit, "cycle_decay": 1.0, "min_lr": 1e-5}
        schedule, _ = scheduler.create_scheduler_v2(optimizer, cycles, **options)
        schedule.step(0)
        return optimizer, schedule

    model, _ = twins(kind)
    optimizer, schedule = tools(model, 3)
    sap = SAP(model, eta_r=0.2, optimizer=optimizer)
    for number in range(3):
        masks, dense = masks_of(model), make(kind)
        hand = Hand(masked_by_hand(dense, masks), masks)
        found = epochs_of_a_round(model, optimizer, schedule, Hand(model), number * EPOCHS)
        assert found == epochs_of_a_round(dense, *tools(dense, 1), hand, 0)
        rates = [rate for _, rate in found]
        assert rates == sorted(rates, reverse=True)
        assert rates[0] == pytest.approx(1e-2, rel=1e-4)
        assert rates[0] > rates[-1]
        assert_same_values(model, dense)
        sap.step()
        assert_held(model)
    assert torch.stack([mask.sum() for mask in masks_of(model).values()]).sum() < sap.history[-1].total / 2
