"""The callback for Lightning's Trainer, and PQIGlobal in Lightning's own ModelPruning."""

import copy
import importlib
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import reference
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules

import torch_sap

L = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.callbacks import (  # noqa: E402
    BackboneFinetuning,
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning_modules import (  # noqa: E402
    BATCHES,
    EPOCHS,
    IGNORED,
    LR,
    Module,
    Starts,
    assert_rewound,
    assert_same,
    fit,
    history_of,
    loader,
    network,
    trainer,
)

from torch_sap.integrations.lightning import SAPCallback  # noqa: E402

pytestmark = IGNORED


def test_three_rounds_of_rewinding_restore_the_start_bitwise():
    callback, starts = SAPCallback(EPOCHS), Starts()
    fit(4 * EPOCHS, callback, starts)
    rounds = starts.states[::EPOCHS]
    assert len(rounds) == 4
    for state in rounds[1:]:
        assert_rewound(state, rounds[0])
    remaining = [sum(int(value.sum()) for key, value in state.items() if key.endswith("_mask")) for state in rounds]
    assert remaining == [each.remaining for each in callback.history]
    assert remaining == sorted(set(remaining), reverse=True)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adagrad"])
def test_optimizers_and_schedulers_restart_with_each_round(name):
    module, starts = Module(), Starts()
    module.optimizer = partial(getattr(torch.optim, name), lr=LR)
    if name == "SGD":
        module.optimizer = partial(module.optimizer, momentum=0.9)
    fit(3 * EPOCHS, SAPCallback(EPOCHS), starts, module=module)
    assert starts.lrs[:EPOCHS] == starts.lrs[EPOCHS : 2 * EPOCHS] == starts.lrs[2 * EPOCHS :]
    assert starts.lrs[0] == LR > starts.lrs[1] > starts.lrs[2]
    fresh, trained, *later = starts.optimizers
    assert str(trained) != str(fresh) == str(later[EPOCHS - 2]) == str(later[2 * EPOCHS - 2])


SCHEDULERS = {
    "one cycle": lambda optimizer: schedules.OneCycleLR(optimizer, LR, total_steps=EPOCHS * BATCHES + 1),
    "warm-up": lambda optimizer: schedules.SequentialLR(
        optimizer,
        [schedules.LinearLR(optimizer, 0.1, total_iters=4), schedules.CosineAnnealingLR(optimizer, 8)],
        milestones=[4],
    ),
    "lambda": lambda optimizer: schedules.LambdaLR(optimizer, lambda step: 0.9**step),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_that_step_per_batch_restart(name):
    class Scheduled(Module):
        def configure_optimizers(self):
            optimizer = self.optimizer(self.parameters())
            scheduler = {"scheduler": SCHEDULERS[name](optimizer), "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": scheduler}

    class Rates(L.Callback):
        def __init__(self):
            self.found = []

        def on_train_batch_start(self, trainer, *_):
            group = trainer.optimizers[0].param_groups[0]
            self.found.append((group["lr"], group["momentum"]))

    rates, steps = Rates(), EPOCHS * BATCHES
    fit(3 * EPOCHS, SAPCallback(EPOCHS), rates, module=Scheduled())
    assert rates.found[:steps] == rates.found[steps : 2 * steps] == rates.found[2 * steps :]
    assert len(set(rates.found)) > steps / 2


def test_beside_finetuning_of_a_backbone_which_adds_a_parameter_group():
    class Finetuned(Module):
        def __init__(self):
            super().__init__()
            self.backbone = self.network[0]

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=LR, momentum=0.9)

    class Groups(L.Callback):
        def __init__(self):
            self.found = []

        def on_train_epoch_start(self, trainer, pl_module):
            (optimizer,) = trainer.optimizers
            trained = sum(p in optimizer.state for group in optimizer.param_groups for p in group["params"])
            self.found.append(([group["lr"] for group in optimizer.param_groups], trained))

    groups, module = Groups(), Finetuned()
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 1.0)
    fit(3 * EPOCHS, finetuning, SAPCallback(EPOCHS), groups, module=module)
    assert [len(rates) for rates, _ in groups.found] == [1] + [2] * (3 * EPOCHS - 1)
    assert [trained for _, trained in groups.found] == [0, 4, 6, 0, 6, 6, 0, 6, 6]
    assert all(rates[0] == LR for rates, _ in groups.found)
    assert (module.network[0].weight[~module.network[0].weight_mask] == 0).all()


