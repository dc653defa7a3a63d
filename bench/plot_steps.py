"""Step time and memory against batch and resolution, from a file of bench/search_step.py.

python -m bench.search_step --out FILE --batch 4 8 16 --size 256x512 512x512 769x769
python -m bench.plot_steps FILE --out FILE.png
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.results_file import read_json

Points = dict[str, list[tuple[float, float]]]
"""Line -> (x, y)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    content = read_json(options.file)
    rows = [row for row in content.get("rows", []) if "ms" in row and "size" in row]
    if not rows:
        raise SystemExit(f"{options.file}: no steps in it")
    plot(rows, content["device"]).savefig(options.out, dpi=150)


def plot(rows: list[dict[str, Any]], device: str) -> Figure:
    """Left against the images' megapixels at each batch, right against the batch at each size."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    for row_of_axes, column, label in zip(
        axes, ("ms", "peak_gib"), ("step, ms", "peak memory, GiB"), strict=True
    ):
        against = {
            "megapixels an image": points(
                rows, column, megapixels, lambda r: f"batch {r['batch']}"
            ),
            "batch": points(rows, column, lambda row: row["batch"], size_of),
        }
        for axis, (x_label, lines) in zip(row_of_axes, against.items(), strict=True):
            for name, values in sorted(lines.items()):
                axis.plot(*zip(*sorted(values), strict=True), marker="o", label=name)
            axis.set(xlabel=x_label, ylabel=label, xscale="log", yscale="log")
            axis.grid(True, which="both", alpha=0.3)
            axis.legend(fontsize="x-small")
    figure.suptitle(f"One training step on {device}")
    return figure


def points(rows: list[dict[str, Any]], column: str, x_of: Any, group_of: Any) -> Points:
    """One line for every subject and group; several measurements of a point give the least."""
    least: dict[str, dict[float, float]] = defaultdict(dict)
    for row in rows:
        line = least[f"{row['subject']}, {group_of(row)}"]
        x = x_of(row)
        line[x] = min(row[column], line.get(x, row[column]))
    return {name: list(line.items()) for name, line in least.items()}


def megapixels(row: dict[str, Any]) -> float:
    height, width = row["size"]
    return height * width / 1e6


def batch_of(row: dict[str, Any]) -> str:
    return f"batch {row['batch']}"


def size_of(row: dict[str, Any]) -> str:
    return "x".join(map(str, row["size"]))


if __name__ == "__main__":
    main()
