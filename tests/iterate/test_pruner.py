"""A round: what is measured, pruned, rewound and recorded; SAP, Lottery Ticket and One Shot."""

import copy
import dataclasses
import inspect

import numpy as np
import pytest
import reference
import torch
from helpers import (
    SCOPES,
    arrays,
    assert_held,
    convnet,
    fit,
    mask_of,
    masks_of,
    mlp,
)
from iterating import ARGUMENTS, assert_rewound, assert_same_record, saved, state_without_masks, trainer
from torch import nn

import torch_sap
from torch_sap import SAP, LotteryTicket, OneShot, iterative_sap
from torch_sap.iterate.pruner import Pruner, SAPSettings, Settings

SHAPE = (6, 6)
each_scope = pytest.mark.parametrize("scope", SCOPES)


@each_scope
def test_counts_and_masks_of_each_round_are_the_reference(scope):
    model = convnet()
    sap, train = SAP(model, scope=scope, **ARGUMENTS), trainer((6, 2, 6, 6))
    for number in range(4):
        train(model)
        weights, masks = arrays(model)
        expected, records = reference.prune(weights, masks, scope, **ARGUMENTS)
        record = sap.step()
        assert (record.number, record.scope, record.hyperparameters) == (number, scope, ARGUMENTS)
        assert list(record.groups) == list(records)
        for name, group in record.groups.items():
            assert group.c.tolist() == [wanted.c for wanted in records[name]]
            assert group.d.tolist() == [wanted.d for wanted in records[name]]
            np.testing.assert_allclose(group.index, [wanted.index for wanted in records[name]], rtol=0, atol=1e-12)
        for name, mask in masks_of(model).items():
            np.testing.assert_array_equal(mask.numpy(), expected[name])
        for tensors, kept in ((record.tensors, masks), (record.tensors_after, expected)):
            assert {tensor.name: tensor.remaining for tensor in tensors} == {name: kept[name].sum() for name in kept}
        assert record.pruned_count == sum(int(group.c.sum()) for group in record.groups.values()) > 0
        assert record.remaining == sum(int(mask.sum()) for mask in masks.values())
        assert record.density == pytest.approx(record.remaining / record.total)


@each_scope
def test_a_round_measures_the_retrained_and_the_pruned_model_at_all_scopes(scope):
    model = convnet()
    sap, train = SAP(model, scope=scope, gini=True, **ARGUMENTS), trainer((6, 2, 6, 6))
    train(model)
    weights, masks = arrays(model)
    expected, _ = reference.prune(weights, masks, scope, **ARGUMENTS)
    record = sap.step()
    for measured, kept in ((record.retrained, masks), (record.pruned, expected)):
        assert_measures(measured.pqi, weights, kept, lambda values: reference.pq_index(values, 0.5, 1.0))
        assert_measures(measured.gini, weights, kept, reference.gini_index)
    assert record.pqi == pytest.approx(record.retrained.pqi["global"]["global"][0])
    assert SAP(convnet()).record().retrained.gini is None


def assert_measures(measures, weights, masks, plain):
    alive = {name: weight[masks[name]] for name, weight in weights.items()}
    assert measures["global"]["global"].tolist() == pytest.approx(
        [plain(np.concatenate(list(alive.values())))], abs=1e-12
    )
    assert list(measures["layer"]) == list(measures["neuron"]) == list(weights)
    for name, weight in weights.items():
        assert measures["layer"][name].tolist() == pytest.approx([plain(alive[name])], abs=1e-12)
        rows = [plain(row[mask]) for row, mask in zip(weight, masks[name], strict=True)]
        np.testing.assert_allclose(measures["neuron"][name], rows, rtol=0, atol=1e-12)


def test_rewinding_is_by_copy_and_the_kept_state_does_not_drift():
    model, start = mlp(), state_without_masks(mlp())
    sap, train = SAP(model, **ARGUMENTS), trainer(SHAPE)
    for _ in range(4):
        train(model)
        assert not torch.equal(model[1].running_mean, start["1.running_mean"])
        sap.step()
        assert_rewound(model, start, masks_of(model))
        assert int(model[1].num_batches_tracked) == 0


def test_rewind_none_goes_on_from_the_trained_weights():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sap = SAP(model, rewind="none", optimizer=optimizer, **ARGUMENTS)
    for seed in range(3):
        fit(model, optimizer, (6, 6), seed=seed)
        trained, momentum = state_without_masks(model), len(optimizer.state)
        sap.step()
        assert_rewound(model, trained, masks_of(model))
        assert len(optimizer.state) == momentum > 0
    assert_held(model)


@pytest.mark.parametrize("live", [False, True], ids=["copied", "live tensors"])
def test_rewinding_to_a_state_dict(live):
    model = mlp()
    train = trainer(SHAPE)
    train(model)
    state = model.state_dict() if live else copy.deepcopy(model.state_dict())
    start = copy.deepcopy(state)
    sap = SAP(model, rewind=state, **ARGUMENTS)
    for _ in range(3):
        train(model)
        sap.step()
        assert_rewound(model, start, masks_of(model))
    assert live or all(torch.equal(value, start[key]) for key, value in state.items())


