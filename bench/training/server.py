"""What a worker process does: builds one subject at a time, checks it, runs its steps."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from bench.device import CUDA, DEVICE, release_memory, use_fastest_convolutions
from bench.rounds import median
from bench.stock.networks import compile_cells
from bench.training import finetune, search
from bench.training.case import Batch, Step, TrainingCase
from bench.training.gradients import judge
from lgcnet_fast.ops.compile_ahead import compile_ahead
from lgcnet_fast.train.run import ALGORITHMS

STAGES = {"search": search, "finetune": finetune}
GATE_BATCH, GATE_SIZE = 4, (128, 256)
"""Most of what the float64 truth is computed on."""
FULL_SPEED = 1.2
"""A step has full speed that takes at most so many times the median of the last ones."""
SETTLED_STEPS, MOST_STEPS = 4, 40 if CUDA else 5


class TrainingServer:
    def __init__(self) -> None:
        use_fastest_convolutions()
        self._step: Step | None = None
        self._built: tuple[object, dict[str, Any]] | None = None

    def build(
        self, stage: str, subject: str, case: dict[str, Any], started: float | None = None
    ) -> dict[str, Any]:
        """Runs the subject until its steps have settled, unless it is there already.

        started: when, by `time.time`, the time to the first step at full speed began; none: now.
        """
        wanted = (stage, subject, case)
        if self._built is None or self._built[0] != wanted:
            self._built = (wanted, self._build(stage, subject, case, started or time.time()))
        return self._built[1]

    def compile_part(
        self, stage: str, subject: str, case: dict[str, Any], part: int, parts: int
    ) -> None:
        """Every `parts`-th module of a compiled subject, into torch's cache on disk."""
        module = STAGES[stage]
        some = partial(compile_cells, part=part, parts=parts)
        with (
            patch.object(module, "compile_cells", some),
            patch.object(module, "as_graph", _not_recorded),
        ):
            module.make_step(subject, TrainingCase(**case))()
        _wait()

    def _build(
        self, stage: str, subject: str, case: dict[str, Any], started: float
    ) -> dict[str, Any]:
        self._release()
        # As a run sets it for ours; stock may look for the fastest of all that there are.
        if subject.startswith("ours"):
            use_fastest_convolutions(ALGORITHMS)
        else:
            use_fastest_convolutions()
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        self._step = STAGES[stage].make_step(subject, TrainingCase(**case))
        ends, seconds = self._settle()
        settled = median(seconds[-SETTLED_STEPS:])
        first = next(i for i, value in enumerate(seconds) if value <= FULL_SPEED * settled)
        return {
            "first_full_speed_s": ends[first] - started,
            "first_full_speed_step": first + 1,
            "loss": float(self._step()),
            **_peaks(),
        }

    def _release(self) -> None:
        self._step = self._built = None
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        release_memory()

    def measure(self, steps: int) -> float:
        """Milliseconds of a step, of so many that follow each other as in training."""
        assert self._step is not None
        self._step()
        return 1e3 * timed(self._step, steps)

    def check(self, stage: str, subject: str, case: dict[str, Any]) -> dict[str, Any]:
        """Errors of the step's loss and gradients, and what is wrong with them."""
        small = TrainingCase(**case).shrunk(GATE_BATCH, GATE_SIZE)
        gradients = STAGES[stage].gradients
        if CUDA:
            compile_ahead(lambda: gradients(subject, small))
        results = {name: gradients(name, small) for name in ("truth", "eager-nchw", subject)}
        truth = results["truth"]
        stock, ours = (results[name].errors(truth) for name in ("eager-nchw", subject))
        release_memory()
        faults = judge(ours, stock, small.precision)
        return {"errors": ours, "stock_errors": stock, "faults": faults}

    def _settle(self) -> tuple[list[float], list[float]]:
        """Wall-clock ends and durations of single steps, until four of them agree."""
        ends: list[float] = []
        seconds: list[float] = []
        while len(seconds) < MOST_STEPS:
            begun = time.time()
            assert self._step is not None
            self._step()
            _wait()
            ends.append(time.time())
            seconds.append(ends[-1] - begun)
            last = seconds[-SETTLED_STEPS:]
            if len(seconds) > SETTLED_STEPS and max(last) <= FULL_SPEED * min(last):
                break
        return ends, seconds


def _not_recorded(
    name: str, step: Callable[[Any], Any], batch: Batch, generators: tuple[torch.Generator, ...]
) -> Callable[[], Any]:
    return lambda: step([batch])


def timed(step: Step, steps: int) -> float:
    """Seconds of one step, by the device's clock.

    As in training the host goes on to the next step without waiting for one, so that it launches
    a graph while the device works on the one before.
    """
    if not CUDA:
        begun = time.perf_counter()
        for _ in range(steps):
            step()
        return (time.perf_counter() - begun) / steps
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(DEVICE)
    begin.record()
    for _ in range(steps):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / steps


def _wait() -> None:
    if CUDA:
        torch.cuda.synchronize(DEVICE)


def _peaks() -> dict[str, float]:
    """GiB that tensors had at most, and that the allocator took from the GPU."""
    if not CUDA:
        return {"peak_gib": 0.0, "reserved_gib": 0.0}
    return {
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
    }
