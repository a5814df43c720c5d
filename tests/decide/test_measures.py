"""pq_index and gini_index against literal references, and their arguments."""

import math

import numpy as np
import pytest
import reference
import torch

from torch_sap import gini_index, pq_index

P_VALUES = [0.1, 0.3, 0.5, 1.0, 1.5, 1.9]
Q_STEPS = [0.05, 0.5, 1.0, 10.0]


def skewed(count, seed=0):
    """Normal values of very different sizes, some of them zero."""
    generator = np.random.default_rng(seed)
    values = generator.normal(size=count) ** 3
    values[generator.random(count) < 0.1] = 0.0
    return values


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_pq_index_against_mpmath(dtype, scale):
    w = (torch.from_numpy(skewed(61)) * scale).to(dtype)
    for p in P_VALUES:
        for step in Q_STEPS:
            expected = reference.pq_index_mp(w.double().tolist(), p, p + step)
            assert pq_index(w, p, p + step).item() == pytest.approx(expected, rel=0, abs=1e-12), (p, step)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e2])
def test_pq_index_of_half_precision_against_mpmath(scale):
    w = (torch.from_numpy(skewed(61)) * scale).half()
    for p in P_VALUES:
        expected = reference.pq_index_mp(w.double().tolist(), p, p + 1)
        assert pq_index(w, p, p + 1).item() == pytest.approx(expected, rel=0, abs=1e-12)


def test_pq_index_of_many_float32_values_does_not_lose_digits():
    w = torch.from_numpy(skewed(20_000, seed=1)).float()
    expected = reference.pq_index(w.double().tolist(), 0.5, 1.0)
    assert pq_index(w).item() == pytest.approx(expected, rel=0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gini_against_the_plain_formula(dtype):
    w = torch.from_numpy(skewed(200)).to(dtype)
    assert gini_index(w).item() == pytest.approx(reference.gini_index(w.double().tolist()), rel=0, abs=1e-12)


def test_gini_by_hand():
    assert gini_index(torch.tensor([0.0, 0.0, 0.0, 5.0])).item() == pytest.approx(0.75)
    assert gini_index(torch.tensor([2.0, 2.0, 2.0])).item() == pytest.approx(0.0, abs=1e-15)


def test_pq_index_by_hand():
    assert pq_index(torch.tensor([3.0, 3.0, -3.0])).item() == pytest.approx(0.0, abs=1e-15)
    assert pq_index(torch.tensor([0.0, -7.0, 0.0, 0.0])).item() == pytest.approx(1 - 4.0**-1)
    assert pq_index(torch.tensor([1.0, 4.0])).item() == pytest.approx(1 - 9 / (2 * 5))


@pytest.mark.parametrize("measure", [pq_index, gini_index])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_result_is_a_float64_scalar_that_leaves_the_input_alone(measure, dtype):
    w = torch.randn(4, 5).to(dtype).requires_grad_()
    before = w.detach().clone()
    result = measure(w)
    assert result.dtype == torch.float64
    assert result.shape == ()
    assert torch.equal(w.detach(), before)


@pytest.mark.parametrize(
    ("measure", "plain"),
    [(pq_index, lambda values: reference.pq_index(values, 0.5, 1.0)), (gini_index, reference.gini_index)],
)
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
@pytest.mark.parametrize("masked", [False, True])
def test_dim_gives_one_value_for_each_slice(measure, plain, dim, masked):
    w = torch.randn(3, 4, 5)
    mask = torch.rand(3, 4, 5) < 0.6 if masked else torch.ones(3, 4, 5, dtype=torch.bool)
    result = measure(w, dim=dim, mask=mask if masked else None)
    values = w.movedim(dim, -1).reshape(-1, w.shape[dim])
    kept = mask.movedim(dim, -1).reshape(-1, w.shape[dim])
    expected = [plain(row[keep].double().tolist()) for row, keep in zip(values, kept, strict=True)]
    shape = [size for axis, size in enumerate(w.shape) if axis != dim % 3]
    assert list(result.shape) == shape
    assert result.dtype == torch.float64
    np.testing.assert_allclose(result.reshape(-1).numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("measure", [pq_index, gini_index])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32, torch.uint8])
def test_mask_removes_entries_and_unpruned_zeros_count(measure, mask_dtype):
    w = torch.tensor([[1.0, 0.0, -3.0], [100.0, 2.0, 0.0]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 0]]).to(mask_dtype)
    assert measure(w, mask=mask).item() == pytest.approx(measure(torch.tensor([1.0, 0.0, -3.0, 2.0])).item(), abs=1e-14)
    assert measure(w, mask=mask).item() != pytest.approx(measure(w).item(), abs=1e-3)


@pytest.mark.parametrize("measure", [pq_index, gini_index])
def test_all_zero_and_empty_are_nan(measure):
    assert math.isnan(measure(torch.zeros(5)).item())
    assert math.isnan(measure(torch.empty(0)).item())
    assert math.isnan(measure(torch.ones(5), mask=torch.zeros(5, dtype=torch.bool)).item())
    assert math.isnan(measure(torch.tensor([1.0, 0.0]), mask=torch.tensor([False, True])).item())


@pytest.mark.parametrize("measure", [pq_index, gini_index])
def test_only_the_undefined_rows_are_nan(measure):
    w = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 4.0]])
    mask = torch.tensor([[True, True], [True, True], [False, False]])
    assert torch.isnan(measure(w, dim=1, mask=mask)).tolist() == [False, True, True]


@pytest.mark.parametrize("measure", [pq_index, gini_index])
def test_memory_format_does_not_matter(measure):
    w = torch.randn(4, 3, 5, 5)
    assert measure(w.to(memory_format=torch.channels_last)).item() == pytest.approx(measure(w).item(), abs=1e-14)
    assert measure(w[:, :, ::2]).item() == pytest.approx(measure(w[:, :, ::2].clone()).item(), abs=1e-14)


@pytest.mark.parametrize("measure", [pq_index, gini_index])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_tensors_without_real_magnitudes_are_refused(measure, dtype):
    with pytest.raises(TypeError, match=str(dtype).removeprefix("torch.")):
        measure(torch.ones(3).to(dtype))


def test_a_row_does_not_depend_on_the_rows_beside_it():
    w = torch.randn(5, 9001)
    together = pq_index(w, dim=1)
    alone = torch.cat([pq_index(row[None], dim=1) for row in w])
    assert torch.equal(together, alone)
