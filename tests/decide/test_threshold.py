"""The exact search against sorting, with both backends, in pieces of every size."""

import numpy as np
import pytest
import torch

from torch_sap.decide import threshold
from torch_sap.decide.backends import NUMPY, TORCH, NumPy, Torch
from torch_sap.decide.bounds import FixedRatio, Hyperparameters
from torch_sap.decide.groups import Entry, split
from torch_sap.decide.keys import key_bits
from torch_sap.decide.step import prune_step, zero_step

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SCOPES = ["global", "layer", "neuron"]
RULE = Hyperparameters(p=1.0, q=2.0, gamma=3.0)
backends = pytest.mark.parametrize("backend", [NUMPY, TORCH], ids=["numpy", "torch"])


class Ratio(FixedRatio):
    """A share of every group, of those of zeros too."""

    def count(self, index, d):
        return np.rint(self.ratio * np.asarray(d)).astype(np.int64)


def expected_mask(scores, mask, count):
    """Literal: sort (magnitude, index) of the unpruned entries of some tensors and drop the first ones."""
    ranked = sorted(
        (magnitude, tensor, index)
        for tensor, (score, of_tensor) in enumerate(zip(scores, mask, strict=True))
        for index, (magnitude, keep) in enumerate(
            zip(score.double().abs().reshape(-1).tolist(), of_tensor.reshape(-1).tolist(), strict=True)
        )
        if keep
    )
    kept = [of_tensor.reshape(-1).clone() for of_tensor in mask]
    for _, tensor, index in ranked[:count]:
        kept[tensor][index] = False
    return [found.view(score.shape) for found, score in zip(kept, scores, strict=True)]


def expected_masks(entries, scope, ratio):
    masks = [torch.ones_like(e.scores, dtype=torch.bool) if e.mask is None else e.mask for e in entries]
    if scope == "global":
        return expected_mask([e.scores for e in entries], masks, round(ratio * sum(int(m.sum()) for m in masks)))
    if scope == "layer":
        return [
            expected_mask([e.scores], [m], round(ratio * int(m.sum())))[0] for e, m in zip(entries, masks, strict=True)
        ]
    found = [mask.clone() for mask in masks]
    for entry, mask, out in zip(entries, masks, found, strict=True):
        for scores, keep, target in zip(*(entry.rows(t) for t in (entry.scores, mask, out)), strict=True):
            for row, keep_row, target_row in zip(scores, keep, target, strict=True):
                target_row.copy_(expected_mask([row], [keep_row], round(ratio * int(keep_row.sum())))[0])
    return found


