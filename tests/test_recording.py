"""Recordings that fail, on a simulated GPU; tests/train/test_capture_gpu.py has a real one."""

from __future__ import annotations

import gc
from contextlib import contextmanager

import pytest
import torch

from lgcnet_fast.recording import recording


class Graph:
    """As torch's: a recording that fails leaves the stream, and the generators captured."""

    captured: set[object] = set()

    def __init__(self):
        self.generators = []

    def register_generator_state(self, generator):
        self.generators.append(generator)

    def reset(self):
        pass


@pytest.fixture(autouse=True)
def simulated(monkeypatch):
    """Current streams by name; an error in the block also fails the end of the recording."""
    streams, zeros = ["default"], torch.zeros

    @contextmanager
    def on_stream(stream):
        before = list(streams)
        streams.append(stream)
        try:
            yield
        finally:
            streams[:] = before

    @contextmanager
    def graph(graph, pool, stream, capture_error_mode):
        assert pool in (None, "pool") and capture_error_mode == "thread_local"
        Graph.captured |= {"default generator", *graph.generators}
        streams.append(f"{stream}, recording")
        try:
            yield
        except BaseException:
            raise RuntimeError("the recording was invalidated") from None
        streams.pop()
        Graph.captured -= {"default generator", *graph.generators}

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: zeros(*shape))
    return streams


class Stream(str):
    device = "cuda"


@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyboardInterrupt])
def test_a_failure_says_what_failed_and_leaves_nothing_behind(simulated, error):
    with pytest.raises(error, match="cause"), recording(Graph(), Stream("side"), ["noise"]):
        assert simulated[-1] == "side, recording" and Graph.captured
        raise error("the cause")
    assert simulated == ["default"]
    assert not Graph.captured
    assert gc.isenabled()


def test_nothing_is_collected_while_recording(simulated):
    with recording(Graph(), Stream("side"), pool="pool"):
        assert not gc.isenabled()
    assert gc.isenabled() and simulated == ["default"] and not Graph.captured
