"""Timing of single operations on a GPU: CUDA graphs, cold L2 cache, floors from bytes."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

COLD_BYTES = 256 * 2**20
"""Inputs rotate through this much memory, several times the L2 cache of a data-centre GPU."""

Call = Callable[[], Any]


def copy_bandwidth() -> float:
    """Bytes a second of a device-to-device copy, read and written bytes both counted."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    targets = [torch.empty_like(source) for _ in range(2)]
    seconds = seconds_a_call([lambda target=target: target.copy_(source) for target in targets])
    return 2 * source.numel() / seconds


def rotations(bytes_a_call: float) -> int:
    """How many sets of inputs to rotate."""
    return int(min(max(COLD_BYTES // bytes_a_call, 2), 64))


def seconds_a_call(calls: Sequence[Call], replays: int = 12) -> float:
    """Median over replays of one CUDA graph that holds all the calls, a call.

    What the calls return stays alive until the end of the capture, so that their outputs do not
    share memory and every call writes to cold lines.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [call() for call in calls]
    times = []
    for _ in range(3 + replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    del outputs
    return statistics.median(times[3:]) / len(calls)


def alternatives_seconds(alternatives: dict[str, Sequence[Call]]) -> dict[str, float]:
    """Seconds a call of every alternative that runs at all."""
    times = {}
    for name, calls in alternatives.items():
        try:
            times[name] = seconds_a_call(calls)
        except RuntimeError as error:
            print(f"    {name} does not run: {str(error).splitlines()[0]}")
    return times


def relative_error(result: Tensor, truth: Tensor) -> float:
    return ((result.double() - truth).norm() / truth.norm()).item()


def gate(name: str, result: Tensor, truth: Tensor) -> None:
    """Exits before any time is printed unless the result is right."""
    error = relative_error(result, truth)
    limit = {torch.bfloat16: 5e-3, torch.float16: 1e-3}.get(result.dtype, 1e-5)
    if not error <= limit:
        raise SystemExit(f"WRONG RESULT: {name}: relative error {error:.2e}, limit {limit:.0e}")


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of all numbers")
    parser.add_argument(
        "--part",
        choices=("table", "sweep", "full"),
        default="table",
        help="table of selected cases, sweep of tile sizes, or the table of every case",
    )
    parser.add_argument("--commit", default="unknown")
    return parser.parse_args()


def print_row(row: dict[str, Any]) -> None:
    """One line of the table; times in microseconds."""
    print(
        f"{row['case']:<58} floor {row['floor_us']:7.1f}  ours {row['ours_us']:7.1f} "
        f"({row['ours_us'] / row['floor_us']:4.1f}x)  stock {row['stock_us']:8.1f} "
        f"{row['stock']:<14} speed-up {row['stock_us'] / row['ours_us']:5.1f}",
        flush=True,
    )
