"""What can be checked of other devices without having one: equal results, few waits, no mix of devices."""

import numpy as np
import pytest
import torch
from helpers import SCOPES, arrays, weight_names, zoo
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from torch_sap.decide import keys, measures
from torch_sap.decide.bounds import Hyperparameters
from torch_sap.decide.groups import Entry, split
from torch_sap.decide.measures import measure
from torch_sap.decide.step import prune_step
from torch_sap.masks.parameters import entries_of, resolve

RULE = Hyperparameters(eta_r=0.1)
WAITS = ("item", "_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "equal")


class CountWaits(TorchDispatchMode):
    """Counts operations that make the host wait for a device: copies from and to it, shapes that depend on data."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        kwargs = kwargs or {}
        copied = name == "_to_copy" and kwargs.get("device") is not None and not kwargs.get("non_blocking")
        between = copied and "cpu" in (args[0].device.type, torch.device(kwargs["device"]).type)
        across = between and args[0].device != torch.device(kwargs["device"])
        indexed = name == "index" and any(t is not None and t.dtype is torch.bool for t in args[1])
        self.count += name in WAITS or across or indexed
        return func(*args, **kwargs)


def entries(times=1, dtype=torch.float32):
    models = torch.nn.ModuleList(zoo(dtype) for _ in range(times))
    return entries_of(resolve(models), None)


@pytest.mark.parametrize("dtype", keys.INTEGER_OF)
@pytest.mark.parametrize("scope", SCOPES)
def test_a_device_gives_what_the_host_gives(scope, dtype, monkeypatch):
    first = prune_step(entries(dtype=dtype), scope, RULE)
    monkeypatch.setattr(Entry, "on_host", property(lambda entry: False))
    second = prune_step(entries(dtype=dtype), scope, RULE)
    for name, group in first.groups.items():
        np.testing.assert_array_equal(group.c, second.groups[name].c)
        np.testing.assert_allclose(group.index, second.groups[name].index, rtol=0, atol=1e-14)
    assert sum(group.c.sum() for group in first.groups.values()) > 0
    for mask, other in zip(first.masks, second.masks, strict=True):
        torch.testing.assert_close(mask, other)


def count_waits_on_fake_device(scope, times, pruned, monkeypatch):
    """Run a step on fake CUDA tensors; what the host would read is made up."""
    monkeypatch.setattr(measures, "read", lambda tensor: np.abs(np.sin(np.arange(1.0, tensor.numel() + 1))) + 9)
    found = entries(times)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode, CountWaits() as waits:
        fake = []
        for entry in found:
            with torch.no_grad():
                scores = torch.empty(entry.scores.shape, device="cuda")
                mask = torch.ones(entry.scores.shape, dtype=torch.bool, device="cuda") if pruned else None
            fake.append(Entry(entry.name, scores, mask, "weights", entry.channel_dim, entry.channel_groups))
        result = prune_step(fake, scope, RULE)
        assert mode is not None
        assert all(mask.device.type == "cuda" for mask in result.masks)
    return waits.count


def needs_fake_cuda():
    """Older versions of torch ask a driver even for fake tensors."""
    try:
        with FakeTensorMode():
            torch.empty(2, device="cuda")[:1]
    except RuntimeError:
        pytest.skip("needs a GPU, or a newer PyTorch, which makes fake CUDA tensors without one")


@pytest.mark.parametrize("pruned", [False, True], ids=["first step", "later step"])
@pytest.mark.parametrize("scope", SCOPES)
def test_waits_do_not_grow_with_the_tensors(scope, pruned, monkeypatch):
    """The one read of the sums is counted apart: it is `measures.read`."""
    needs_fake_cuda()
    few = count_waits_on_fake_device(scope, 1, pruned, monkeypatch)
    many = count_waits_on_fake_device(scope, 5, pruned, monkeypatch)
    assert few == many == 0


@pytest.mark.parametrize("scope", SCOPES)
def test_sums_are_read_once(scope, monkeypatch):
    monkeypatch.setattr(Entry, "on_host", property(lambda entry: False))
    calls = []
    read = measures.read
    monkeypatch.setattr(measures, "read", lambda tensor: calls.append(1) or read(tensor))
    prune_step(entries(4), scope, RULE)
    assert len(calls) == 1


@pytest.mark.parametrize("scope", SCOPES)
def test_threads_and_chunks_change_nothing(scope, monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(700, 900), torch.nn.Linear(900, 700))
    first = prune_step(entries_of(resolve(model), None), scope, RULE)
    before = torch.get_num_threads()
    try:
        for threads, chunk in [(2, 2**13), (1, 2**12), (3, 2**15)]:
            torch.set_num_threads(threads)
            monkeypatch.setattr(keys, "HOST_CHUNK", chunk)
            again = prune_step(entries_of(resolve(model), None), scope, RULE)
            for name, group in first.groups.items():
                np.testing.assert_array_equal(group.index, again.groups[name].index)
                np.testing.assert_array_equal(group.c, again.groups[name].c)
            for mask, other in zip(first.masks, again.masks, strict=True):
                assert torch.equal(mask, other)
    finally:
        torch.set_num_threads(before)


def test_pqi_is_that_of_float64_for_many_float32_weights():
    weights = torch.randn(3_000_000, dtype=torch.float32) * 0.02
    x = weights.double().abs()
    d = x.numel()
    literal = 1 - d ** (1 - 2.0) * x.sqrt().sum().item() ** 2 / x.sum().item()
    (found,) = measure([Entry("w", weights)], "global", 0.5, 1.0)["global"]
    assert abs(found - literal) < 1e-12


def test_the_zoo_is_what_the_tests_think():
    weights, _ = arrays(zoo())
    assert list(weights) == weight_names(zoo())
    assert len(split(entries(), "layer")) == len(weights)
