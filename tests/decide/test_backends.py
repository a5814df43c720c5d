"""Both backends give the same, in any number of threads and pieces, and the CPU does not wait for a device."""

import numpy as np
import pytest
import torch
from helpers import SCOPES, arrays, weight_names, zoo
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from torch_sap.decide import backends, keys
from torch_sap.decide.backends import TORCH, NumPy
from torch_sap.decide.bounds import Hyperparameters
from torch_sap.decide.groups import Entry, split
from torch_sap.decide.step import prune_step
from torch_sap.decide.sums import check_finite, power_sums
from torch_sap.masks.parameters import entries_of, resolve

RULE = Hyperparameters(eta_r=0.1)
WAITS = ("item", "_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "equal")


class CountWaits(TorchDispatchMode):
    """Counts operations that make the CPU wait for a device: copies from and to it, shapes that depend on data."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        kwargs = kwargs or {}
        copied = name == "_to_copy" and kwargs.get("device") is not None and not kwargs.get("non_blocking")
        between = copied and "cpu" in (args[0].device.type, torch.device(kwargs["device"]).type)
        across = between and args[0].dim() and args[0].device != torch.device(kwargs["device"])
        indexed = name == "index" and any(t is not None and t.dtype is torch.bool for t in args[1])
        self.count += bool(name in WAITS or across or indexed)
        return func(*args, **kwargs)


def entries(times=1, dtype=torch.float32):
    models = torch.nn.ModuleList(zoo(dtype) for _ in range(times))
    return entries_of(resolve(models).prunables, None)


@pytest.mark.parametrize("dtype", keys.INTEGER_OF)
@pytest.mark.parametrize("scope", SCOPES)
def test_both_backends_give_the_same(scope, dtype):
    first = prune_step(entries(dtype=dtype), scope, RULE)
    second = prune_step(entries(dtype=dtype), scope, RULE, backend=TORCH)
    for name, group in first.groups.items():
        np.testing.assert_array_equal(group.c, second.groups[name].c)
        np.testing.assert_allclose(group.index, second.groups[name].index, rtol=0, atol=1e-14)
    assert sum(group.c.sum() for group in first.groups.values()) > 0
    assert first.remaining == second.remaining
    for mask, other in zip(first.masks, second.masks, strict=True):
        torch.testing.assert_close(mask, other)


def count_waits_on_fake_device(scope, times, pruned, monkeypatch):
    """Run a step on fake CUDA tensors; what the CPU would read is made up."""
    reads = []

    def read(tensor):
        reads.append(1)
        return np.abs(np.sin(np.arange(1.0, tensor.numel() + 1))) + 9

    monkeypatch.setattr(backends, "_read", read)
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
        assert all(mask is None or mask.device.type == "cuda" for mask in result.masks)
    return waits.count, len(reads)


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
    needs_fake_cuda()
    few = count_waits_on_fake_device(scope, 1, pruned, monkeypatch)
    many = count_waits_on_fake_device(scope, 5, pruned, monkeypatch)
    assert few == many
    assert few[0] == 0
    assert few[1] <= 3, "d, sums, and what remains"


@pytest.mark.parametrize("scope", SCOPES)
def test_threads_and_pieces_change_nothing(scope, monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(700, 900), torch.nn.Linear(9000, 70))
    first = prune_step(entries_of(resolve(model).prunables, None), scope, RULE)
    before = torch.get_num_threads()
    try:
        for threads, chunk in [(2, 2**13), (1, 2**12), (3, 2**15)]:
            torch.set_num_threads(threads)
            monkeypatch.setattr(NumPy, "chunk", chunk)
            again = prune_step(entries_of(resolve(model).prunables, None), scope, RULE)
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
    (found,) = power_sums([Entry("w", weights)], 0.5, 1.0).index("global")["global"]
    assert abs(found - literal) < 1e-12


@pytest.mark.parametrize("scope", SCOPES)
def test_one_pass_gives_what_a_step_in_each_scope_finds(scope):
    sums = power_sums(entries(), RULE.p, RULE.q)
    found = prune_step(entries(), scope, RULE)
    for name, index in sums.index(scope).items():
        np.testing.assert_allclose(index, found.groups[name].index, rtol=0, atol=1e-15)
        np.testing.assert_array_equal(sums.d(scope)[name], found.groups[name].d)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", keys.INTEGER_OF)
def test_what_is_not_finite_is_named_unless_it_is_pruned(dtype, bad):
    weights, mask = torch.full((5, 4), torch.finfo(dtype).max, dtype=dtype), torch.ones(5, 4, dtype=torch.bool)
    check_finite([Entry("a", weights)])
    weights[3, 1] = bad
    for call in (check_finite, lambda given: power_sums(given, 0.5, 1.0)):
        with pytest.raises(ValueError, match="weights must be finite, but b of shape"):
            call([Entry("a", torch.ones(2, 2)), Entry("b", weights)])
    mask[3, 1] = False
    check_finite([Entry("b", weights, mask)])


def test_the_zoo_is_what_the_tests_think():
    weights, _ = arrays(zoo())
    assert list(weights) == weight_names(zoo())
    assert len(split(entries(), "layer")) == len(weights)