def test_beside_stochastic_weight_averaging_which_adds_keys_to_groups():
    callback, module = SAPCallback(EPOCHS), Module()
    averaging = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2 * EPOCHS - 1, annealing_epochs=1)
    fit(3 * EPOCHS, averaging, callback, module=module)
    assert [found.pruned is None for found in callback.history] == [False, False, True]
    mask, average = module.network[0].weight_mask, averaging._average_model.network[0].weight
    assert torch.equal(module.network[0].weight, average * mask)  # not rewound before the epoch that the averaging adds
    assert (module.network[0].weight[~module.network[0].weight_mask] == 0).all()


@pytest.mark.filterwarnings("ignore:[\\s\\S]*[dD]eprecat:DeprecationWarning")  # jsonargparse, about Lightning's calls
def test_the_command_line_takes_the_callback_from_the_configuration_of_the_guide(tmp_path, monkeypatch):
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    page = (Path(__file__).parents[2] / "docs" / "guide-scripts.md").read_text(encoding="utf-8")
    (configuration,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    quiet = {"accelerator": "cpu", "logger": "false", "enable_checkpointing": "false", "enable_progress_bar": "false"}
    lines = "".join(f"  {key}: {value}\n" for key, value in quiet.items())
    (tmp_path / "settings.yaml").write_text("seed_everything: 0\n" + configuration + lines)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config=settings.yaml"])
    cli = LightningCLI(Module, run=False)
    cli.trainer.fit(cli.model, loader())
    (callback,) = [each for each in cli.trainer.callbacks if isinstance(each, SAPCallback)]
    assert [found.pruned is None for found in callback.history] == [False, False, True]
    assert callback.history[0].scope == "global"


def test_it_prunes_as_a_loop_by_hand_does():
    def train(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
        for _ in range(EPOCHS):
            for inputs, labels in loader():
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs), labels).backward()
                optimizer.step()
            schedule.step()

    by_hand = network()
    expected = torch_sap.iterative_sap(by_hand, train, iterations=2, scope="neuron", eta_r=0.1, exclude="3")
    callback = SAPCallback(EPOCHS, scope="neuron", eta_r=0.1, exclude="network.3")
    module = fit(3 * EPOCHS, callback)
    assert_same(module.network, by_hand)
    assert [each.remaining for each in callback.history] == [each.remaining for each in expected]


def test_metrics_of_the_trainer_are_those_of_the_round():
    callback = SAPCallback(EPOCHS)
    module = Module()
    once = trainer(2 * EPOCHS, callback)
    once.fit(module, loader(), loader())
    last = {key: float(value) for key, value in once.callback_metrics.items()}
    assert set(last) == {"accuracy", "train_loss"}
    assert callback.history[-1].metrics == last != callback.history[0].metrics
    once.validate(module, loader(), verbose=False)
    once.fit_loop.max_epochs = 3 * EPOCHS
    once.fit(module, loader(), loader())
    assert callback.history[1].metrics == last


def test_late_rewinding_goes_back_to_the_epoch():
    starts = Starts()
    fit(3 * EPOCHS, SAPCallback(EPOCHS, rewind=1), starts)
    for state in (starts.states[EPOCHS], starts.states[2 * EPOCHS]):
        assert_rewound(state, starts.states[1])
    assert starts.lrs[EPOCHS] == LR


