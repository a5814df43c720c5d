"""A run that is killed at any instant and resumed arrives bit for bit where an uninterrupted one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_unchanged, fit, mlp, snapshot
from iterating import ARGUMENTS, trainer
from torch import nn

from torch_sap import SAP, LotteryTicket, OneShot, iterative_sap, prunable_parameters
from torch_sap.files import checkpoint
from torch_sap.iterate.randomness import random_state
from torch_sap.stopping import WithinTolerance

SCRIPT = Path(__file__).parents[1] / "support" / "killed_runs.py"
SHAPE = (6, 6)


class Stop(Exception):
    """Ends a run after a round."""


def until(number):
    def callback(found):
        if found.number == number:
            raise Stop

    return callback


@pytest.mark.parametrize("pruner", [SAP, LotteryTicket, OneShot])
def test_every_pruner_resumes(pruner, tmp_path):
    whole = iterative_sap(pruner(mlp()), trainer(SHAPE), iterations=3)
    train, path = trainer(SHAPE), tmp_path / "run.ckpt"
    with pytest.raises(Stop):
        iterative_sap(pruner(mlp()), train, iterations=3, checkpoint=path, callback=until(1))
    history = iterative_sap(pruner(mlp()), train, iterations=3, checkpoint=path)  # repeats no training
    assert [found.remaining for found in history] == [found.remaining for found in whole]
    assert train.rounds == 4


SCHEDULERS = {
    "milestones": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, milestones=[2, 3], gamma=0.1),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=5),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "warm-up": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: min(step / 2, 1.0)),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_optimizer_and_its_schedulers_resume(name, tmp_path):
    rates = []

    def run(callback=None, path=None):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scheduler = SCHEDULERS[name](optimizer)
        sap = SAP(model, optimizer=optimizer, scheduler=scheduler, **ARGUMENTS)

        def train(model):
            for step in range(4):
                rates.append(optimizer.param_groups[0]["lr"])
                fit(model, optimizer, SHAPE, steps=1, seed=step)
                scheduler.step(*([1.0] if name == "plateau" else []))

        history = iterative_sap(sap, train, iterations=3, checkpoint=path, callback=callback)
        return history, model.state_dict(), optimizer.state_dict(), scheduler.state_dict()

    history, *whole = run()
    expected = list(rates)
    rates.clear()
    with pytest.raises(Stop):
        run(until(1), tmp_path / "run.ckpt")
    again, *states = run(path=tmp_path / "run.ckpt")
    assert rates == expected == 4 * expected[:4]
    assert [found.remaining for found in again] == [found.remaining for found in history]
    assert all(torch.equal(value, states[0][key]) for key, value in whole[0].items())
    assert str(states[1]) == str(whole[1])
    assert states[2] == whole[2]


def test_another_schedule_is_another_run(tmp_path):
    def run(steps):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)]
        sap = SAP(model, optimizer=optimizer, scheduler=schedulers)
        iterative_sap(sap, trainer(SHAPE), iterations=1, checkpoint=tmp_path / "run.ckpt")

    run(5)
    with pytest.raises(ValueError, match=r"schedulers.0.T_max: 7 here, 5 in the file"):
        run(7)


def test_more_iterations_later(tmp_path):
    model, train, path = mlp(), trainer(SHAPE), tmp_path / "run.ckpt"
    assert len(iterative_sap(model, train, iterations=1, checkpoint=path)) == 2
    history = iterative_sap(mlp(), train, iterations=2, checkpoint=path)
    assert [found.pruned is None for found in history] == [False, False, True]
    assert train.rounds == 3
    with pytest.raises(ValueError, match="iterations: 1 here, 2 prunings done in the file"):
        iterative_sap(mlp(), train, iterations=1, checkpoint=path)


class Counting(nn.Linear):
    """A layer with a non-persistent buffer and an extra state."""

    def __init__(self):
        super().__init__(6, 9)
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.extra = 0

    def forward(self, inputs):
        self.seen += 1
        self.extra += 1
        return super().forward(inputs)

    def get_extra_state(self):
        return {"extra": self.extra}

    def set_extra_state(self, state):
        self.extra = state["extra"]


def test_buffers_modes_and_extra_state_are_restored(tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(Counting(), nn.Dropout(), nn.Linear(9, 4))

    def train(model):
        model[1].eval()
        trainer(SHAPE)(model)

    model, again = make(), make()
    iterative_sap(model, train, iterations=1, checkpoint=tmp_path / "run.ckpt")
    iterative_sap(again, pytest.fail, iterations=1, checkpoint=tmp_path / "run.ckpt")
    assert (again[0].seen, again[0].extra, again[1].training) == (model[0].seen, model[0].extra, False)
    assert model[0].extra == 8
    assert torch.equal(again[2].weight, model[2].weight)


class Observing(nn.Module):
    """Buffers that get another shape, a value, and none in training, as observers and caches do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("widest", torch.tensor([]))
        self.register_buffer("last", None)
        self.register_buffer("first", torch.ones(2))

    def forward(self, inputs):
        self.widest = inputs.detach().amax(0) if len(self.widest) == 0 else inputs.detach().amax(0).maximum(self.widest)
        self.last, self.first = inputs.detach().clone(), None
        return inputs + self.widest


