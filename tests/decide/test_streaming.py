"""Groups that are not in memory as a whole."""

import numpy as np
import pytest
import torch

from torch_sap import pq_index, prune_count
from torch_sap.decide.bounds import FixedRatio, Hyperparameters
from torch_sap.decide.groups import Entry
from torch_sap.decide.step import prune_step
from torch_sap.decide.streaming import prune_stream


@pytest.mark.parametrize(
    "rule", [Hyperparameters(), Hyperparameters(1.0, 2.0, eta_r=0.2), FixedRatio(ratio=0.9)], ids=str
)
@pytest.mark.parametrize(
    "dtypes", [[torch.float32], [torch.bfloat16], [torch.float16, torch.float32, torch.float64]], ids=str
)
def test_a_stream_gives_what_memory_gives(rule, dtypes):
    shapes = [(7, 3), (0, 2), (40, 50), (3, 3, 5, 5)]
    tensors = [(torch.randn(shape) * 2).round(decimals=1).to(dtypes[i % len(dtypes)]) for i, shape in enumerate(shapes)]
    tensors.append(torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last))
    values, masks = prune_stream(lambda: iter(tensors), rule)
    expected = prune_step([Entry(str(i), tensor) for i, tensor in enumerate(tensors)], "global", rule)
    for name in ("d", "c", "index", "r"):
        np.testing.assert_allclose(getattr(values, name), getattr(expected.groups["global"], name), rtol=1e-14)
    for mask, wanted in zip(masks, expected.masks, strict=True):
        torch.testing.assert_close(mask, wanted)


def test_nothing_to_prune():
    values, masks = prune_stream(lambda: iter([torch.zeros(3), torch.zeros(2, 2)]), Hyperparameters())
    assert values.c.tolist() == [0]
    assert np.isnan(values.index).all()
    assert all(mask.all() for mask in masks)
    values, masks = prune_stream(lambda: iter([]), Hyperparameters())
    assert (values.d.tolist(), values.c.tolist(), list(masks)) == ([0], [0], [])


def test_bad_tensors_are_named():
    with pytest.raises(ValueError, match="tensor 1 of the stream must be finite"):
        prune_stream(lambda: iter([torch.ones(3), torch.tensor([1.0, float("nan")])]), Hyperparameters())
    with pytest.raises(TypeError, match="tensor 0 of the stream must be a real floating-point tensor"):
        prune_stream(lambda: iter([torch.ones(3, dtype=torch.int64)]), Hyperparameters())


@pytest.mark.slow
def test_three_billion_entries():
    """180 times the same 2 ** 24 entries: the PQ Index of clones is that of one, and every magnitude is a tie."""
    times, one = 180, torch.randn(2**24) * 0.02
    values, masks = prune_stream(lambda: (one for _ in range(times)), Hyperparameters())
    d = times * one.numel()
    assert values.d.tolist() == [d]
    assert d > 2**31
    index = pq_index(one).item()
    assert abs(values.index[0] - index) < 1e-13
    assert abs(int(values.c[0]) - prune_count(index, d)) <= 1
    whole, left = divmod(int(values.c[0]), times)
    last = one.abs().kthvalue(whole + (left > 0)).values
    below, ties = int((one.abs() < last).sum()), one.abs() == last
    left = int(values.c[0]) - times * below
    larger = one.abs() > last
    for mask in masks:
        goes = min(left, int(ties.sum()))
        expected = larger | (ties & (ties.cumsum(0) > goes))
        assert torch.equal(mask, expected)
        left -= goes
    assert left == 0
