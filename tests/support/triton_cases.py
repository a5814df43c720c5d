"""The Triton kernels, run on the CPU by Triton's interpreter, against the CPU's backend.

``tests/decide/test_triton.py`` runs this file in a process of its own, since Triton reads TRITON_INTERPRET when it is
imported. To debug: ``TRITON_INTERPRET=1 python -m pytest -n 0 tests/support/triton_cases.py -k name``.
"""

from dataclasses import replace

import fast_interpreter
import numpy as np
import pytest
import torch
from helpers import SCOPES, assert_held
from step_cases import DTYPES, KINDS, RULES, SMALL, random_case
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import torch_sap
from torch_sap.decide import backends, step, triton_backend
from torch_sap.decide.bounds import Hyperparameters
from torch_sap.decide.groups import Entry, split
from torch_sap.decide.keys import INTEGER_OF
from torch_sap.decide.step import prune_step
from torch_sap.decide.sums import power_sums
from torch_sap.decide.triton_backend import TRITON
from torch_sap.masks import guards, small, zeros, zeros_cuda
from torch_sap.masks import mask as masks

fast_interpreter.install()

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


def assert_same(entries, scope, rule):
    """A step gives what the CPU's gives: counts and masks exactly, sums within 1e-13 of them."""
    wanted = prune_step(entries, scope, rule)
    found = prune_step(entries, scope, rule, backend=TRITON)
    assert list(found.groups) == list(wanted.groups)
    for name, group in wanted.groups.items():
        np.testing.assert_array_equal(group.c, found.groups[name].c)
        np.testing.assert_array_equal(group.d, found.groups[name].d)
        np.testing.assert_allclose(group.index, found.groups[name].index, rtol=0, atol=1e-12)
    for name, table in wanted.sums._tables["neuron"].items():
        np.testing.assert_allclose(found.sums._tables["neuron"][name], table, rtol=1e-13, atol=0)
    assert found.sums.zero == wanted.sums.zero
    assert found.remaining == wanted.remaining
    for entry, mask, other in zip(entries, wanted.masks, found.masks, strict=True):
        assert (mask is None) == (other is None), entry.name
        assert mask is None or torch.equal(mask, other), entry.name
    return wanted


@pytest.mark.parametrize("part", range(10))
def test_a_sample_of_the_grid(part, monkeypatch):
    pruned = 0
    for seed in range(30 * part, 30 * part + 30):
        entries, scope, rule, small = random_case(seed)
        with monkeypatch.context() as patched:
            for name, value in SMALL.items() if small else ():
                patched.setattr(triton_backend, name, value)
            try:
                result = assert_same(entries, scope, rule)
            except Exception as error:
                raise AssertionError(f"case {seed}: {[e.name for e in entries]}, {scope}, {rule}") from error
        pruned += sum(int(group.c.sum()) for group in result.groups.values())
    assert pruned > 300


@pytest.mark.parametrize("scope", SCOPES)
def test_tensors_of_several_programs(scope):
    rows = 10 if scope == "neuron" else 40
    entries = [
        Entry("large", torch.randn(rows, 2500).mul(50).round()),
        Entry("small", torch.randn(20, 30)),
        Entry("tall", torch.randn(50 * rows, 4), torch.rand(50 * rows, 4) < 0.8),
    ]
    result = assert_same(entries[: 2 if scope == "neuron" else 3], scope, Hyperparameters(eta_r=0.2))
    assert result.remaining[0] < rows * 2500


def test_equal_numbers_where_a_count_is_decided_by_the_last_bit():
    """r = d / 4 exactly: what one library's sums make of it, another's may not."""
    for scope in SCOPES:
        for value in (0.3, 1e-5):
            entries = [Entry("w", torch.full((5, 36), value)), Entry("v", torch.full((4, 8), value))]
            for rule in (Hyperparameters(eta_r=1.0), Hyperparameters(0.3, 0.6, eta_r=1.0)):
                assert_same(entries, scope, rule)


