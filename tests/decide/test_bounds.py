"""retention_bound and prune_count against the literal formulas, and Theorem 2."""

import itertools
import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_sap import pq_index, prune_count, retention_bound

INDICES = [0.0, 1e-9, 0.1, 0.33, 0.5, 0.77, 0.95]
SIZES = [1, 2, 7, 100, 4096, 10**9]
ETAS = [0.0, 0.01, 1.0, 5.0]
GAMMAS = [0.5, 1.0, 3.0]
BETAS = [0.2, 0.7, 0.9, 1.0]


@pytest.mark.parametrize("pair", reference.PQ_PAIRS)
@pytest.mark.parametrize("eta_r", ETAS)
def test_retention_bound_is_the_formula(pair, eta_r):
    p, q = pair
    for index, d in itertools.product(INDICES, SIZES):
        expected = reference.retention_bound(index, d, p, q, eta_r)
        assert retention_bound(index, d, p=p, q=q, eta_r=eta_r) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("pair", reference.PQ_PAIRS)
@pytest.mark.parametrize("eta_r", ETAS)
def test_prune_count_is_the_formula(pair, eta_r):
    p, q = pair
    for index, d, gamma, beta in itertools.product(INDICES, SIZES, GAMMAS, BETAS):
        expected = reference.prune_count(index, d, p, q, eta_r, gamma, beta)
        assert prune_count(index, d, p=p, q=q, eta_r=eta_r, gamma=gamma, beta=beta) == expected, (index, d, gamma, beta)


def test_defaults():
    assert retention_bound(0.5, 100) == pytest.approx(100 * 0.5)
    assert prune_count(0.5, 100) == 50
    assert prune_count(0.999, 100) == 90


def test_rounding_is_done_on_the_difference():
    """floor(d - r), where floor(d * (1 - r / d)) loses one."""
    lost = 0
    for d, kept in itertools.product(range(2, 60), range(1, 59)):
        if kept >= d:
            continue
        index = 1 - kept / d
        r = retention_bound(index, d)
        expected = math.floor(min(1.0 * (d - r), 1.0 * d))
        assert prune_count(index, d, beta=1.0) == expected
        lost += expected != math.floor(d * (1 - r / d))
    assert lost > 100


def test_floats_in_floats_out_and_arrays_in_arrays_out():
    assert isinstance(retention_bound(0.2, 10), float)
    assert isinstance(prune_count(0.2, 10), int)
    index, d = np.array([0.1, np.nan, 0.5, 0.9]), np.array([10, 10, 0, 1000])
    r, c = retention_bound(index, d), prune_count(index, d)
    assert isinstance(r, np.ndarray)
    assert isinstance(c, np.ndarray)
    assert (r.dtype, c.dtype) == (np.float64, np.int64)
    assert c.tolist() == [1, 0, 0, 900]
    assert r[0] == pytest.approx(9)
    assert r[3] == pytest.approx(100)


def test_tensors_in_tensors_out():
    index, d = torch.tensor([0.1, math.nan, 0.5, 0.9], dtype=torch.float64), torch.tensor([10, 10, 0, 1000])
    r, c = retention_bound(index, d), prune_count(index, d)
    assert (r.dtype, c.dtype) == (torch.float64, torch.int64)
    assert c.tolist() == [1, 0, 0, 900]
    assert r[[0, 3]].tolist() == pytest.approx([9, 100])


def test_scalar_size_with_many_indices():
    assert prune_count(torch.tensor([0.25, 0.5], dtype=torch.float64), 100).tolist() == [25, 50]
    assert prune_count(np.array([0.25, 0.5]), 100).tolist() == [25, 50]


@pytest.mark.parametrize("index", [math.nan, torch.tensor(math.nan, dtype=torch.float64), np.float64(math.nan)])
def test_undefined_index_prunes_nothing(index):
    assert prune_count(index, 10) == 0
    assert math.isnan(retention_bound(index, 10))


def test_nothing_is_pruned_from_nothing_or_from_equal_values():
    assert prune_count(0.5, 0) == 0
    assert prune_count(math.nan, 0) == 0
    assert prune_count(0.0, 1000, gamma=7.0) == 0
    assert prune_count(-1e-16, 1000) == 0


def test_a_pq_index_goes_in_as_it_comes_out():
    w = torch.randn(1000)
    index = pq_index(w)
    expected = reference.prune_count(reference.pq_index(w.double().tolist(), 0.5, 1.0), 1000, 0.5, 1.0, 0.0, 1.0, 0.9)
    assert int(prune_count(index, w.numel())) == expected
    assert 0 < expected < 900


@given(
    w=st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1e3)), min_size=1, max_size=30).filter(any),
    place=st.integers(0, 29),
    p=st.floats(0.1, 1.9),
    step=st.floats(0.2, 3),
)
def test_theorem_2(w, place, p, step):
    q, d = p + step, len(w)
    r = place % d + 1
    powers = sorted((value**p for value in w), reverse=True)
    eta_r = math.fsum(powers[r:]) / math.fsum(powers[:r])
    index = pq_index(torch.tensor(w, dtype=torch.float64), p, q).item()
    assert retention_bound(index, d, p=p, q=q, eta_r=eta_r) <= r * (1 + 1e-9)


@given(index=st.floats(0, 0.999), d=st.integers(0, 10**7), gamma=st.floats(0.1, 9), beta=st.floats(0.01, 1))
def test_count_stays_between_nothing_and_beta(index, d, gamma, beta):
    assert 0 <= prune_count(index, d, gamma=gamma, beta=beta) <= beta * d


@pytest.mark.parametrize(("p", "q"), [(0.5, 1.0), (1.0, 2.0), (0.3, 2.5)])
def test_the_bound_is_the_effective_number_of_weights(p, q):
    """docs/maths.md explains r by this: d cancels, zeros and scale do not matter, equal weights all count."""
    w = torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def bound(w):
        return retention_bound(float(pq_index(w, p=p, q=q)), len(w), p=p, q=q)

    ratio = torch.linalg.vector_norm(w, p) / torch.linalg.vector_norm(w, q)
    assert bound(w) == pytest.approx(float(ratio) ** (p * q / (q - p)), rel=1e-12)
    if (p, q) == (0.5, 1.0):
        assert bound(w) == pytest.approx(float(w.abs().sqrt().sum() ** 2 / w.abs().sum()), rel=1e-12)
    if (p, q) == (1.0, 2.0):
        assert bound(w) == pytest.approx(float(w.abs().sum() ** 2 / w.square().sum()), rel=1e-12)
    assert bound(torch.cat([w * -7, torch.zeros(300)])) == pytest.approx(bound(w), rel=1e-12)
    assert bound(torch.full((40,), 3.0, dtype=torch.float64)) == pytest.approx(40, rel=1e-12)
    assert bound(torch.eye(1, 30, dtype=torch.float64)[0]) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize(("p", "q", "kept"), [(0.5, 1.0, 0.85), (1.0, 2.0, 0.64)])
def test_how_much_of_normal_weights_counts(p, q, kept):
    w = torch.randn(10**6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert retention_bound(float(pq_index(w, p=p, q=q)), len(w), p=p, q=q) / len(w) == pytest.approx(kept, abs=0.005)
