"""Measuring in rounds: alternatives take turns, and are compared within rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median, quantiles

__all__ = ["alternate", "median", "ratios", "tenth_percentile"]


def alternate(
    timed: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 0
) -> dict[str, list[float]]:
    """Calls every alternative once a round, in an order that is swapped from round to round.

    timed: functions that run an alternative and return its time. Returns one number a round,
    without the rounds of the warm-up.
    """
    times: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(warm_up + rounds):
        order = list(timed)
        for name in order if number % 2 else reversed(order):
            seconds = timed[name]()
            if number >= warm_up:
                times[name].append(seconds)
    return times


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """Round by round, of alternatives that were measured in the same rounds."""
    return [a / b for a, b in zip(numerator, denominator, strict=True)]


def tenth_percentile(values: Sequence[float]) -> float:
    return quantiles(values, n=10, method="inclusive")[0] if len(values) > 1 else values[0]
