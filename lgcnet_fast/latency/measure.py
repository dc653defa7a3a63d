"""Timing one module: synchronised runs until the median is known well enough."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Z_95 = 1.959964
"""Quantile of the normal distribution for a two-sided 95 % interval."""


@dataclass(frozen=True)
class Effort:
    """When to stop."""

    warm_up: int = 10
    """Runs before the first that counts."""
    fewest: int = 50
    spread: float = 0.01
    """Largest half width of the median's 95 % interval, by the median."""
    most_seconds: float = 2.0
    """Limit for one entry, after its warm-up and `fewest` runs."""


FULL_EFFORT = Effort()


@dataclass(frozen=True)
class Measurement:
    median_ms: float
    spread: float
    runs: int
    capped: bool


def measure(
    module: nn.Module, inputs: Sequence[Tensor], effort: Effort = FULL_EFFORT
) -> Measurement:
    """Time of `module(*inputs)` in eval mode without gradients, on the device of the inputs.

    Every run is synchronised, as a network at batch 1 waits for its answer.
    """
    module.eval()
    timed = _timer(inputs[0].device)

    def run() -> None:
        module(*inputs)

    with torch.no_grad(), fastest_convolutions():
        for _ in range(effort.warm_up):
            timed(run)
        return _until_known(lambda: timed(run), effort)


@contextmanager
def fastest_convolutions() -> Iterator[None]:
    """Lets cuDNN try its algorithms during the warm-up; leaves its other settings alone."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _until_known(time_one: Callable[[], float], effort: Effort) -> Measurement:
    times = [time_one() for _ in range(effort.fewest)]
    started = time.perf_counter()
    while True:
        median, spread = median_interval(times)
        if spread <= effort.spread:
            return Measurement(median, spread, len(times), capped=False)
        if time.perf_counter() - started > effort.most_seconds:
            return Measurement(median, spread, len(times), capped=True)
        times += [time_one() for _ in range(max(1, len(times) // 4))]


def median_interval(times: Sequence[float]) -> tuple[float, float]:
    """The median and half its 95 % interval by order statistics, relative to it.

    The interval's ends are the values of rank n/2 -+ 1.96 sqrt(n)/2: the number of values below
    the true median is binomial, whatever the distribution of the times.
    """
    ranked = sorted(times)
    count = len(ranked)
    middle = count // 2
    median = ranked[middle] if count % 2 else (ranked[middle - 1] + ranked[middle]) / 2
    low = max(0, math.floor((count - Z_95 * math.sqrt(count)) / 2) - 1)
    high = count - 1 - low
    half = (ranked[high] - ranked[low]) / 2
    return median, half / median if median > 0 else 0.0


def _timer(device: torch.device) -> Callable[[Callable[[], None]], float]:
    """A function that runs its argument to the end and returns the milliseconds."""
    return _timed_by_events(device) if device.type == "cuda" else _timed_by_clock


def _timed_by_clock(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - started)


def _timed_by_events(device: torch.device) -> Callable[[Callable[[], None]], float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed(run: Callable[[], None]) -> float:
        torch.cuda.synchronize(device)
        start.record(torch.cuda.current_stream(device))
        run()
        end.record(torch.cuda.current_stream(device))
        end.synchronize()
        return start.elapsed_time(end)

    return timed