def test_late_rewinding_inside_training():
    model = mlp()
    sap, train = SAP(model, **ARGUMENTS), trainer(SHAPE)
    for number in range(4):
        train(model)
        if number in (0, 2):
            sap.set_rewind_point()
            point = state_without_masks(model)
            train(model)
        sap.step()
        assert_rewound(model, point, masks_of(model))


def test_optimizers_that_fill_their_state_when_they_are_made_get_it_back():
    """Adagrad starts with sums, as timm's adahessian does with step counts; neither can step without them."""
    model = mlp()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05, initial_accumulator_value=0.25)
    sap = SAP(model, optimizer=optimizer, **ARGUMENTS)
    for seed in range(2):
        fit(model, optimizer, (6, 6), seed=seed)
        sap.step()
        sums = [state["sum"] for state in optimizer.state.values()]
        assert len(sums) == len(list(model.parameters()))
        assert all((value == 0.25).all() for value in sums)


def test_one_optimizer_for_all_rounds_trains_like_a_fresh_one():
    model, other = mlp(), mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    saps = SAP(model, optimizer=optimizer, **ARGUMENTS), SAP(other, **ARGUMENTS)
    for seed in range(3):
        losses = fit(model, optimizer, (6, 6), seed=seed)
        assert losses == fit(other, torch.optim.AdamW(other.parameters(), lr=0.05), (6, 6), seed=seed)
        assert saps[0].step().pruned_count == saps[1].step().pruned_count
        assert not optimizer.state


def test_a_model_pruned_before_keeps_its_zeros_and_counts_the_rest():
    model = mlp()
    nn.utils.prune.l1_unstructured(model[0], "weight", 0.5)
    before = mask_of(model, "0.weight").clone()
    history = iterative_sap(model, trainer(SHAPE), iterations=2, **ARGUMENTS)
    assert history[0].groups["0.weight"].d.tolist() == [int(before.sum())]
    assert not (mask_of(model, "0.weight") & ~before).any()


def test_exclude_leaves_tensors_dense_and_they_are_rewound_too():
    model, start = mlp(), state_without_masks(mlp())
    sap, train = SAP(model, exclude="3", **ARGUMENTS), trainer(SHAPE)
    for _ in range(2):
        train(model)
        record = sap.step()
    assert [tensor.name for tensor in record.tensors] == ["0.weight"]
    assert "3.weight" in model.state_dict()
    assert_rewound(model, start, masks_of(model))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("late", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one(scope, late):
    def rounds(model, sap, numbers):
        for number in numbers:
            fit(model, torch.optim.AdamW(model.parameters(), lr=0.03), SHAPE, seed=number)
            if late and number == 1:
                sap.set_rewind_point()
            sap.step({"number": number})

    model = mlp()
    sap = SAP(model, scope=scope, **ARGUMENTS)
    rounds(model, sap, range(2))
    states = saved(model.state_dict()), saved(sap.state_dict())
    rounds(model, sap, range(2, 5))
    torch.manual_seed(99)
    resumed = mlp()
    for parameter in resumed.parameters():
        torch.nn.init.normal_(parameter)
    again = SAP(resumed, scope=scope, **ARGUMENTS)
    resumed.load_state_dict(states[0])
    again.load_state_dict(states[1])
    assert len(again.history) == 2
    rounds(resumed, again, range(2, 5))
    for (key, value), other in zip(model.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(value, other), key
    for record, other in zip(sap.history, again.history, strict=True):
        assert_same_record(*(dataclasses.replace(each, seconds=0.0) for each in (record, other)))


@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.25, 0.5])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("baseline", [LotteryTicket, OneShot])
def test_baselines_prune_a_fixed_ratio(baseline, scope, ratio):
    model = convnet()
    pruner = baseline(model, ratio=ratio, scope=scope)
    trainer((6, 2, 6, 6))(model)
    weights, masks = arrays(model)
    record = pruner.step()
    for name, group in record.groups.items():
        assert group.c.tolist() == [round(ratio * d) for d in group.d.tolist()], name
    if scope == "layer":
        for name, mask in masks_of(model).items():
            order = np.argsort(np.abs(weights[name]).reshape(-1), kind="stable")[: round(ratio * masks[name].size)]
            assert set(np.flatnonzero(~mask.numpy().reshape(-1))) == set(order)


@pytest.mark.parametrize("name", ["SAP", "LotteryTicket", "OneShot"])
def test_an_unknown_keyword_is_named_with_the_class_that_was_called(name):
    with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected keyword argument 'epochs'$"):
        getattr(torch_sap, name)(mlp(), epochs=3)


def test_editors_see_the_keywords():
    def names(kind):
        return set(inspect.signature(kind.__init__).parameters) - {"self", "model", "rule", "settings", "unknown"}

    assert names(Pruner) == set(Settings.__annotations__)
    assert names(Pruner) | names(SAP) == set(SAPSettings.__annotations__)