@pytest.mark.parametrize("scope", SCOPES)
def test_sums_that_differ_in_the_last_bits_make_no_difference(scope, monkeypatch):
    """Where they might decide about an entry, the CPU's sums are taken."""
    tables, entries = triton_backend.Launches.tables, [Entry("half", torch.full((6, 40), 0.7) * (torch.arange(40) % 2))]
    wanted = prune_step(entries, scope, Hyperparameters(eta_r=1.0))

    def differs(error):
        def disturbed(self, p, q):
            factors = np.array([[1], [1 + error], [1 - error], [1]])
            return {key: table * factors for key, table in tables(self, p, q).items()}

        with monkeypatch.context() as patched:
            patched.setattr(triton_backend.Launches, "tables", disturbed)
            found = prune_step(entries, scope, Hyperparameters(eta_r=1.0), backend=TRITON)
        return any((found.groups[name].c != group.c).any() for name, group in wanted.groups.items())

    assert not differs(9e-14)
    assert not differs(-9e-14)
    monkeypatch.setattr(step, "_undecided", lambda values, rule: set())
    assert differs(9e-14) or differs(-9e-14), "the check is needed"


@pytest.mark.parametrize("scope", SCOPES)
def test_the_same_bits_in_every_run(scope):
    entries = [Entry("w", torch.randn(50, 300)), Entry("v", torch.randn(17, 3, 3, 3))]
    first, again = (triton_backend.Launches(split(entries, scope)).tables(0.3, 1.7).values() for _ in range(2))
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_named_unless_it_is_pruned(dtype, bad):
    weights, mask = torch.ones(5, 4, dtype=dtype), torch.ones(5, 4, dtype=torch.bool)
    weights[3, 1] = bad
    for scope in SCOPES:
        with pytest.raises(ValueError, match="weights must be finite, but b of shape"):
            prune_step([Entry("a", torch.ones(2, 2)), Entry("b", weights)], scope, RULES[0], backend=TRITON)
    mask[3, 1] = False
    assert_same([Entry("b", weights, mask)], "layer", RULES[1])


@pytest.mark.parametrize("scale", [1e-40, 1e-300, 1e300])
@pytest.mark.parametrize("scope", SCOPES)
def test_the_ends_of_the_range(scope, scale):
    dtype = torch.float32 if scale == 1e-40 else torch.float64
    entries = [Entry("w", (torch.randn(9, 40, dtype=torch.float64) * scale).to(dtype))]
    assert entries[0].scores.any()
    for rule in (Hyperparameters(eta_r=0.2), Hyperparameters(1.0, 2.0)):
        assert_same(entries, scope, rule)


def test_measuring_alone():
    entries = [Entry("w", torch.randn(50, 30)), Entry("v", torch.randn(7, 3, 3), torch.rand(7, 3, 3) < 0.5)]
    wanted = power_sums(entries, 0.5, 1.0)
    found = power_sums_on_device(entries)
    for scope in SCOPES:
        for name, index in wanted.index(scope).items():
            np.testing.assert_allclose(found.index(scope)[name], index, rtol=0, atol=1e-13)


def power_sums_on_device(entries):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("torch_sap.decide.sums.backend_of", lambda entries: TRITON)
        return power_sums(entries, 0.5, 1.0)


def on_gpu(pairs):
    """What zeros.restore_zeros_ does with tensors on a GPU."""
    for tensor, mask in zeros_cuda.store_zeros_(list(pairs)):
        tensor.data.view(INTEGER_OF[tensor.dtype]).mul_(mask)


