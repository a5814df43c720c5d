"""Several threads, forked and spawned processes, and many models one after the other."""

import copy
import gc
import multiprocessing
import os
import threading
import weakref

import pytest
import torch
from helpers import FUNCTIONS, SCOPES, assert_held, fit, mask_of, masks_of, mlp
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.data import DataLoader, Dataset

import torch_sap
from torch_sap.decide import threads as host
from torch_sap.masks import zeros

PATIENCE = 60
"""Seconds after which a process or a thread counts as stuck."""


def large(seed):
    """More entries than one piece of work, so that helper threads take part."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(700, 900), nn.ReLU(), nn.Linear(900, 700))


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def prune_repeatedly(model, scope, out):
    torch.set_num_threads(2)
    out.append([FUNCTIONS[scope](model).pruned for _ in range(3)])


def train_and_prune(model, seed, out):
    sap = torch_sap.SAP(model, rewind="none")
    losses = []
    for number in range(4):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        losses += fit(model, optimizer, (5, 6), seed=seed + number)
        sap.step()
    assert_held(model)
    out[seed] = losses


def at_once(function, *arguments):
    """Call a function in one thread for each of the arguments, all of them started together."""
    start, errors = threading.Barrier(len(arguments)), []

    def run(given):
        try:
            start.wait()
            function(*given)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(given,), daemon=True) for given in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "stuck"
    assert not errors, errors


@pytest.mark.parametrize("scope", SCOPES)
def test_models_pruned_from_several_threads_at_once(scope, two_threads):
    models = [large(seed) for seed in range(3)]
    copies, expected = copy.deepcopy(models), []
    for model in models:
        prune_repeatedly(model, scope, expected)
    found = [[] for _ in models]
    at_once(prune_repeatedly, *zip(copies, [scope] * 3, found, strict=True))
    assert [counts for (counts,) in found] == expected
    for model, other in zip(models, copies, strict=True):
        for name, mask in masks_of(model).items():
            assert torch.equal(mask_of(other, name), mask)


def test_models_trained_and_pruned_in_several_threads_at_once():
    one_by_one, together, models, arrived = {}, {}, [mlp() for _ in range(4)], set(zeros._arrived)
    copies = copy.deepcopy(models)
    for seed, model in enumerate(models):
        train_and_prune(model, seed, one_by_one)
    at_once(train_and_prune, *((model, seed, together) for seed, model in enumerate(copies)))
    assert together == one_by_one
    assert set(zeros._arrived) == arrived, "a backward leaves nothing behind"
    for model, other in zip(models, copies, strict=True):
        for key, value in model.state_dict().items():
            assert torch.equal(value, other.state_dict()[key]), key


def prune_in_child(connection, model):
    torch.set_num_threads(1)  # as DataLoader does: with more, PyTorch's own operations hang after a fork
    torch.get_num_threads = lambda: 2  # but the helpers of torch_sap are to take part
    found = [[FUNCTIONS["global"](model).pruned for _ in range(3)]]
    connection.send((found, host.map_pieces(lambda _: os.getpid(), [(0,), (1,), (2,)])))


def meet_in_child(connection):
    """Pieces that wait for each other, as many as this thread and all helpers: one thread less does not do them."""
    size = (os.cpu_count() or 1) + 1
    torch.get_num_threads = lambda: size
    every = threading.Barrier(size)
    connection.send(host.map_pieces(lambda piece: (every.wait(), piece)[1], [(i,) for i in range(size)]))


@pytest.mark.filterwarnings("ignore:This process.*fork")
def test_helpers_take_part_in_a_forked_child(two_threads):
    prune_repeatedly(large(0), "global", [])
    assert any(thread.name.startswith("torch_sap") for thread in threading.enumerate()), "the helpers are running"
    context = multiprocessing.get_context("fork")
    mine, its = context.Pipe()
    child = context.Process(target=meet_in_child, args=(its,), daemon=True)
    child.start()
    answered = mine.poll(20)
    child.kill()
    child.join()
    assert answered, "the child has the executor of its parent, but not the threads"
    assert mine.recv() == list(range((os.cpu_count() or 1) + 1))


def result_of_fork(model):
    """What a forked child found, or a failure if it does not end."""
    context = multiprocessing.get_context("fork")
    mine, its = context.Pipe()
    child = context.Process(target=prune_in_child, args=(its, model), daemon=True)
    child.start()
    answered = mine.poll(PATIENCE)
    if not answered:
        child.kill()
    child.join()
    assert answered, "the forked child is stuck"
    counts, pids = mine.recv()
    assert set(pids) == {child.pid}
    return counts


@pytest.mark.filterwarnings("ignore:This process.*fork")  # Python 3.12 and newer, of a process with threads
def test_a_forked_child_prunes_after_its_parent_has_pruned(two_threads):
    model, other, expected = large(0), large(0), []
    prune_repeatedly(large(0), "global", expected)
    assert any(thread.name.startswith("torch_sap") for thread in threading.enumerate()), "the helpers are running"
    assert result_of_fork(model) == expected
    prune_repeatedly(model, "global", again := [])
    assert again == expected, "the parent goes on"
    assert result_of_fork(other) == expected, "and forks again"


@pytest.mark.filterwarnings("ignore:This process.*fork")
def test_children_forked_while_another_thread_prunes(two_threads):
    model, expected, ended = large(0), [], threading.Event()  # the children's model stays as it is here
    others = iter([large(1) for _ in range(50)])
    prune_repeatedly(large(0), "global", expected)

    def go_on():
        while not ended.is_set():
            prune_repeatedly(next(others), "neuron", [])

    other = threading.Thread(target=go_on, daemon=True)
    other.start()
    try:
        for _ in range(3):
            assert result_of_fork(model) == expected
    finally:
        ended.set()
        other.join(PATIENCE)
    assert not other.is_alive()


class Plain(Dataset):
    """Holds nothing of a model."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.linspace(-1, 1, 6) * (index - 5)


