"""Command-line options that several measurements have."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from bench.results_file import current_commit


def parser(description: str) -> argparse.ArgumentParser:
    """With `--out`, `--commit` and `--seconds`."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--out", type=Path, required=True, help="JSON file of all numbers")
    result.add_argument("--commit", default=current_commit())
    result.add_argument(
        "--seconds", type=float, default=540, help="nothing new is begun after that many"
    )
    return result


class Deadline:
    """Seconds from the making of this object."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()

    @property
    def over(self) -> bool:
        return self.left <= 0


def image_size(text: str) -> tuple[int, int]:
    """`256x512`: height and width."""
    height, _, width = text.partition("x")
    try:
        return int(height), int(width)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH") from None
