"""A stepper among the objects that accelerate saves and loads."""

import pytest
import torch
from helpers import assert_held, mlp

from torch_sap import SAP

accelerate = pytest.importorskip("accelerate")

STEPS = 4
SCHEDULERS = {
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=STEPS + 1),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=STEPS),
}


class Run:
    """A training by accelerate, with a stepper made before or after ``prepare``."""

    def __init__(self, folder, name, when):
        self.accelerator = accelerate.Accelerator(cpu=True, project_dir=folder)
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        scheduler = SCHEDULERS[name](optimizer)
        if when == "before":
            self.sap = SAP(model, optimizer=optimizer, scheduler=scheduler)
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(model, optimizer, scheduler)
        if when == "after":
            self.sap = SAP(self.model, optimizer=self.optimizer, scheduler=self.scheduler)
        if when == "attached":
            self.sap = SAP(self.model)
            self.sap.attach(optimizer=self.optimizer, scheduler=self.scheduler)
        self.accelerator.register_for_checkpointing(self.sap)
        self.rates = []

    def train(self, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(STEPS):
            self.rates.append(self.optimizer.param_groups[0]["lr"])
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(self.model(torch.randn(6, 6, generator=generator)).square().mean())
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("when", ["before", "after", "attached"])
def test_a_resumed_run_equals_one_without_interruption(tmp_path, name, when):
    whole = Run(tmp_path, name, when)
    for seed in range(2):
        whole.train(seed)
        whole.sap.step()
    whole.train(2)
    whole.accelerator.save_state(str(tmp_path / "state"))
    for seed in (3, 4):
        whole.sap.step()
        whole.train(seed)
    assert whole.rates == 5 * whole.rates[:STEPS]

    again = Run(tmp_path, name, when)
    torch.nn.init.normal_(again.model[0].bias)
    again.accelerator.load_state(str(tmp_path / "state"))  # models first, registered objects last
    assert len(again.sap.history) == 2
    for seed in (3, 4):
        again.sap.step()
        again.train(seed)
    assert again.rates == 2 * whole.rates[:STEPS]
    for one, other in zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert [found.remaining for found in again.sap.history] == [found.remaining for found in whole.sap.history]
    assert_held(again.model)
