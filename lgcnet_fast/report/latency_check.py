"""Predicted against measured latency as a picture."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lgcnet_fast.latency.check import LatencyCheck

MARKERS = "ox^sDv"
BAND = 0.05
"""Relative error of the shaded band."""


def draw_latency_check(check: LatencyCheck, path: Path) -> None:
    """Writes a PNG: a point a network, on the diagonal where the prediction is exact."""
    figure = Figure(figsize=(6.4, 6), layout="constrained")
    axes = figure.add_subplot()
    _draw_diagonal(axes, check)
    summary = check.summary()
    for marker, (name, networks) in zip(MARKERS, check.groups.items(), strict=False):
        measured = [network.measured_ms for network in networks]
        predicted = [network.predicted_ms for network in networks]
        label = f"{name}: median error {summary[name]['median_error_pct']:.1f} %"
        axes.scatter(measured, predicted, s=18, marker=marker, alpha=0.7, label=label)
    axes.set_xlabel(f"measured, ms ({check.measured_on.device}, {check.measured_on.runtime})")
    axes.set_ylabel(f"predicted, ms ({check.table.device}, {check.table.runtime})")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(str(path))


def _draw_diagonal(axes: Axes, check: LatencyCheck) -> None:
    values = [
        value
        for networks in check.groups.values()
        for network in networks
        for value in (network.measured_ms, network.predicted_ms)
    ]
    ends = [0.97 * min(values), 1.03 * max(values)]
    axes.plot(ends, ends, color="grey", linewidth=1)
    low, high = ([factor * end for end in ends] for factor in (1 - BAND, 1 + BAND))
    axes.fill_between(ends, low, high, color="grey", alpha=0.15, label=f"{BAND:.0%}")
    axes.set_xlim(*ends)
