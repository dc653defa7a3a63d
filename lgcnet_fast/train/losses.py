"""Latency loss: beta * LAT (LGCNet equation 10) and its logarithmic relatives.

Only here are milliseconds multiplied by the device's `scale`, which maps the mean over uniform
random architectures to `PAPER_MEAN_MS`, so that beta means the same on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lgcnet_fast.latency.predict import PAPER_MEAN_MS
from lgcnet_fast.space.base import LatencyTerms


def latency_loss(terms: LatencyTerms, form: str, scale: float) -> Tensor:
    """Scalar to be multiplied by beta.

    `form`: linear_ms is LAT in scaled milliseconds; log_total, log_cell and log_edge are sums of
    logarithms over the whole network (constant part included), the cells or the edges.
    """
    if form == "linear_ms":
        return scale * terms.searchable
    if form == "log_total":
        return _log_microseconds(scale * terms.total)
    if form == "log_cell":
        return _log_microseconds(scale * terms.cells).sum()
    if form == "log_edge":
        return _log_microseconds(scale * terms.edges).sum()
    raise ValueError(f"unknown latency form {form!r}")


def strength(terms: LatencyTerms, form: str) -> float:
    """Change of the latency loss when a network of `PAPER_MEAN_MS` becomes e times slower."""
    if form == "linear_ms":
        return PAPER_MEAN_MS
    return {"log_total": 1, "log_cell": len(terms.cells), "log_edge": len(terms.edges)}[form]


def _log_microseconds(milliseconds: Tensor) -> Tensor:
    # log(1 + x): an edge that turns into `none` costs 0 instead of minus infinity.
    return torch.log1p(1000 * milliseconds)
