"""Curves of a run from its metrics: loss, mIoU, expected latency, temperature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Metrics = Sequence[Mapping[str, Any]]
"""The lines of a metrics.jsonl: `step` and any values."""


@dataclass(frozen=True)
class Panel:
    """Values of one stage that share an axis."""

    stage: str
    label: str
    keys: tuple[str, ...]


PANELS = (
    Panel("search", "loss", ("loss", "cross_entropy", "latency_loss")),
    Panel("search", "latency, ms", ("sampled_ms", "expected_ms", "argmax_ms")),
    Panel("search", "temperature", ("temperature",)),
    Panel("search", "mIoU of training batches", ("train_miou",)),
    Panel("search", "entropy, nats a choice", ("entropy",)),
    Panel("search", "share of choices", ("share_none", "share_skip", "share_light")),
    Panel("pretrain", "loss", ("loss",)),
    Panel("pretrain", "top-1 accuracy", ("top1",)),
    Panel("finetune", "loss", ("loss",)),
    Panel("finetune", "mIoU", ("miou",)),
)
_COLUMNS = 3


def draw_curves(stages: Mapping[str, Metrics], path: Path) -> bool:
    """Writes a PNG with one panel for everything that was logged; False if nothing was.

    stages: metrics by stage name (search, pretrain, finetune).
    """
    drawn = [(panel, curves) for panel in PANELS if (curves := _curves(panel, stages))]
    if not drawn:
        return False
    rows = -(-len(drawn) // _COLUMNS)
    figure = Figure(figsize=(4 * _COLUMNS, 2.8 * rows), layout="constrained")
    for index, (panel, curves) in enumerate(drawn):
        _draw(figure.add_subplot(rows, _COLUMNS, index + 1), panel, curves)
    # The Agg canvas needs no display, and no state shared by all figures.
    FigureCanvasAgg(figure).print_png(str(path))
    return True


def _curves(panel: Panel, stages: Mapping[str, Metrics]) -> dict[str, list[tuple[int, float]]]:
    """(step, value) pairs of each key of the panel that occurs."""
    lines = stages.get(panel.stage, ())
    points = {
        key: [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        for key in panel.keys
    }
    return {key: values for key, values in points.items() if values}


def _draw(axes: Axes, panel: Panel, curves: Mapping[str, list[tuple[int, float]]]) -> None:
    for key, points in curves.items():
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, marker="." if len(points) < 20 else "", label=key)
    axes.set_title(f"{panel.stage}: {panel.label}", fontsize="medium")
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend(fontsize="small")