class WithModel(Plain):
    """Computes its items with a pruned model, in the worker."""

    def __init__(self, model):
        self.model = model

    def __getitem__(self, index):
        with torch.no_grad():
            return super().__getitem__(index), self.model(super().__getitem__(index)[None])[0]


def train_from(loader):
    model = mlp()
    torch_sap.layer_unstructured(model, eta_r=0.2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(2):
        for batch in loader:
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
        torch_sap.layer_unstructured(model)
    assert_held(model)
    return model.state_dict()


@pytest.mark.filterwarnings("ignore:This process.*fork")
# PyTorch's loader says so when it is dropped and a forked worker of a busy machine is slow to end; all data were there.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_load_data_while_a_pruned_model_trains(method):
    loader = DataLoader(Plain(), batch_size=4, num_workers=2, multiprocessing_context=method, persistent_workers=True)
    expected = train_from(DataLoader(Plain(), batch_size=4))
    for key, value in train_from(loader).items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.filterwarnings("ignore:This process.*fork")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_get_a_pruned_model(method):
    """Their copies compute the same, and what the model does afterwards, its memory being shared now, is right."""
    model = mlp()
    torch_sap.layer_unstructured(model, eta_r=0.2)
    fit(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), (5, 6))
    model.eval()
    loader = DataLoader(WithModel(model), batch_size=4, num_workers=1, multiprocessing_context=method)
    inputs, outputs = (torch.cat(parts) for parts in zip(*loader, strict=True))
    with torch.no_grad():
        torch.testing.assert_close(outputs, model(inputs))
    with torch.no_grad():
        model[0].weight_orig.add_(1)
    fit(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), (5, 6))
    assert_held(model)


def used_model():
    """A model that was made, pruned, trained for a step, and pruned again."""
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4))
    torch_sap.layer_unstructured(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    torch_sap.layer_unstructured(model)
    return model


def test_a_pruned_model_is_gone_at_once_without_the_garbage_collector():
    gc.collect()
    gc.disable()
    try:
        model = used_model()
        modules, weights = [weakref.ref(m) for m in model.modules()], [weakref.ref(p) for p in model.parameters()]
        del model
        assert not any(reference() is not None for reference in [*modules, *weights])
    finally:
        gc.enable()


@pytest.mark.slow
def test_a_thousand_models_leave_nothing_behind():
    def memory():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def counts():
        gc.collect()
        return (
            len(gc.get_objects()),
            len(zeros._keepers),
            len(_global_optimizer_post_hooks) + len(_global_optimizer_pre_hooks),
        )

    for _ in range(100):  # what is made once, and what allocators keep
        used_model()
    (objects, held, global_hooks), before = counts(), memory()
    alive = [weakref.ref(used_model()) for _ in range(1000)]
    assert not any(reference() is not None for reference in alive)
    del alive
    after = counts()
    assert after[1:] == (held, global_hooks)
    assert after[0] - objects < 100, "less than one object in ten models"
    assert memory() - before < 16 * 2**20
