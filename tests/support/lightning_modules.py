"""A LightningModule, a callback that watches it, and a quiet Trainer."""

import copy
from functools import partial

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

# Lightning's advice about workers and checkpoints, and a class of PyTorch that it still uses.
IGNORED = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]

EPOCHS = 3  # per round
LR = 0.05
BATCHES = 4


def samples():
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(16 * BATCHES, 6, generator=generator)
    return inputs, torch.randint(0, 3, (16 * BATCHES,), generator=generator)


def loader():
    return DataLoader(TensorDataset(*samples()), 16)


class Resumable:
    """A loader that resumes at the batch of its state."""

    def __init__(self):
        self.begin = self.done = 0

    def __len__(self):
        return BATCHES

    def __iter__(self):
        self.done, self.begin = self.begin, 0
        while self.done < BATCHES:
            self.done += 1
            yield tuple(tensor[16 * (self.done - 1) : 16 * self.done] for tensor in samples())

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.begin = state["done"]


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 3))


class Module(L.LightningModule):
    optimizer = staticmethod(partial(torch.optim.SGD, lr=LR, momentum=0.9))

    def __init__(self):
        super().__init__()
        self.network = network()

    def training_step(self, batch, number):
        loss = nn.functional.cross_entropy(self.network(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, number):
        self.log("accuracy", (self.network(batch[0]).argmax(1) == batch[1]).float().mean())

    test_step = validation_step

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)]


class LateModule(Module):
    """A module whose layers are created in configure_model."""

    def __init__(self):
        L.LightningModule.__init__(self)
        self.network = None

    def configure_model(self):
        if self.network is None:
            self.network = network()


class Starts(L.Callback):
    """Record the state at the start of each epoch; comes after the SAPCallback."""

    def __init__(self):
        self.states, self.lrs, self.optimizers = [], [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.states.append({key: value.clone() for key, value in pl_module.state_dict().items()})
        self.lrs.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.optimizers.append(copy.deepcopy(trainer.optimizers[0].state_dict()["state"]))


def trainer(max_epochs, *callbacks, kind=L, **settings):
    settings = {"enable_checkpointing": any(isinstance(each, ModelCheckpoint) for each in callbacks)} | settings
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return kind.Trainer(max_epochs=max_epochs, callbacks=list(callbacks), **quiet, **settings)


def fit(max_epochs, *callbacks, module=None, train=None, validation=True, ckpt_path=None, **settings):
    module = Module() if module is None else module
    loaders = train or loader(), loader() if validation else None
    trainer(max_epochs, *callbacks, **settings).fit(module, *loaders, ckpt_path=ckpt_path)
    return module


def history_of(callback):
    rounds = callback.history.to_dict()["rounds"]
    for each in rounds:
        del each["seconds"]
    return rounds


def assert_same(module, other):
    for (key, value), (other_key, other_value) in zip(
        module.state_dict().items(), other.state_dict().items(), strict=True
    ):
        assert key == other_key
        assert torch.equal(value, other_value), key


def assert_rewound(state, start):
    """Check that a state is the start with zeros at pruned entries, bit for bit."""
    for key, value in state.items():
        if not key.endswith("_mask"):
            mask = state.get(key.removesuffix("_orig") + "_mask", torch.tensor(True))
            assert torch.equal(value, torch.where(mask, start[key], 0)), key
