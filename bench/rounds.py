"""Numbers of repeated measurements."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median, quantiles

__all__ = ["median", "ratios", "tenth_percentile"]


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """Round by round, of alternatives that were measured in the same rounds."""
    return [a / b for a, b in zip(numerator, denominator, strict=True)]


def tenth_percentile(values: Sequence[float]) -> float:
    return quantiles(values, n=10, method="inclusive")[0] if len(values) > 1 else values[0]