def test_a_pruner_is_read_at_a_glance():
    sap = SAP(mlp(), eta_r=0.1)
    total = sum(prunable.weight.numel() for prunable in sap.prunables)
    assert repr(sap) == (
        f"<SAP of Sequential: layer scope, p=0.5, q=1, eta_r=0.1, gamma=1, beta=0.9; {total:,} weights>"
    )
    found = sap.step()
    share = 1 - found.pruned_count / total
    assert repr(sap).endswith(f"; {total:,} weights, {share:.1%} remaining after 1 round>")
    sap.step()
    assert repr(sap).endswith(" remaining after 2 rounds>")
    assert repr(LotteryTicket(mlp())).startswith("<LotteryTicket of Sequential: layer scope, p=0.5, q=1, ratio=0.2; ")


class Observed(nn.Module):
    """A layer with buffers that get their shapes from the data, as observers of quantization have."""

    def __init__(self, start):
        super().__init__()
        self.layer, self.unobserved = nn.Linear(6, 6), nn.Linear(6, 6)
        self.register_buffer("seen", torch.full(start, 7.0))
        self.again = nn.Module()
        self.again.register_buffer("seen", self.seen)

    def forward(self, x):
        self.seen = self.again.seen = x.detach().amax(1)
        return self.unobserved(self.layer(x))


@pytest.mark.parametrize("start", [(0,), (1,), (3, 1)])
def test_buffers_whose_shape_changes_are_rewound(start):
    model = Observed(start)
    sap = SAP(model)
    for _ in range(2):
        model(torch.randn(5, 6))
        assert model.seen.shape == (5,)
        sap.step()
        assert torch.equal(model.seen, torch.full(start, 7.0))
        assert model.seen is model.again.seen
    assert model.layer.weight_mask.sum() < 36

    def failing(model):
        model(torch.randn(5, 6))
        raise KeyError

    with pytest.raises(KeyError):
        iterative_sap(sap, failing, iterations=5)
    assert torch.equal(model.seen, torch.full(start, 7.0))


def test_a_parameter_of_another_shape_is_named_and_nothing_is_changed():
    model = Observed((1,))
    sap = SAP(model)
    model.layer.bias = nn.Parameter(torch.zeros(1))
    before = saved(model.state_dict())
    with pytest.raises(RuntimeError, match=r"layer\.bias must keep its shape \(6,\) to be set back"):
        sap.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not sap.history


class WithExtraState(nn.Linear):
    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        pass


def test_extra_states_in_a_state_dict_to_rewind_to_are_left_out():
    model = nn.Sequential(WithExtraState(6, 6))
    start = model[0].weight.detach().clone()
    sap = SAP(model, rewind=model.state_dict())
    with torch.no_grad():
        model[0].weight += 1
    sap.step()
    assert torch.equal(model[0].weight, start * model[0].weight_mask)
    with pytest.raises(TypeError, match=r"a state_dict of tensors, got a str for '0\.bias'"):
        SAP(model, rewind={**model.state_dict(), "0.bias": "zero"})


def test_expanded_tensors_are_rewound():
    model = nn.Sequential(nn.Linear(6, 6))
    model.register_buffer("position", torch.arange(6).expand(3, 6))
    model.register_parameter("scale", nn.Parameter(torch.ones(1).expand(6), requires_grad=False))
    sap = SAP(model)
    model.position = torch.zeros(6).expand(3, 6)
    sap.step()
    assert model.position.tolist() == [list(range(6))] * 3
    assert model.scale.tolist() == [1.0] * 6
    model.position.add_(1)
    sap.step()
    assert model.position.tolist() == [list(range(6))] * 3


def test_a_model_whose_masks_were_removed_is_not_pruned_by_its_old_pruner():
    model = mlp()
    sap = SAP(model, **ARGUMENTS)
    sap.step()
    torch_sap.remove(model)
    before = saved(model.state_dict())
    for call in (sap.step, sap.record):
        with pytest.raises(
            RuntimeError, match=r"0\.weight must have the mask that this SAP gave it, but it was removed"
        ):
            call()
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert len(sap.history) == 1


class Filled(nn.Linear):
    """A layer whose buffer is None until it has met data."""

    def __init__(self):
        super().__init__(6, 6)
        self.register_buffer("seen", None)

    def forward(self, x):
        self.seen = x.detach() if self.seen is None else self.seen + x.detach()
        return super().forward(x)


def test_buffers_that_were_none_are_none_again():
    model = nn.Sequential(Filled())
    sap = SAP(model)
    for _ in range(2):
        model(torch.ones(1, 6))
        sap.step()
        assert model[0].seen is None

    def failing(model):
        model(torch.ones(1, 6))
        raise KeyError

    with pytest.raises(KeyError):
        iterative_sap(sap, failing, iterations=5)
    assert model[0].seen is None

    model(torch.ones(1, 6))
    sap.set_rewind_point()
    model(torch.ones(1, 6))
    sap.step()
    assert model[0].seen.tolist() == [[1.0] * 6]

    model = nn.Sequential(nn.Linear(6, 6), Filled())
    sap = SAP(model, exclude="1")
    model[1] = nn.Identity()
    sap.step()

    trained = SAP(nn.Sequential(Filled()), rewind="none")
    trained.model(torch.ones(1, 6))
    trained.step()
    assert trained.model[0].seen is not None
