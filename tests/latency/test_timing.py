"""Interleaved timing on the CPU, with frames that sleep for a known time."""

from __future__ import annotations

import gc
import time

import pytest
import torch

from lgcnet_fast.latency.timing import Protocol, percentile, time_interleaved

CPU = torch.device("cpu")
QUICK = Protocol(
    rounds=3, warm_up_seconds=0.0, warm_up_frames=1, block_seconds=0.02, single_frames=4
)


def sleeper(milliseconds: float):
    return lambda: time.sleep(milliseconds / 1e3)


def test_times_are_those_of_the_frames():
    timings = time_interleaved({"fast": sleeper(2), "slow": sleeper(6)}, CPU, 4, QUICK)
    fast, slow = timings["fast"], timings["slow"]
    assert 2 <= fast.latency_ms < slow.latency_ms and 6 <= slow.latency_ms < 60
    assert fast.latency_ms <= fast.latency_p99_ms
    assert slow.fps == pytest.approx(4 / slow.frame_ms * 1e3)
    assert 6 <= slow.frame_ms < 60
    assert len(fast.round_fps) == 3 and fast.batch == 4
    assert fast.host_us is None


def test_odd_rounds_run_in_the_opposite_order():
    order: list[str] = []

    def frame(name):
        def run():
            if not order or order[-1] != name:
                order.append(name)
            time.sleep(1e-3)

        return run

    time_interleaved({name: frame(name) for name in "abc"}, CPU, protocol=QUICK)
    # Warming up runs them once in order; neighbouring rounds share the subject in between.
    assert "".join(order) == "abc" + "abc" + "ba" + "bc"


def test_progress_counts_rounds_and_garbage_collection_is_restored():
    seen = []
    states = []
    time_interleaved(
        {"x": lambda: states.append(gc.isenabled())},
        CPU,
        protocol=QUICK,
        progress=lambda *report: seen.append(report),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert not any(states) and gc.isenabled()


def test_an_error_restores_garbage_collection():
    def fail():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        time_interleaved({"x": fail}, CPU, protocol=QUICK)
    assert gc.isenabled()


def test_percentile_is_a_measured_value():
    values = [float(i) for i in range(1, 101)]
    assert percentile(values, 0.99) == 99.0
    assert percentile(values[:10], 0.99) == 10.0
    assert percentile([3.0], 0.5) == 3.0
    assert percentile([1.0, 2.0], 0.0) == 1.0


@pytest.mark.gpu
def test_on_a_gpu_the_call_returns_before_the_frame_is_done():
    x = torch.randn(8192, 8192, device="cuda")
    timing = time_interleaved({"product": lambda: x @ x}, torch.device("cuda"), protocol=QUICK)
    host_us = timing["product"].host_us
    assert host_us is not None and host_us < 1e3 * timing["product"].latency_ms / 2
