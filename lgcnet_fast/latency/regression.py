"""Least squares that keep to what is plausible where the data leave room. Numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lgcnet_fast.latency.measure import Z_95

Array = NDArray[np.float64]

SCATTER = (0.03, 0.01, 0.003, 0.001)
"""Relative errors that measurements, or the model itself, may have."""
FOLDS = 5
DOUBT = 1.0
"""Relative error that a prior is taken to have."""


@dataclass(frozen=True)
class FittedCosts:
    costs: Array
    """(n,), none negative."""
    interval: Array
    """(n,): half the width of each cost's 95 % interval, before negative ones are ruled out."""


def fit_costs(
    counts: Array, measured: Array, prior: Array, scatter: float = SCATTER[1]
) -> FittedCosts:
    """Costs c >= 0 (n,) with counts @ c close to `measured`, relative errors counting equally.

    counts: (m, n), how often each cost occurs in a sum; measured: (m,) sums, above 0; prior: (n,)
    costs up to a common factor, above 0. The most probable costs if measurements scatter by
    `scatter` and costs by `DOUBT` around the prior: sums that determine a cost settle it, and
    what they leave open, such as how a constant splits into parts, follows the prior.
    """
    rows = counts / measured[:, None]
    unit = prior * _factor(rows @ prior)
    # In units of the scaled prior, each cost is drawn to 1.
    scaled = rows * unit
    penalty = (scatter / DOUBT) ** 2
    curvature = scaled.T @ scaled + penalty * np.eye(len(unit))
    slope = scaled.T @ np.ones(len(measured)) + penalty
    deviation = scatter * np.sqrt(np.diag(np.linalg.inv(curvature)))
    return FittedCosts(nonnegative_solution(curvature, slope) * unit, Z_95 * deviation * unit)


def cross_validate(counts: Array, measured: Array, prior: Array) -> tuple[float, Array]:
    """The `scatter` that predicts best what a fit has not seen, and its relative errors (m,).

    Best is the least mean square; each fifth of the sums is predicted from the other four.
    """
    errors = {scatter: _errors_of_left_out(counts, measured, prior, scatter) for scatter in SCATTER}
    best = min(SCATTER, key=lambda scatter: float(errors[scatter] @ errors[scatter]))
    return best, errors[best]


def _errors_of_left_out(counts: Array, measured: Array, prior: Array, scatter: float) -> Array:
    fold = np.arange(len(measured)) % FOLDS
    predicted = np.empty_like(measured)
    for left_out in range(FOLDS):
        test = fold == left_out
        fitted = fit_costs(counts[~test], measured[~test], prior, scatter)
        predicted[test] = counts[test] @ fitted.costs
    return np.abs(predicted / measured - 1)


def _factor(ratios: Array) -> float:
    """That brings predicted by measured closest to 1."""
    return float(ratios.sum() / (ratios @ ratios))


def nonnegative_solution(curvature: Array, slope: Array) -> Array:
    """The x >= 0 that minimises x'Qx / 2 - q'x for a positive definite Q (n, n) and q (n,).

    Exchanges variables between zero and free until none is negative and none at zero wants to
    grow: all at fault at once while that helps, then one at a time, which ends (Murty 1974).
    """
    size = len(slope)
    free = np.ones(size, dtype=bool)
    fewest, patience = size + 1, 3
    while True:
        x = np.zeros(size)
        x[free] = np.linalg.solve(curvature[np.ix_(free, free)], slope[free])
        wants = slope - curvature @ x
        tiny = 1e-12 * max(1.0, float(np.abs(slope).max()))
        wrong = np.flatnonzero(np.where(free, x < -tiny, wants > tiny))
        if not len(wrong):
            return x.clip(min=0)
        if len(wrong) < fewest:
            fewest, patience = len(wrong), 3
        else:
            patience -= 1
        chosen = wrong if patience > 0 else wrong[-1:]
        free[chosen] = ~free[chosen]


def spearman(first: Array, second: Array) -> float:
    """Rank correlation; ties share the mean of their ranks. nan where one side is constant."""
    ranks = [_ranks(values) - (len(values) - 1) / 2 for values in (first, second)]
    norms = [float(np.sqrt(rank @ rank)) for rank in ranks]
    return float(ranks[0] @ ranks[1]) / (norms[0] * norms[1]) if all(norms) else float("nan")


def _ranks(values: Array) -> Array:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts) - 1.0
    return (last - (counts - 1) / 2)[place]