@pytest.mark.parametrize("kill", [None, 2, 3])
def test_buffers_that_change_their_shape_in_training(kill, tmp_path):
    """Every round starts with those of the start, and a run that was killed after a training resumes."""
    starts, killed = [], []

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 9), Observing(), nn.Linear(9, 4))

    def train(model):
        starts.append((model[1].widest.tolist(), model[1].last, model[1].first.tolist()))
        trainer(SHAPE)(model)
        assert model[1].widest.shape == (9,)

    def evaluate(model):
        if len(starts) == kill and not killed:
            killed.append(True)
            raise KeyboardInterrupt
        return 1.0

    path = None if kill is None else tmp_path / "run.ckpt"
    model = make()
    arguments = {"iterations": 2, "eval_fn": evaluate, **ARGUMENTS}
    if kill is not None:
        with pytest.raises(KeyboardInterrupt):
            iterative_sap(model, train, checkpoint=path, **arguments)
        model = make()
    iterative_sap(model, train, checkpoint=path, **arguments)
    assert starts == [([], None, [1.0, 1.0])] * 3
    assert (model[1].widest.shape, model[1].last.shape, model[1].first) == ((9,), (SHAPE[0], 9), None)


def refused(path, match, make=mlp, **settings):
    model = make()
    before = snapshot(model)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=match):
        iterative_sap(model, trainer(SHAPE), checkpoint=path, **{"iterations": 2, **ARGUMENTS, **settings})
    assert_unchanged(model, before)
    assert path.read_bytes() == content


def test_a_file_of_another_run_is_refused(tmp_path):
    path = tmp_path / "run.ckpt"
    iterative_sap(mlp(), trainer(SHAPE), iterations=2, checkpoint=path, **ARGUMENTS)
    refused(path, "beta: 0.5 here, 0.6 in the file; p: 0.4 here, 0.5 in the file", beta=0.5, p=0.4)
    refused(path, "stop.0.class: 'WithinTolerance' here, nothing in the file", stop=WithinTolerance(0.1))
    refused(path, "gini: True here, False in the file", gini=True)
    refused(path, r"model.0.bias: 'float64 \(9,\)' here, 'float32 \(9,\)' in the file", make=lambda: mlp(torch.float64))


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("pruner", {}, "its settings cannot be read"),
        ("masks", [], "is not or is damaged"),
        ("masks", [torch.ones(2), torch.ones(2)], "its tensors are not those"),
        ("model", {}, "its tensors are not those"),
        ("modes", [True], "is not or is damaged"),
        ("random", [3], "is not or is damaged"),
        ("random", [{"python": [3, list(range(625)), None], "numpy": {}}], "is not or is damaged"),
        ("trained", {"loss": "low"}, "the file must give None, a number or a mapping"),
        (None, "modes", "it lacks modes"),
    ],
)
def test_a_damaged_file_changes_nothing(key, value, match, tmp_path):
    path = tmp_path / "run.ckpt"
    with pytest.raises(Stop):
        iterative_sap(mlp(), trainer(SHAPE), iterations=2, checkpoint=path, callback=until(1), **ARGUMENTS)
    state = checkpoint.read(path)
    if key is None:
        del state[value]
    else:
        state[key] = value
    checkpoint.write(path, {name: item for name, item in state.items() if name != "format"})
    before = random_state()
    refused(path, match)
    after = random_state()
    assert torch.equal(after.pop("torch"), before.pop("torch"))
    assert after == before


@pytest.mark.slow
def test_processes_write_one_file_and_resume(tmp_path):
    processes = pytest.importorskip("processes")
    import distributed_resuming

    os.mkdir(tmp_path / "files")
    cases = {"resumes": (distributed_resuming.a_run_resumes, str(tmp_path / "files"))}
    cases["damaged"] = (distributed_resuming.damaged_for_one_process, str(tmp_path))
    failures = processes.run_processes(2, tmp_path, cases)
    for case in cases:
        processes.assert_passed(failures, case)


def killed(what, folder, *arguments):
    pytest.importorskip("sklearn")
    command = [sys.executable, SCRIPT, what, folder, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_equal(found, number):
    assert len(found["results"]) == number
    assert [result == found["whole"] for result in found["results"]] == [True] * number
    assert found["whole"]["rounds"] == 4
    assert found["whole"]["density"] < 0.9


@pytest.mark.parametrize("number", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_instants(number, tmp_path):
    found = killed("instants", tmp_path, number)
    assert_equal(found, number)
    assert found["kills"] >= number * 0.3, "on a busy machine a run may end before its kill"
    assert len(found["places"]) >= min(2, found["kills"]), "spread over the run"
    print(found["kills"], "kills of", number, "runs of", found["seconds"], "s:", found["places"])


@pytest.mark.slow
def test_killed_at_each_step_of_each_writing(tmp_path):
    found = killed("steps", tmp_path)
    assert_equal(found, 8 * 9)
    assert sum(found["places"].values()) == 8 * 9
    print(found["places"])


def test_a_run_with_other_scores_is_another_run(tmp_path):
    def score(model):
        return {(module, name): getattr(module, name) ** 2 for module, name in prunable_parameters(model)}

    with_scores, without = tmp_path / "scores.ckpt", tmp_path / "none.ckpt"
    iterative_sap(mlp(), trainer(SHAPE), iterations=1, checkpoint=with_scores, importance_scores=score)
    iterative_sap(mlp(), trainer(SHAPE), iterations=1, checkpoint=without)
    with pytest.raises(ValueError, match="importance_scores: nothing here, 'a callable' in the file"):
        iterative_sap(mlp(), trainer(SHAPE), iterations=2, checkpoint=with_scores)
    with pytest.raises(ValueError, match="importance_scores: 'a callable' here, nothing in the file"):
        iterative_sap(mlp(), trainer(SHAPE), iterations=2, checkpoint=without, importance_scores=score)
    assert len(iterative_sap(mlp(), trainer(SHAPE), iterations=2, checkpoint=with_scores, importance_scores=score)) == 3
