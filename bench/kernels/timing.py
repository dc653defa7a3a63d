"""Timing of single operations: CUDA graphs, cold L2 cache, alternatives in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor
from triton.errors import TritonError

from bench.device import CUDA, DEVICE
from bench.rounds import alternate, median
from lgcnet_fast.recording import recording

COLD_BYTES = 256 * 2**20
"""Inputs rotate through this much memory, several times the L2 cache of a data-centre GPU."""
WARM_UP, ROUNDS = (2, 9) if CUDA else (0, 1)

CANNOT_RUN = (RuntimeError, ValueError, TritonError)
"""What alternatives and tiles raise that the device or the library has no room or code for."""

Call = Callable[[], Any]


def rotations(bytes_a_call: int) -> int:
    """How many sets of inputs to rotate."""
    return int(min(max(COLD_BYTES // bytes_a_call, 2), 64)) if CUDA else 1


def copy_bandwidth() -> float:
    """Bytes a second that a kernel copies, read and written bytes both counted.

    Not by `copy_`, which in a CUDA graph need not be a kernel: it reached 2.75 TB/s on an H200,
    where 4.25 had been measured before.
    """
    source = torch.randn(2**28 if CUDA else 2**18, device=DEVICE)
    targets = [torch.empty_like(source) for _ in range(2)]
    calls = [lambda target=target: torch.neg(source, out=target) for target in targets]
    return 2 * source.nbytes / seconds_a_call(calls)


def seconds_a_call(calls: Sequence[Call], rounds: int = ROUNDS) -> float:
    """Median over the rounds."""
    return median(in_turn({"": calls}, rounds)[""])


def in_turn(
    alternatives: Mapping[str, Sequence[Call]], rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """Seconds a call of every alternative, one number a round.

    They take turns. One that does not run at all is left out, with a line that says why.
    """
    prepared = {}
    for name, calls in alternatives.items():
        try:
            prepared[name] = _prepared(calls)
        except CANNOT_RUN as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"    {name} does not run: {reason}", flush=True)
    return alternate(prepared, rounds, WARM_UP)


def _prepared(calls: Sequence[Call]) -> Callable[[], float]:
    return _captured(calls) if CUDA else _by_clock(calls)


def _captured(calls: Sequence[Call]) -> Callable[[], float]:
    """Replays one CUDA graph of all the calls.

    What the calls return stays alive as long as the graph, so that their outputs do not share
    memory and every call writes to cold lines.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with recording(graph, stream):
        outputs = [call() for call in calls]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / len(outputs)

    return timed


def _by_clock(calls: Sequence[Call]) -> Callable[[], float]:
    def timed() -> float:
        started = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - started) / len(calls)

    return timed


def relative_error(result: Tensor, truth: Tensor) -> float:
    return ((result.double() - truth).norm() / truth.norm()).item()


def alike(results: Any, others: Any) -> bool:
    """Whether tensors, in sequences and dataclasses of both, are equal but for roundings."""
    if isinstance(results, Tensor):
        error, size = (results.float() - others.float()).norm(), others.float().norm()
        return bool(error <= 1e-2 * size)
    if is_dataclass(results):
        results, others = vars(results).values(), vars(others).values()
    return results is None or all(map(alike, results, others))


def gate(name: str, result: Tensor, truth: Tensor, factor: float = 1) -> None:
    """Exits before any time is printed unless the result is right.

    factor: by which the limit for a single rounding to the result's dtype is wider.
    """
    error = relative_error(result, truth)
    limit = factor * {torch.bfloat16: 5e-3, torch.float16: 1e-3}.get(result.dtype, 1e-5)
    if not error <= limit:
        raise SystemExit(f"WRONG RESULT: {name}: relative error {error:.2e}, limit {limit:.0e}")
