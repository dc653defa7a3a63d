"""Accuracy against speed: what was measured here, beside what was published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lgcnet_fast.report.published import SOURCE, published_rows


@dataclass(frozen=True)
class MeasuredPoint:
    name: str
    fps: float
    miou: float | None
    """Percent; none where only the speed is known."""


def draw_accuracy_fps(points: Sequence[MeasuredPoint], device: str, path: Path) -> None:
    """Writes a PNG with FPS on a logarithmic axis; a speed without accuracy is a vertical line."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    _draw_published(axes)
    for number, point in enumerate(points):
        colour, label = f"C{number % 10}", f"{point.name}: {point.fps:.1f} FPS"
        if point.miou is None:
            axes.axvline(point.fps, color=colour, linestyle=":", label=f"{label}, mIoU not known")
        else:
            axes.scatter(point.fps, point.miou, color=colour, marker="*", s=120, label=label)
    axes.set_xscale("log")
    axes.set_xlabel("images a second")
    axes.set_ylabel("mIoU, %")
    axes.set_title(
        f"measured: {device}\npublished: {SOURCE}, other devices and images; LGCNet on a Titan Xp",
        fontsize="small",
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small", loc="lower left")
    FigureCanvasAgg(figure).print_png(str(path))


def _draw_published(axes: Axes) -> None:
    rows = published_rows()
    axes.scatter(
        [row.fps for row in rows], [row.miou for row in rows], color="grey", s=14, label="published"
    )
    for row in rows:
        axes.annotate(
            row.method,
            (row.fps, row.miou),
            xytext=(3, 3),
            textcoords="offset points",
            fontsize=6,
            color="grey",
        )
