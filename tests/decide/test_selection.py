"""The exact selection against sorting, for every chunk size and both ways of computing."""

import pytest
import torch

from torch_sap.decide import exact, keys
from torch_sap.decide.bounds import Hyperparameters
from torch_sap.decide.groups import Entry, split
from torch_sap.decide.measures import measure_groups
from torch_sap.decide.step import prune_step

RULE = Hyperparameters(p=1.0, q=2.0, gamma=3.0)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(params=[7, 64, 2**17], ids="chunk{}".format)
def chunk(request, monkeypatch):
    """Work in small pieces, and let the first guess on the host see few entries so that it is wrong at times."""
    monkeypatch.setattr(keys, "HOST_CHUNK", request.param)
    monkeypatch.setattr(keys, "DEVICE_CHUNK", request.param)
    monkeypatch.setattr(exact, "SAMPLE", 50 if request.param < 100 else 2**16)
    monkeypatch.setattr(exact, "MOST_COLLECTED", request.param // 3)


def expected_masks(scores, masks, count):
    """Literal: sort (magnitude, tensor, flat index) of the unpruned entries and drop the first ones."""
    ranked = sorted(
        (magnitude, tensor, index)
        for tensor, (score, mask) in enumerate(zip(scores, masks, strict=True))
        for index, (magnitude, keep) in enumerate(
            zip(score.double().abs().reshape(-1).tolist(), mask.reshape(-1).tolist(), strict=True)
        )
        if keep
    )
    kept = [mask.reshape(-1).clone() for mask in masks]
    for _, tensor, index in ranked[:count]:
        kept[tensor][index] = False
    return [mask.view(score.shape) for mask, score in zip(kept, scores, strict=True)]


def random_group(seed):
    """Some 4-d tensors of mixed types, with equal values, zeros, masks and channels_last memory in some of them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high, size=()):
        return torch.randint(1, high, size, generator=generator)

    scores, masks = [], []
    for _ in range(int(draw(4))):
        score = torch.randn(draw(6, (4,)).tolist(), generator=generator)
        if seed % 3 == 0:
            score = (2 * score).round() / 2
        if seed % 7 == 0:
            score = torch.ones_like(score)
        score = score.to(DTYPES[int(draw(5)) - 1])
        if seed % 2:
            score = score.contiguous(memory_format=torch.channels_last)
        scores.append(score)
        masks.append(torch.rand(score.shape, generator=generator) >= 0.3 * (seed % 4))
    return scores, masks


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("seed", range(24))
def test_keep_largest_is_sorting(seed, on_host):
    scores, masks = random_group(seed)
    unpruned = int(sum(mask.sum() for mask in masks))
    total = sum(score.numel() for score in scores)
    for count in sorted({1, unpruned // 3, unpruned // 2, unpruned} - {0}):
        if unpruned == 0:
            continue
        tensors = list(zip(scores, masks, strict=True))
        kept = exact.keep_largest(tensors, count, total - unpruned, on_host=on_host)
        for mask, expected in zip(kept, expected_masks(scores, masks, count), strict=True):
            torch.testing.assert_close(mask, expected)


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [True, False])
def test_rows_are_sorting(dtype, on_host, masked, monkeypatch):
    for levels, most, long_row in ((1, 1.0, 99), (3, 1.0, 1), (1000, 1.0, 1), (3, 0.2, 1), (1000, 0.2, 1), (1, 0.0, 1)):
        monkeypatch.setattr(exact, "LONG_ROW", long_row)
        rows = (torch.randn(9, 17) * levels).round().to(dtype)
        mask = torch.rand(9, 17) > 0.3 * most if masked else torch.ones(9, 17, dtype=torch.bool)
        unpruned = mask.sum(1)
        counts = (most * torch.rand(9) * (unpruned + 1)).long().clamp_max(unpruned)
        kept = torch.empty(9, 17, dtype=torch.bool)
        given = [kept, rows, mask if masked else None, counts, unpruned]
        if on_host:
            given = [None if tensor is None else keys.as_array(tensor) for tensor in given]
        given[1] = keys.keys_of(given[1], None, dtype, on_host=on_host)
        exact.keep_largest_in_rows(*given, on_host=on_host)
        for row, row_mask, count, found in zip(rows, mask, counts.tolist(), kept, strict=True):
            torch.testing.assert_close(found, expected_masks([row], [row_mask], count)[0])


def test_a_wrong_guess_is_mended(monkeypatch):
    scores = torch.randn(5000)
    monkeypatch.setattr(exact, "_guess", lambda *args: (3, 4))
    (mask,) = exact.keep_largest([(scores, None)], 1234, 0, on_host=True)
    threshold = scores.abs().sort().values[1234]
    torch.testing.assert_close(mask, scores.abs() >= threshold)


def test_scores_with_gaps_or_overlaps():
    scores = torch.randn(6, 10)[:, ::2]
    expanded = torch.randn(1, 5).expand(6, 5)
    masks = [torch.ones(6, 5, dtype=torch.bool)] * 2
    kept = exact.keep_largest([(scores, None), (expanded, None)], 20, 0, on_host=True)
    for mask, expected in zip(kept, expected_masks([scores, expanded], masks, 20), strict=True):
        torch.testing.assert_close(mask, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=["rows", "channels_last"])
def test_masks_of_rows_that_come_with_the_sums(dtype, masked, format, chunk, monkeypatch):
    """They are those that are made for counts that nobody expected, in rows that span several scales too."""
    scale = 1e200 if dtype is torch.float64 else 1.0  # sums overflow, and are made anew of smaller numbers
    scores = (torch.randn(12, 3, 5, 5, dtype=torch.float64) * scale).to(dtype).to(memory_format=format)
    mask = torch.rand(scores.shape) > 0.4 if masked else None
    (group,) = split([Entry("w", scores, mask)], "neuron")
    group.expect(RULE)
    ((d, index),) = measure_groups([group], 1.0, 2.0)
    counts, prepared = RULE.count(index, d), group.keep
    (keep,) = group.masks(counts, d)
    assert keep is prepared
    (other,) = split([Entry("w", scores, mask)], "neuron")
    other.expect(Hyperparameters(p=1.0, q=2.0, gamma=0.5))
    measure_groups([other], 1.0, 2.0)
    (anew,) = other.masks(counts, d)
    torch.testing.assert_close(keep, anew)
    assert [int(row.sum()) for row in keep] == (d - counts).tolist()


@pytest.mark.parametrize("shape", [(4, 0), (0, 4), (4, 0, 3, 3), (1, 1)], ids=str)
def test_rows_without_entries(shape):
    entries = [Entry("w", torch.ones(shape)), Entry("more", torch.randn(5, 9))]
    masks, values = prune_step(entries, "neuron", RULE)
    assert values["w"].c.tolist() == [0] * shape[0]
    assert masks[0] is None
    assert values["more"].c.sum() == 45 - masks[1].sum()
