"""Timing on the CPU and its statistics."""

import random
import statistics

import pytest
import torch
from torch import nn

from lgcnet_fast.latency.measure import Effort, measure, median_interval

QUICK = Effort(warm_up=1, fewest=5, spread=0.5, most_seconds=0.2)


class Counting(nn.Module):
    """Counts its runs and notes the mode that they ran in."""

    def __init__(self):
        super().__init__()
        self.runs = 0

    def forward(self, x):
        self.runs += 1
        assert not self.training and not torch.is_grad_enabled()
        return x


def test_median_of_known_values():
    assert median_interval([3.0, 1.0, 2.0])[0] == 2.0
    assert median_interval([4.0, 1.0, 2.0, 3.0])[0] == 2.5
    assert median_interval([2.0] * 50) == (2.0, 0.0)
    assert median_interval([0.0] * 50) == (0.0, 0.0)


def test_the_interval_holds_the_true_median_nineteen_times_in_twenty():
    generator = random.Random(0)
    held = 0
    for _ in range(400):
        times = [generator.expovariate(1.0) for _ in range(101)]
        median, spread = median_interval(times)
        held += abs(median - 0.6931) <= 1.5 * spread * median
        assert median == statistics.median(times)
    assert held > 0.93 * 400


def test_the_interval_narrows_with_more_runs():
    generator = random.Random(1)
    few, many = ([generator.random() + 1 for _ in range(n)] for n in (50, 5000))
    assert median_interval(many)[1] < median_interval(few)[1] / 4


def test_runs_are_counted_without_the_warm_up():
    module = Counting().train()
    timed = measure(module, [torch.zeros(1)], Effort(3, 50, 10.0, 0.0))
    assert timed.runs == 50 and module.runs == 53 and not timed.capped
    assert timed.median_ms > 0


def test_the_search_for_fast_convolutions_ends_with_the_measurement():
    class Failing(nn.Module):
        def forward(self, x):
            assert torch.backends.cudnn.benchmark
            raise RuntimeError("out of memory")

    before = torch.backends.cudnn.benchmark
    with pytest.raises(RuntimeError):
        measure(Failing(), [torch.zeros(1)], QUICK)
    assert torch.backends.cudnn.benchmark == before


def test_the_time_limit_ends_a_measurement_and_is_recorded():
    timed = measure(Counting(), [torch.zeros(1)], Effort(0, 20, -1.0, 0.05))
    assert timed.capped and timed.runs >= 20


def test_more_work_takes_longer():
    x = torch.randn(1, 32, 64, 64)
    small, large = nn.Conv2d(32, 4, 1), nn.Conv2d(32, 128, 5)
    assert measure(large, [x], QUICK).median_ms > measure(small, [x], QUICK).median_ms


@pytest.mark.gpu
def test_events_time_the_whole_run():
    x = torch.randn(1, 64, 256, 256, device="cuda")
    module = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1) for _ in range(8))).cuda()
    one = measure(module[0], [x], QUICK).median_ms
    assert 4 * one < measure(module, [x], QUICK).median_ms < 16 * one
