"""Runs of iterative SAP that are killed and resumed, each in a process forked from this one, which has torch imported.

    python killed_runs.py instants FOLDER NUMBER     kill at NUMBER instants spread over a run
    python killed_runs.py steps FOLDER               kill at each step of each writing of the checkpoint

Prints a line of JSON with what an uninterrupted run arrived at and what each of the others did.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from functools import partial

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import torch_sap
from torch_sap.files import checkpoint
from torch_sap.stopping import WithinTolerance

ITERATIONS = 3
DIGITS = load_digits()
IMAGES = torch.tensor(DIGITS.images[:512, None] / 16, dtype=torch.float32)
LABELS = torch.tensor(DIGITS.target[:512])


def make_model():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def run(path, epochs):
    """Train and prune with a checkpoint, from fresh random numbers, and write what came out beside it."""
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(0)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def train_fn(model):
        model.train()
        for _ in range(epochs):
            for batch in np.array_split(np.random.permutation(len(IMAGES)), 8):
                images = IMAGES[batch] + 0.1 * random.random()
                loss = nn.functional.cross_entropy(model(images), LABELS[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.97  # lives in the optimizer, through all rounds
        return {"loss": loss.item()}

    def eval_fn(model):
        model.eval()
        with torch.no_grad():
            noisy = IMAGES + 0.1 * torch.randn_like(IMAGES)
            return {"accuracy": (model(noisy).argmax(1) == LABELS).float().mean()}

    settings = {"stop": WithinTolerance(0.2, patience=9), "checkpoint": path, "optimizer": optimizer}
    history = torch_sap.iterative_sap(model, train_fn, iterations=ITERATIONS, eval_fn=eval_fn, **settings)
    with open(path + ".result", "w") as file:
        json.dump(outcome(model, optimizer, history), file)


def outcome(model, optimizer, history):
    """Collect everything that must not depend on whether the run was killed."""
    digest = hashlib.sha256()
    momenta = {f"momentum {i}": s["momentum_buffer"] for i, s in enumerate(optimizer.state.values())}
    state = model.state_dict() | momenta
    for name, tensor in state.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.detach().numpy().tobytes())
    rounds = [{**each.to_dict(), "seconds": 0} for each in history]
    return {
        "values": digest.hexdigest(),
        "lr": optimizer.param_groups[0]["lr"],
        "history": hashlib.sha256(json.dumps(rounds).encode()).hexdigest(),
        "rounds": len(rounds),
        "returned": history.returned,
        "density": history[-1].density,
    }


def start(work):
    """Fork a process that does some work and ends."""
    process = os.fork()
    if process == 0:
        work()
        os._exit(0)
    return process


def finish(process):
    """Wait for a process, which must not fail; return whether it was killed."""
    status = os.waitpid(process, 0)[1]
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0, status
        return False
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    return True


def kill_after(work, seconds):
    """Start some work and kill it after a time; return whether it was still running."""
    process = start(work)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    return finish(process)


def place_of(path):
    """Describe how far the run is, by its file."""
    if not os.path.exists(path):
        return "no file"
    state = checkpoint.read(path)
    done = "finished" if state["finished"] else "pruning" if state["trained"] is not None else "training"
    return f"{done} {len(state['pruner']['history']['rounds'])}"


def resume(work, path):
    """Run to the end and return the outcome."""
    assert not finish(start(work))
    with open(path + ".result") as file:
        return json.load(file)


def killed_at_instants(folder, number):
    """Kill each run once in its part of the time and up to two times more, then let it end."""
    path, draw = os.path.join(folder, "whole"), random.Random(7)
    began = time.perf_counter()
    whole = resume(partial(run, path, 10), path)
    duration = time.perf_counter() - began
    results, places, kills = [], {}, 0
    for trial in range(number):
        path = os.path.join(folder, str(trial))
        instants = [(trial + draw.random()) / number * duration, draw.random() * duration, draw.random() * duration]
        for earlier, instant in enumerate(instants[: draw.randint(1, 3)]):
            if not kill_after(partial(run, path, 10), instant):
                if earlier == 0:
                    duration = instant  # a busy machine was slower when the whole run was timed
                break
            kills += 1
            places[place_of(path)] = places.get(place_of(path), 0) + 1
        results.append(resume(partial(run, path, 10), path))
    return {"whole": whole, "results": results, "kills": kills, "places": places, "seconds": duration}


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def half(write, self, data):
    write(self, memoryview(data)[: len(data) // 2])
    self._file.flush()
    kill()


def before(real, *arguments):
    kill()


def after(real, *arguments):
    real(*arguments)
    kill()


STEPS = {
    "file opened": (checkpoint, "save", before),
    "half written": (checkpoint._Writer, "write", half),
    "written": (checkpoint, "save", after),
    "before fsync": (os, "fsync", before),
    "after fsync": (os, "fsync", after),
    "before replace": (os, "replace", before),
    "after replace": (os, "replace", after),
    "folder synced": (os, "fsync", lambda real, file: (real(file), os.path.isdir(file) and kill())),
}


def run_and_die(path, epochs, step, writing):
    """Run, and die at a step of the n-th writing."""
    real_write, count = checkpoint.write, 0

    def write(*arguments):
        nonlocal count
        count += 1
        if count == writing:
            place, name, how = STEPS[step]
            real = getattr(place, name)
            setattr(place, name, lambda *arguments: how(real, *arguments))
        real_write(*arguments)

    torch_sap.iterate.resuming.write = write
    run(path, epochs)


def killed_at_steps(folder):
    """Kill and resume a run at each step of each writing."""
    path = os.path.join(folder, "whole")
    whole = resume(partial(run, path, 1), path)
    results, places = [], {}
    for step in STEPS:
        for writing in range(1, 2 * (ITERATIONS + 1) + 2):
            path = os.path.join(folder, f"{step} {writing}")
            assert finish(start(partial(run_and_die, path, 1, step, writing))), (step, writing)
            places[place_of(path)] = places.get(place_of(path), 0) + 1
            results.append(resume(partial(run, path, 1), path))
            assert not [name for name in os.listdir(folder) if name.endswith(".tmp")], (step, writing)
    return {"whole": whole, "results": results, "places": places}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.optim.SGD([nn.Parameter(torch.zeros(1))])  # imports more of PyTorch, once for all processes
    what, folder, *arguments = sys.argv[1:]
    print(json.dumps(killed_at_steps(folder) if what == "steps" else killed_at_instants(folder, int(arguments[0]))))
