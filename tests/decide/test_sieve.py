"""The guess that saves passes: never a wrong mask, seldom a wrong guess."""

import numpy as np
import pytest
import torch
from test_selection import DTYPES, expected_masks, random_group

from torch_sap.decide import groups, sieve
from torch_sap.decide.bounds import FixedRatio, Hyperparameters
from torch_sap.decide.groups import Entry, Pool
from torch_sap.decide.step import prune_step
from torch_sap.decide.threads import run_jobs

RULES = [Hyperparameters(), Hyperparameters(1.0, 2.0), Hyperparameters(eta_r=0.5), FixedRatio(ratio=0.2)]


@pytest.fixture
def finished(monkeypatch):
    """Whether the guess held, for each group that had one."""
    results = []
    finish = sieve.Sieve.finish

    def record(*args):
        masks = finish(*args)
        results.append(masks is not None)
        return masks

    monkeypatch.setattr(sieve.Sieve, "finish", record)
    return results


@pytest.mark.parametrize("sample", [(11, 11), (2**12, 2**17)])
@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_masks_are_those_of_sorting(rule, seed, sample, monkeypatch):
    """A small sample is wrong at times; then the exact selection does the work."""
    monkeypatch.setattr(sieve, "SAMPLE", sample)
    monkeypatch.setattr(sieve, "WORTHWHILE", 0)
    scores, masks = random_group(seed)
    found = prune_step([Entry(str(i), *both) for i, both in enumerate(zip(scores, masks, strict=True))], "global", rule)
    expected = expected_masks(scores, masks, int(found.groups["global"].c[0]))
    for mask, wanted in zip(found.masks, expected, strict=True):
        torch.testing.assert_close(mask, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_guess_holds_for_ordinary_weights(rule, dtype, finished):
    weights = (0.02 * torch.randn(300, 1000)).to(dtype)
    mask = torch.rand(300, 1000) > 0.6
    prune_step([Entry("a", weights), Entry("b", weights[:200], mask[:200])], "global", rule)
    assert finished == [True]


def test_equal_weights_are_left_to_the_exact_selection(finished):
    found = prune_step([Entry("a", torch.ones(80_000))], "global", FixedRatio(ratio=0.3))
    assert finished == [False]
    assert not found.masks[0][:24_000].any()
    assert found.masks[0][24_000:].all()


def test_no_guess_where_nothing_goes_or_zeros_go(finished, monkeypatch):
    monkeypatch.setattr(sieve, "WORTHWHILE", 0)
    for weights in (torch.zeros(100), torch.ones(100), torch.cat([torch.zeros(60), torch.ones(40)])):
        prune_step([Entry("a", weights)], "global", Hyperparameters())
    assert finished == []


@pytest.mark.parametrize("wrong", [(1, 2), (2**30, 2**30 + 1)])
def test_a_wrong_guess_changes_nothing(wrong, finished, monkeypatch):
    weights = torch.randn(5000)
    expected = prune_step([Entry("a", weights)], "global", Hyperparameters())
    monkeypatch.setattr(groups, "expect", lambda tensors, *_: sieve.Sieve(tensors, *wrong))
    again = prune_step([Entry("a", weights)], "global", Hyperparameters())
    assert finished == [False]
    assert torch.equal(expected.masks[0], again.masks[0])


def test_sums_do_not_depend_on_the_sieve():
    entries = [Entry("a", torch.randn(100_000)), Entry("b", torch.randn(70, 3))]
    plain, sieving = Pool("a", entries), Pool("b", entries)
    sieving.expect(Hyperparameters())
    jobs = [pool.sums((0.5, 1.0), 1.0) for pool in (plain, sieving)]
    for one, other in zip(*run_jobs(jobs, on_host=True), strict=True):
        np.testing.assert_array_equal(one, other)
    assert plain.sieve is None
    assert sieving.sieve is not None


@pytest.mark.parametrize("size", [0, 3, 5000, 300_000])
def test_a_sample_is_of_unpruned_entries_zeros_among_them(size):
    scores, mask = torch.ones(size), torch.zeros(size, dtype=torch.bool)
    mask[::2] = True
    scores[::4] = 0
    sample = sieve._sample([(scores, mask)], torch.float32)
    zeros = np.count_nonzero(sample == 0)
    assert len(sample) >= min(size, 2**11) / 2
    assert abs(zeros - len(sample) / 2) <= 1
    assert set(sample[sample > 0]) <= {torch.ones(1).view(torch.int32).item()}