def test_without_rewinding_training_goes_on():
    class Ends(L.Callback):
        def __init__(self):
            self.states = []

        def on_train_epoch_end(self, trainer, pl_module):
            self.states.append({key: value.clone() for key, value in pl_module.state_dict().items()})

    starts, ends, dense = Starts(), Ends(), Starts()
    fit(2 * EPOCHS, SAPCallback(EPOCHS, rewind="none"), starts, ends)
    fit(2 * EPOCHS, dense)
    assert_rewound(starts.states[EPOCHS], ends.states[EPOCHS - 1])
    assert starts.lrs == dense.lrs
    assert [len(each) for each in starts.optimizers] == [len(each) for each in dense.optimizers]


def test_a_fresh_module_is_tested_from_a_checkpoint_pruned_or_not(tmp_path):
    callback = SAPCallback(EPOCHS)
    fit(EPOCHS + 1, callback, ModelCheckpoint(tmp_path / "pruned", filename="last"))
    fit(1, ModelCheckpoint(tmp_path / "dense", filename="last"))
    for name in ("pruned", "dense"):
        module, tester = Module(), trainer(1, SAPCallback(EPOCHS))
        found = tester.test(module, loader(), ckpt_path=tmp_path / name / "last.ckpt", verbose=False)[0]
        assert ("network.0.weight_mask" in module.state_dict()) == (name == "pruned")  # testing adds no masks
        if name == "pruned":
            assert found["accuracy"] == callback.history[-1].metrics["accuracy"]


def test_an_average_of_weights_has_the_masks():
    callback, average, starts = SAPCallback(EPOCHS), EMAWeightAveraging(decay=0.8, use_buffers=False), Starts()
    module = fit(3 * EPOCHS, callback, average, starts)
    for state in starts.states[EPOCHS::EPOCHS]:
        assert_rewound(state, starts.states[0])
    layers = [module.network[0], module.network[3]]
    assert sum(int(layer.weight_mask.sum()) for layer in layers) == callback.history[-1].remaining < 216
    assert all(not layer.weight[~layer.weight_mask].any() for layer in layers)


def test_nothing_but_masks_is_left_on_the_module():
    module = fit(2, SAPCallback(1))
    assert not module._load_state_dict_pre_hooks
    copied = copy.deepcopy(torch_sap.remove(module))
    assert list(copied.state_dict()) == list(Module().state_dict())


def test_it_works_in_the_trainer_of_pytorch_lightning():
    kind = pytest.importorskip("pytorch_lightning")

    class Same(kind.LightningModule):
        training_step, validation_step = Module.training_step, Module.validation_step
        configure_optimizers, optimizer = Module.configure_optimizers, staticmethod(Module.optimizer)

        def __init__(self):
            super().__init__()
            self.network = network()

    callback, expected = SAPCallback(EPOCHS), SAPCallback(EPOCHS)
    module = Same()
    trainer(2 * EPOCHS, callback, kind=kind).fit(module, loader(), loader())
    assert_same(module, fit(2 * EPOCHS, expected))
    assert history_of(callback) == history_of(expected)


def pruned_entries(module):
    """Per pruned tensor, the entries that the mask says are zero, all of which are."""
    found = []
    for layer in module.modules():
        if hasattr(layer, "weight_mask"):
            assert not layer.weight[~layer.weight_mask].any()
            found.append(~layer.weight_mask)
    return found


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("make", [EMAWeightAveraging, WeightAveraging, lambda: WeightAveraging(use_buffers=False)])
def test_averages_beside_the_callback_are_pruned_where_the_module_is(make, order):
    averaging, callback = make(), SAPCallback(EPOCHS)
    module = fit(3 * EPOCHS, *[callback, averaging][::order])
    entries, of_average = pruned_entries(module), pruned_entries(averaging._average_model.module)
    assert len(entries) == len(of_average) == 2
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(entries, of_average, strict=True))
    assert sum(int(each.sum()) for each in entries) > 0
    assert len(callback.history) == 3