@pytest.fixture
def as_on_gpu(monkeypatch):
    """Take CPU tensors for those of a device where Triton runs."""
    monkeypatch.setattr(step, "backend_of", lambda entries: TRITON)
    monkeypatch.setattr("torch_sap.decide.sums.backend_of", lambda entries: TRITON)
    for module in (zeros, masks, guards):
        monkeypatch.setattr(module, "restore_zeros_", on_gpu)
    monkeypatch.setattr(small, "FEW", 2**60)  # small tensors on a CPU have a way of their own
    monkeypatch.setattr(zeros_cuda, "usable", lambda device: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    zeros_cuda._table.cache_clear()


class Launches(TorchDispatchMode):
    """Counts what a device would be told: kernels, operations that are no views, copies of tables, reads."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.kernels = self.copies = self.waits = 0
        self.operations = []
        run, send, read = triton_backend.run, triton_backend.send, backends._read

        def counted_run(kernel, programs, *arguments, **constants):
            self.kernels += programs > 0
            with _disable_current_modes():  # the interpreter has operations of its own
                run(kernel, programs, *arguments, **constants)

        def counted_send(arrays, device):
            self.copies += 1
            with _disable_current_modes():
                return send(arrays, device)

        def counted_read(tensor):
            self.waits += 1
            with _disable_current_modes():
                return read(tensor)

        for module in (triton_backend, zeros_cuda):
            monkeypatch.setattr(module, "run", counted_run)
            monkeypatch.setattr(module, "send", counted_send)
        monkeypatch.setattr(backends, "_read", counted_read)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returns = function._schema.returns
        view = returns and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        name = function.overloadpacket.__name__
        if not view and not name.startswith(("empty", "new_empty", "promote_types")):
            self.operations.append(name)
        return function(*args, **(kwargs or {}))

    @property
    def total(self):
        return self.kernels + len(self.operations) + self.copies + self.waits


@pytest.mark.parametrize("pruned", [False, True], ids=["first step", "later step"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scope", SCOPES)
def test_launches_and_waits_of_a_step(scope, dtype, pruned, monkeypatch):
    found = []
    for times in (1, 3):
        entries = []
        for kind in ["conv", "transposed", "experts"] * times:
            entry = KINDS[kind]()
            scores = entry.scores[:, :2].to(dtype)
            mask = torch.rand(scores.shape) < 0.6 if pruned else None
            entries.append(replace(entry, name=str(len(entries)), scores=scores, mask=mask))
        with monkeypatch.context() as patched, Launches(patched) as launches:
            prune_step(entries, scope, RULES[1], backend=TRITON)
        found.append((launches.kernels, launches.operations, launches.copies, launches.waits))
    assert found[0] == found[1], "launches grow with the tensors"
    assert launches.total <= (12 if scope == "global" or dtype is not torch.float64 else 15)
    assert launches.waits == (1 if scope == "neuron" else 2)


def test_launches_for_types_of_several_kinds(monkeypatch):
    entries = [Entry(str(dtype), torch.randn(5, 6).to(dtype)) for dtype in DTYPES]
    with monkeypatch.context() as patched, Launches(patched) as launches:
        prune_step(entries, "global", RULES[1], backend=TRITON)
    assert launches.total <= 12


@pytest.mark.parametrize("moving", [False, True], ids=["gradients stay", "new gradients"])
@pytest.mark.usefixtures("as_on_gpu")
def test_launches_of_a_training_step(moving, monkeypatch):
    found = []
    for depth in (3, 12):
        layers = [nn.Linear(8, 8, bias=False) for _ in range(depth)]
        model = nn.Sequential(*layers)
        torch_sap.global_unstructured(model, eta_r=0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        rows = torch.randn(5, 8)
        held = []

        def train(model=model, optimizer=optimizer, held=held, rows=rows):
            held.append([parameter.grad for parameter in model.parameters()])  # so that new ones lie elsewhere
            optimizer.zero_grad(set_to_none=moving)
            model(rows).square().mean().backward()
            optimizer.step()

        for _ in range(2):
            train()
        with monkeypatch.context() as patched:
            launches = Launches(patched)  # our own operations are kernels; those of training are not counted
            train()
        assert_held(model)
        for layer in layers:
            assert not torch.count_nonzero(layer.weight_orig.grad[~layer.weight_mask])
        found.append((launches.kernels, launches.copies, launches.waits))
    assert found[0] == found[1], "launches grow with the tensors"
    assert found[0] == (3, int(moving), 0)


@pytest.mark.usefixtures("as_on_gpu")
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_value_becomes_positive_zero(dtype):
    bad = torch.tensor([float("nan"), float("-inf"), -0.0, 1.0]).to(dtype)
    pairs = []
    for tensor in (
        torch.randn(3, 4, 2, 6),
        torch.randn(3, 4, 2, 6).contiguous(memory_format=torch.channels_last),
        torch.randn(3, 4, 2, 12)[..., ::2],
        torch.randn(70, 80).t(),
        torch.randn(101)[1:].view(4, 25),
        torch.randn(0, 3),
        torch.randn(1, 1),
    ):
        tensor = tensor.to(dtype) if dtype is not torch.float32 else tensor
        mask = torch.rand(tensor.shape) > 0.5
        pairs += [(tensor, torch.empty_like(tensor, dtype=torch.bool).copy_(mask)), (tensor.clone(), mask)]
    kept = [tensor[mask].clone() for tensor, mask in pairs]
    for tensor, mask in pairs:
        tensor[~mask] = bad.repeat(tensor.numel())[: int((~mask).sum())]
    assert len(zeros_cuda.store_zeros_(pairs)) < 4
    on_gpu(pairs)
    for (tensor, mask), own in zip(pairs, kept, strict=True):
        assert torch.equal(tensor[mask], own)
        assert not torch.count_nonzero(tensor[~mask].view(INTEGER_OF[dtype]))


@pytest.mark.usefixtures("as_on_gpu")
def test_a_table_is_not_used_for_other_tensors():
    memory, mask = torch.ones(40), torch.zeros(40, dtype=torch.bool)
    for tensor, of_tensor in (
        (memory[:10], mask[:10]),
        (memory[:10].view(2, 5), mask[10:20].view(2, 5)),
        (memory[:20], mask[:20]),
        (memory.view(torch.float64)[:10], mask[:10]),
        (memory[:20].view(4, 5).t(), mask[:20].view(4, 5).t()),
        (memory[:20].view(5, 4), mask[:20].view(4, 5).t()),
    ):
        memory.fill_(1)
        on_gpu([(tensor, of_tensor)])
        assert not tensor.any()
        assert int(memory.count_nonzero()) == 40 - tensor.numel() * tensor.itemsize // 4


def test_offsets_beyond_32_bits():
    """Of a tensor with more than 2^31 entries the last programs are run, the only ones whose memory exists."""
    kernels, far, size = triton_backend.import_kernels(), 2**31, 100
    tensor, mask = torch.ones(size), torch.arange(size) % 2 == 0
    block = zeros_cuda.BLOCK
    table = np.array([[tensor.data_ptr() - 4 * far, mask.data_ptr() - far, far + size, 4, -(far // block)]])
    sent = triton_backend.send([table, np.zeros(1, np.int32)], torch.device("cpu"))
    triton_backend.run(kernels.store_zeros, 1, *sent, BLOCK=block)
    assert torch.equal(tensor, mask.float())


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_offsets_of_a_step_beyond_32_bits(scope, monkeypatch):
    """The first program is told that it is one of a tensor of more than 2^31 entries."""
    far, block, blocks = 2**31, 2**11, 2**5
    weights, out = torch.randn(400), torch.zeros(400, dtype=torch.bool)
    launches = triton_backend.Launches(split([Entry("w", weights, out=out)], scope))
    table = launches._table([launches._flat_item(Entry("w", weights, out=out), 0)])
    table[0, [0, 2]] -= [4 * far, far]
    table[0, 5], table[0, 17] = far + 400, -(far // (block * blocks))
    wanted = weights.abs().kthvalue(150).values
    bits = int(wanted.view(torch.int32))
    histograms = np.zeros((4, 256), np.int64)
    keys = weights.abs().view(torch.int32).numpy()
    for turn in range(4):
        shift = 8 * (3 - turn)
        inside = keys[(keys >> (shift + 8)) == (bits >> (shift + 8))] if turn else keys
        histograms[turn] = np.bincount((inside >> shift) & 255, minlength=256)
    chosen, groups = np.array([150, 0, 0]), np.zeros(1, np.int64)
    item_of, counts = np.zeros(1, np.int32), np.zeros(2, np.int64)
    sent = triton_backend.send([table, item_of, groups, chosen, histograms, counts], torch.device("cpu"))
    kernels, types = launches._kernels, {**launches._types, "BITS": 8, "BLOCK": block, "STEPS": blocks}
    *given, counted = sent
    third = given[-1].view(4, 256)[3].clone()
    given[-1].view(4, 256)[3] = 0
    triton_backend.run(kernels.narrow, 1, *given, 3, **types)
    assert torch.equal(given[-1].view(4, 256)[3], third)
    triton_backend.run(kernels.write, 1, *given, counted[:1], counted[1:], **types)
    assert torch.equal(out, weights.abs() > wanted)
    assert counted.tolist() == [250, 1]
