"""The fit, against costs that are known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lgcnet_fast.latency.regression import fit_costs, nonnegative_solution, spearman


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def test_costs_that_the_sums_determine_are_found(generator):
    costs = generator.uniform(0.1, 10, 12)
    counts = generator.integers(0, 4, (200, 12)).astype(float)
    fitted = fit_costs(counts, counts @ costs, np.ones(12))
    np.testing.assert_allclose(fitted.costs, costs, rtol=0.01)


def test_what_the_sums_leave_open_follows_the_prior(generator):
    """Two costs always occur together: their sum is known, the split is the prior's."""
    counts = generator.integers(0, 4, (100, 3)).astype(float)
    counts = np.concatenate((counts, np.ones((100, 2))), axis=1)
    costs = np.array([1.0, 2.0, 3.0, 4.0, 8.0])
    fitted = fit_costs(counts, counts @ costs, np.array([1.0, 2.0, 3.0, 1.0, 3.0]))
    assert fitted.costs[3:].sum() == pytest.approx(12, rel=0.02)
    # Each part's share of the correction grows with the square of its prior.
    assert fitted.costs[4] > 2.5 * fitted.costs[3]
    assert fitted.interval[3:].min() > 3 * fitted.interval[:3].max()


def test_the_prior_counts_up_to_a_factor(generator):
    counts = generator.integers(0, 4, (20, 30)).astype(float)
    measured = counts @ generator.uniform(1, 2, 30)
    one, other = (fit_costs(counts, measured, f * np.ones(30)).costs for f in (1e-3, 1e3))
    np.testing.assert_allclose(one, other, rtol=1e-6)


def test_intervals_hold_the_costs(generator):
    costs = generator.uniform(1, 5, 10)
    held = []
    for _ in range(50):
        counts = generator.integers(0, 4, (60, 10)).astype(float)
        measured = counts @ costs * (1 + 0.01 * generator.standard_normal(60))
        fitted = fit_costs(counts, measured, costs)
        held.append(abs(fitted.costs - costs) < fitted.interval)
    assert 0.88 < np.mean(held) <= 1


def test_no_cost_is_negative(generator):
    """The noise alone would make some of the zero costs negative."""
    costs = np.where(np.arange(40) % 2, 0.0, 1.0)
    counts = generator.integers(0, 3, (80, 40)).astype(float)
    measured = counts @ costs * (1 + 0.05 * generator.standard_normal(80))
    fitted = fit_costs(counts, measured, np.ones(40)).costs
    assert (fitted >= 0).all() and (fitted == 0).any()
    np.testing.assert_allclose(fitted, costs, atol=0.75)


@given(seed=st.integers(0, 2**31), size=st.integers(1, 25))
def test_the_solution_is_optimal(seed, size):
    """No variable can improve by moving: the conditions of Karush, Kuhn and Tucker."""
    generator = np.random.default_rng(seed)
    root = generator.standard_normal((size, size))
    curvature = root @ root.T + 1e-3 * np.eye(size)
    slope = generator.standard_normal(size)
    x = nonnegative_solution(curvature, slope)
    gradient = curvature @ x - slope
    assert (x >= 0).all()
    assert (gradient > -1e-6).all()
    assert abs(gradient[x > 0]).max(initial=0) < 1e-6


def test_rank_correlation():
    up = np.array([1.0, 2.0, 3.0, 4.0])
    assert spearman(up, up**3) == pytest.approx(1)
    assert spearman(up, -up) == pytest.approx(-1)
    assert spearman(up, np.array([1.0, 3.0, 2.0, 4.0])) == pytest.approx(0.8)
    # Ties share the mean rank: ranks 0, 1.5, 1.5, 3.
    assert spearman(up, np.array([1.0, 2.0, 2.0, 3.0])) == pytest.approx(4.5 / np.sqrt(5 * 4.5))
    assert np.isnan(spearman(up, np.ones(4)))