@pytest.mark.parametrize("order", [1, -1])
def test_stochastic_weight_averaging_beside_the_callback(order):
    averaging, callback = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2), SAPCallback(EPOCHS)
    module = fit(3 * EPOCHS, *[callback, averaging][::order])
    assert sum(int(each.sum()) for each in pruned_entries(module)) > 0
    assert [each.pruned is None for each in callback.history] == [False, False, True]


class Finetuned(Module):
    """A backbone that is frozen at first."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = self.network[:3], self.network[3]

    def configure_optimizers(self):
        return self.optimizer(parameter for parameter in self.parameters() if parameter.requires_grad)


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")  # those of batch norm
@pytest.mark.parametrize("order", [1, -1])
def test_backbone_finetuning_beside_the_callback(order):
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 1.0)
    callback, starts = SAPCallback(EPOCHS), Starts()
    module = fit(3 * EPOCHS, *[callback, finetuning][::order], starts, module=Finetuned())
    assert sum(int(each.sum()) for each in pruned_entries(module)) > 0
    for number in (EPOCHS, 2 * EPOCHS):
        assert_rewound(starts.states[number], starts.states[0])
        assert starts.lrs[number] == LR
        assert starts.optimizers[number] == {}


@pytest.mark.parametrize(
    ("arguments", "error", "rule"),
    [
        ({"epochs_per_round": True}, TypeError, "epochs_per_round must be an int, got True"),
        ({"rewind": 0}, ValueError, "got rewind=0"),
        ({"rewind": True}, ValueError, "got rewind=True"),
        ({"rewind": "start"}, ValueError, 'rewind must be "init", "none" or a number of epochs'),
        ({"p": 2.0}, ValueError, "p must be smaller than q"),
    ],
)
def test_mistakes_are_refused(arguments, error, rule):
    with pytest.raises(error, match=rule):
        SAPCallback(**{"epochs_per_round": 3, **arguments})


def test_a_pattern_that_matches_nothing_is_refused_before_training():
    starts = Starts()
    with pytest.raises(ValueError, match=r"'head' matches none of: network\.0\.weight, network\.3\.weight"):
        fit(1, SAPCallback(1, exclude="head"), starts)
    assert not starts.states


def test_without_lightning_the_error_names_the_extra(monkeypatch):
    for module in [name for name in sys.modules if "lightning" in name.split(".") and "torch_sap" not in name]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "torch_sap.integrations.lightning")
    with pytest.raises(ImportError, match=r"pip install 'torch_sap\[lightning\]'"):
        importlib.import_module("torch_sap.integrations.lightning")


class BeforePruning(L.Callback):
    """What ModelPruning finds at the end of each epoch; it comes before it."""

    def __init__(self):
        self.found = []

    def on_train_epoch_end(self, trainer, pl_module):
        layers = {"0": pl_module.network[0], "3": pl_module.network[3]}
        masks = {name: getattr(layer, "weight_mask", torch.ones_like(layer.weight)) for name, layer in layers.items()}
        weights = {name: layer.weight.detach().double().numpy().copy() for name, layer in layers.items()}
        self.found.append((weights, {name: mask.bool().numpy().copy() for name, mask in masks.items()}))


def test_pqi_global_in_lightnings_own_model_pruning():
    module, before = Module(), BeforePruning()
    pruning = ModelPruning(
        torch_sap.PQIGlobal,
        parameters_to_prune=[(module.network[0], "weight"), (module.network[3], "weight")],
        use_lottery_ticket_hypothesis=False,
        make_pruning_permanent=False,
    )
    fit(2, before, pruning, module=module)
    masks = {name: module.network[int(name)].weight_mask.bool().numpy() for name in ("0", "3")}
    expected_first, _ = reference.prune(*before.found[0], "global")
    expected_second, records = reference.prune(*before.found[1], "global")
    for found, expected in ((before.found[1][1], expected_first), (masks, expected_second)):
        assert found.keys() == expected.keys()
        assert all((found[name] == expected[name]).all() for name in found)
    assert records["global"][0].c > 0
