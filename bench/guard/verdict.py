"""What a comparison says, and whether it is worse than what was committed for this device.

Absolute times vary from run to run on shared machines. Guarded is the ratio of our time to the
best alternative's, both measured in the same rounds, at its 10th percentile.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.results_file import read_json
from bench.rounds import median, ratios, tenth_percentile

TOLERANCE = 1.15
"""Times the committed ratio; what is worse is a regression."""


@dataclass(frozen=True)
class Verdict:
    name: str
    ours_s: float
    stock_s: float
    stock: str
    ratio: float
    """Of our time to the stock's: below 1 is faster."""
    ratio_p10: float
    floor_share: float | None
    """Of the floor of bytes in our time; none where there is no such floor."""

    @classmethod
    def of(
        cls,
        name: str,
        ours: Sequence[float],
        stock: Mapping[str, Sequence[float]],
        floor_s: float | None = None,
    ) -> Verdict:
        """Seconds of each, one number a round."""
        best = min(sorted(stock), key=lambda alternative: median(stock[alternative]))
        rounds = ratios(ours, stock[best])
        return cls(
            name,
            ours_s=median(ours),
            stock_s=median(stock[best]),
            stock=best,
            ratio=median(rounds),
            ratio_p10=tenth_percentile(rounds),
            floor_share=None if floor_s is None else floor_s / median(ours),
        )

    def as_row(self) -> dict[str, Any]:
        return asdict(self)


def baseline_path(device: str, folder: Path) -> Path:
    """`NVIDIA H200` -> guard_nvidia_h200.json."""
    return folder / f"guard_{re.sub(r'[^a-z0-9]+', '_', device.lower()).strip('_')}.json"


def committed_ratios(path: Path) -> dict[str, float]:
    """By name; empty without a file."""
    return {row["name"]: row["ratio_p10"] for row in read_json(path).get("rows", [])}


def fault(verdict: Verdict, committed: Mapping[str, float]) -> str | None:
    """Why this is a regression; none if it is not, or if nothing is known about the case."""
    before = committed.get(verdict.name)
    if before is None or verdict.ratio_p10 <= TOLERANCE * before:
        return None
    return (
        f"{verdict.name}: takes {verdict.ratio_p10:.3f} of the time of {verdict.stock} at best, "
        f"{before:.3f} when it was committed"
    )


def table(verdicts: Sequence[Verdict], committed: Mapping[str, float]) -> list[str]:
    """Lines for people."""
    width = max(len(verdict.name) for verdict in verdicts)
    titles = f"{'ours':>11} {'stock':>11} {'ratio':>6} {'before':>6} {'of floor':>8}  stock"
    lines = [f"{'':<{width}} {titles}"]
    for verdict in verdicts:
        before = committed.get(verdict.name)
        lines.append(
            f"{verdict.name:<{width}} {_time(verdict.ours_s)} {_time(verdict.stock_s)} "
            f"{verdict.ratio:6.2f} {'' if before is None else f'{before:.2f}':>6} "
            f"{'' if verdict.floor_share is None else f'{verdict.floor_share:.0%}':>8}  "
            f"{verdict.stock}"
        )
    return lines


def _time(seconds: float) -> str:
    return f"{1e6 * seconds:8.1f} us" if seconds < 1e-3 else f"{1e3 * seconds:8.2f} ms"
