"""Recording CUDA graphs such that a recording that fails leaves the process as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch


@contextmanager
def recording(
    graph: torch.cuda.CUDAGraph,
    stream: torch.cuda.Stream,
    generators: Sequence[torch.Generator] = (),
    pool: Any = None,
) -> Iterator[None]:
    """Records in `graph` what the `with` block starts, on `stream`, without executing it.

    The block must have run on that stream before: what chooses algorithms, compiles kernels or
    fills caches cannot be recorded. `generators`: those that it draws from, besides torch's default
    one. `pool`: of `torch.cuda.graph_pool_handle`; graphs that share one must not run at the same
    time. Other threads may go on using the GPU. Raises what made the recording impossible; then
    the stream before is current again, and random numbers can be drawn.
    """
    for generator in generators:
        graph.register_generator_state(generator)
    failure: BaseException | None = None
    try:
        with (
            _without_collection(),
            # Restores the stream, which a capture that fails leaves set.
            torch.cuda.stream(stream),
            torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"),
        ):
            try:
                yield
            except BaseException as error:
                failure = error
                raise
    except RuntimeError as error:
        graph.reset()
        # What else fails must not hide the failure.
        with suppress(RuntimeError):
            _release(generators, stream)
        # Ending a failed capture fails as well, which says nothing about the cause.
        raise failure or error from None


@contextmanager
def _without_collection() -> Iterator[None]:
    """Graphs and kernels among the garbage cannot be freed while something is recorded."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _release(generators: Sequence[torch.Generator], stream: torch.cuda.Stream) -> None:
    """A capture that fails leaves generators captured; the end of the next capture frees them."""
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    with torch.cuda.stream(stream):
        something = torch.zeros(1, device=stream.device)
        with torch.cuda.graph(graph, None, stream, capture_error_mode="thread_local"):
            something.zero_()