def random_entries(seed):
    """Some 4-d tensors of mixed types: equal values, zeros, masks, channels_last memory, rows in dimension 1."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high, size=()):
        return torch.randint(1, high, size, generator=generator)

    entries = []
    for number in range(int(draw(4))):
        score = torch.randn(draw(6, (4,)).mul(torch.tensor([2, 1, 1, 1])).tolist(), generator=generator)
        if seed % 3 == 0:
            score = (2 * score).round() / 2
        if seed % 7 == 0:
            score = torch.ones_like(score)
        score = score.to(DTYPES[int(draw(5)) - 1])
        if seed % 2:
            score = score.contiguous(memory_format=torch.channels_last)
        mask = torch.rand(score.shape, generator=generator) >= 0.3 * (seed % 4) if seed % 4 else None
        rows = int(draw(4))
        entries.append(Entry(str(number), score, mask, "weights", int(rows > 1), 2 if rows > 2 else 1))
    return entries


@pytest.fixture(params=[64, 4096, None], ids="pieces of {}".format)
def small_pieces(request, monkeypatch):
    """Small pieces (not below a block of sums), and windows that see few entries, so that they are wrong at times."""
    if request.param is not None:
        for backend in (NumPy, Torch):
            monkeypatch.setattr(backend, "chunk", request.param)
        monkeypatch.setattr(threshold, "WORTHWHILE", 8)
        monkeypatch.setattr(threshold, "SAMPLE", (16, 16))
        monkeypatch.setattr(threshold, "MOST_KEPT", 20)


@backends
@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("seed", range(14))
def test_masks_are_those_of_sorting(seed, scope, backend):
    entries = random_entries(seed)
    for ratio in (0.0, 0.2, 0.6, 1.0):
        found = prune_step(entries, scope, Ratio(ratio=ratio), backend=backend)
        expected = expected_masks(entries, scope, ratio)
        for entry, mask, wanted, remaining in zip(entries, found.masks, expected, found.remaining, strict=True):
            mask = torch.ones_like(wanted) if mask is None else mask
            torch.testing.assert_close(mask, wanted, msg=lambda m, e=entry, r=ratio: f"{e.name} {e.shape} {r}: {m}")
            assert remaining == int(wanted.sum())


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_in_place_are_those_of_the_masks(scope, dtype):
    weights = [
        torch.randn(40, 30).mul(3).round().to(dtype),
        torch.randn(7, 4, 3, 3).to(dtype),
        torch.zeros(3, 5).to(dtype),
    ]
    weights[0][weights[0] == 0] = -0.0
    expected = prune_step([Entry(str(i), w) for i, w in enumerate(weights)], scope, RULE)
    copies = [w.clone() for w in weights]
    groups, _, remaining = zero_step([Entry(str(i), w) for i, w in enumerate(copies)], scope, RULE)
    assert remaining == expected.remaining
    for name, group in groups.items():
        np.testing.assert_array_equal(group.c, expected.groups[name].c)
    for weight, copy, mask in zip(weights, copies, expected.masks, strict=True):
        kept = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
        assert torch.equal(copy, torch.where(kept, weight, 0))
        assert not torch.signbit(copy[~kept]).any()


@pytest.mark.parametrize("long_row", [1, 99])
@backends
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_kth_is_sorting(dtype, backend, long_row, monkeypatch):
    monkeypatch.setattr("torch_sap.decide.backends.LONG_ROW", long_row)
    keys = torch.randint(0, 9, (6, 20), dtype=dtype)
    for ranks in ([0, 1, 2, 5, 9, 20], [0, 1, 2, 2, 1, 0]):
        given = backend.view(keys.clone())
        key, smaller = backend.kth(given, backend.numbers(np.array(ranks), given))
        for row, rank, k, s in zip(keys, ranks, np.asarray(key)[:, 0], np.asarray(smaller)[:, 0], strict=True):
            assert k == (row.sort().values[rank - 1] if rank else -1)
            assert s == (row < int(k)).sum()


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_narrowing_finds_a_key_by_counting(dtype, backend):
    scores = torch.randn(5000).mul(20).round().div(8).to(dtype)
    mask = torch.rand(5000) > 0.2
    ordered = scores[mask].double().abs().sort().values

    def histogram(low, shift):
        keys = backend.keys(backend.view(scores), backend.view(mask), dtype)
        return backend.histogram(keys, backend.view(mask), low, shift)

    for rank in (1, 17, 1000, len(ordered)):
        key, below, equal = threshold.narrow(histogram, rank, key_bits(dtype), backend.bin_bits)
        magnitude = key.to({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]).view(dtype).double()
        assert magnitude == ordered[rank - 1]
        assert below == (ordered < magnitude).sum()
        assert equal == (ordered == magnitude).sum()


@pytest.fixture
def windows(monkeypatch):
    """The windows of each call, and the cuts that were found without a pass of their own."""
    found = []
    real = threshold.expected_window
    monkeypatch.setattr("torch_sap.decide.step.expected_window", lambda *a: found.append(real(*a)) or found[-1])
    return found


@pytest.fixture
def searches(monkeypatch):
    """Calls of the search by counting."""
    calls, real = [], threshold.narrow
    monkeypatch.setattr(threshold, "narrow", lambda *a: calls.append(1) or real(*a))
    return calls


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", [Hyperparameters(), RULE, FixedRatio(ratio=0.3)], ids=str)
def test_the_window_holds_for_ordinary_weights(rule, dtype, windows, searches):
    weights = (0.02 * torch.randn(3000, 300)).to(dtype)
    mask = torch.rand(3000, 300) > 0.6
    prune_step([Entry("a", weights), Entry("b", weights[:2000], mask[:2000])], "global", rule)
    assert windows[0] is not None
    assert not searches


def test_equal_weights_are_left_to_the_search_by_counting(windows, searches):
    found = prune_step([Entry("a", torch.ones(800_000))], "global", FixedRatio(ratio=0.3))
    assert windows[0] is not None
    assert searches
    assert not found.masks[0][:240_000].any()
    assert found.masks[0][240_000:].all()


@pytest.mark.parametrize("wrong", [(1, 2), (2**30, 2**30 + 1)])
def test_a_wrong_window_changes_nothing(wrong, searches, monkeypatch):
    weights = torch.randn(600_000)
    expected = prune_step([Entry("a", weights)], "global", Hyperparameters())
    searches.clear()
    monkeypatch.setattr("torch_sap.decide.step.expected_window", lambda *_: threshold.Window(*wrong))
    again = prune_step([Entry("a", weights)], "global", Hyperparameters())
    assert searches
    assert torch.equal(expected.masks[0], again.masks[0])


def test_no_window_where_nothing_goes_or_zeros_go(windows, monkeypatch):
    monkeypatch.setattr(threshold, "WORTHWHILE", 0)
    for weights in (torch.zeros(100), torch.ones(100), torch.cat([torch.zeros(60), torch.ones(40)])):
        prune_step([Entry("a", weights)], "global", Hyperparameters())
    assert windows == [None] * 3


@pytest.mark.parametrize("size", [3, 5000, 300_000])
def test_a_sample_is_of_unpruned_entries_zeros_among_them(size):
    scores, mask = torch.ones(size), torch.zeros(size, dtype=torch.bool)
    mask[::2] = True
    scores[::4] = 0
    sample = threshold._sample(split([Entry("a", scores, mask)], "global")[0])
    zeros = np.count_nonzero(sample == 0)
    assert len(sample) >= min(size, 2**11) / 2
    assert abs(zeros - len(sample) / 2) <= 1
    assert set(sample[sample > 0]) <= {torch.ones(1).view(torch.int32).item()}


@backends
def test_scores_with_gaps_or_overlaps(backend):
    entries = [Entry("a", torch.randn(6, 10)[:, ::2]), Entry("b", torch.randn(1, 5).expand(6, 5))]
    found = prune_step(entries, "global", Ratio(ratio=1 / 3), backend=backend)
    for mask, expected in zip(found.masks, expected_masks(entries, "global", 1 / 3), strict=True):
        torch.testing.assert_close(mask, expected)


@backends
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0, 2)])
@pytest.mark.parametrize("scope", SCOPES)
def test_tensors_without_entries(shape, scope, backend):
    found = prune_step([Entry("a", torch.zeros(shape)), Entry("b", torch.randn(9, 9))], scope, RULE, backend=backend)
    assert found.masks[0] is None or found.masks[0].shape == shape
    assert found.remaining[0] == 0


@pytest.mark.parametrize("scale", [1e200, 1e-200], ids=["overflow", "underflow"])
@pytest.mark.parametrize("scope", SCOPES)
def test_rows_and_tensors_whose_sums_leave_the_range(scope, scale):
    weights = torch.randn(12, 3, 5, 5, dtype=torch.float64)
    expected = prune_step([Entry("w", weights)], scope, RULE)
    found = prune_step([Entry("w", weights * scale)], scope, RULE)
    for name, group in found.groups.items():
        np.testing.assert_allclose(group.index, expected.groups[name].index, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(group.c, expected.groups[name].c)
    assert torch.equal(found.masks[0], expected.masks[0])
