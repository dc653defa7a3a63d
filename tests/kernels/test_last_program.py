"""Reductions in one launch: the last program of a group adds up what all of it stored."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels import last_program
from lgcnet_fast.kernels.last_program import POOL, finishes_last, take_counters
from lgcnet_fast.kernels.mixed_sum import batch_statistics
from lgcnet_fast.kernels.mixed_sum_backward import gradient_sum_rows, mixed_sum_gradient_sums
from lgcnet_fast.kernels.slabs import SlabConfig


@triton.jit
def _count_kernel(finished_ptr, counter_ptr, GROUPS: tl.constexpr):
    """finished[program] = whether it is the last of its group; a group is every GROUPS-th."""
    group = tl.program_id(0) % GROUPS
    last = finishes_last(counter_ptr + group, tl.num_programs(0) // GROUPS)
    tl.store(finished_ptr + tl.program_id(0), last.to(tl.int32))


@pytest.mark.parametrize(("groups", "programs"), [(1, 1), (1, 7), (4, 3)])
def test_one_program_of_every_group_is_last(
    groups: int, programs: int, device: torch.device
) -> None:
    finished = torch.full((programs, groups), -1, dtype=torch.int32, device=device)
    counters = take_counters(groups, finished.device)
    for _ in range(3):
        _count_kernel[(groups * programs,)](finished, counters, GROUPS=groups)
        assert finished.sum(0).tolist() == [1] * groups
        assert counters.tolist() == [0] * groups


def test_launches_take_counters_of_their_own(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.empty(0, device=device).device
    monkeypatch.setattr(last_program, "_taken", 0)
    taken = [take_counters(count, device) for count in (1, 33, 32, 2)]
    assert [counters.storage_offset() for counters in taken] == [0, 32, 96, 128]
    assert [len(counters) for counters in taken] == [1, 33, 32, 2]
    assert all(counters.dtype == torch.int32 and not counters.any() for counters in taken)


def test_counters_start_again_before_the_pool_ends(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.empty(0, device=device).device
    for count, first in ((32, POOL - 32), (33, 0)):
        monkeypatch.setattr(last_program, "_taken", POOL - 32)
        counters = take_counters(count, device)
        assert counters.storage_offset() == first and len(counters) == count


def test_no_pool_is_made_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="first time while a CUDA graph"):
        take_counters(1, torch.device("cuda", 63))


def random_maps(count: int, shape: tuple[int, ...], device: torch.device) -> list[Tensor]:
    torch.manual_seed(0)
    images, channels, height, width = shape
    maps = torch.randn(count, images, height, width, channels).to(device, torch.bfloat16)
    return [one.movedim(-1, 1) for one in maps]


def reductions(maps: list[Tensor], config: SlabConfig | None) -> Tensor:
    """All kinds, of all maps, the first of which is also the gradient, as one vector."""
    statistics = batch_statistics(maps, 1e-5, config)
    rows = gradient_sum_rows(maps[0], maps, statistics, (), config)
    weights = torch.full((len(maps),), torch.nan, device=maps[0].device)
    sums = mixed_sum_gradient_sums(maps[0], maps, statistics, (), config, weights)
    assert sums.weights is not None
    found = (statistics.mean, statistics.variance, statistics.inverse_deviation)
    found += (rows, sums.gradient, sums.normalised, sums.weights)
    return torch.cat([each.flatten() for each in found])


def assert_all_at_zero(device: torch.device) -> None:
    assert not last_program._pools[device].any()


def test_many_launches_give_the_same_bits_and_leave_no_counts(device: torch.device) -> None:
    large = torch.cuda.is_available()
    config = None if large else SlabConfig(block_c=4, warps=1, loads=2, maps=2, programs=12)
    maps = random_maps(2, (4, 128, 33, 31) if large else (1, 6, 9, 17), device)
    first = reductions(maps, config)
    for _ in range(500 if large else 3):
        assert torch.equal(reductions(maps, config), first)
    assert_all_at_zero(first.device)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 12])
def test_launches_on_two_streams_do_not_disturb_each_other(
    count: int, device: torch.device
) -> None:
    maps = random_maps(count, (8, 64, 32, 64), device)
    expected = reductions(maps, None)
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream(), torch.cuda.Stream()], []
    for _ in range(200):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(reductions(maps, None))
    torch.cuda.synchronize()
    assert all(torch.equal(each, expected) for each in found)
    assert_all_at_zero(expected.device)


@pytest.mark.gpu
def test_a_captured_launch_keeps_its_counters(device: torch.device) -> None:
    """Replays beside launches on another stream, which take the counters that follow."""
    maps = random_maps(3, (8, 64, 32, 64), device)
    expected = reductions(maps, None)
    torch.cuda.synchronize()
    graph, other = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        captured = reductions(maps, None)
    for _ in range(100):
        captured.fill_(torch.nan)
        graph.replay()
        with torch.cuda.stream(other):
            beside = reductions(maps, None)
        torch.cuda.synchronize()
        assert torch.equal(captured, expected) and torch.equal(beside, expected)
    assert_all_at_zero(expected.device)
