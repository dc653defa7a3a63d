"""Cells in a CUDA graph with their work side by side, against a graph that is a single chain."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lgcnet_fast.nn.cell import SearchCell
from lgcnet_fast.ops import gathered_running_statistics, lanes, use_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
REPLAYS = 5


class Cells(nn.Module):
    """Both kinds of cells, often enough that memory is taken again; step: forward and backward."""

    def __init__(self, channels: int, positions: tuple[int, int]) -> None:
        super().__init__()
        half = channels // 2
        self.cells = nn.ModuleList(
            [
                SearchCell(channels, channels, half, reduction=False, reduce_first=False),
                SearchCell(channels, channels, channels, reduction=True, reduce_first=False),
                SearchCell(channels, 2 * channels, channels, reduction=False, reduce_first=True),
                SearchCell(2 * channels, 2 * channels, half, reduction=False, reduce_first=False),
            ]
        )
        self.to("cuda", memory_format=torch.channels_last)
        torch.manual_seed(0)
        x = torch.randn(4, channels, *positions, device="cuda")
        self.x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        self.z = torch.rand(4, 5, 8, device="cuda").softmax(-1).requires_grad_()

    def step(self, backend: str) -> list[Tensor]:
        """Output, gradients of the input, of the choices and of all weights."""
        with use_backend(backend), gathered_running_statistics():
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                s0, s1 = self.x, self.x
                for cell, z in zip(self.cells, self.z, strict=True):
                    s0, s1 = s1, cell(s0, s1, z)
        leaves = [self.x, self.z, *self.parameters()]
        return [s1, *torch.autograd.grad(s1.float().square().mean(), leaves)]


def captured(step: Callable[[], list[Tensor]]) -> tuple[list[list[Tensor]], int]:
    """Results of some replays, and the bytes that capturing took at its peak."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = step()
    peak = torch.cuda.max_memory_allocated() - before
    found = []
    for _ in range(REPLAYS):
        graph.replay()
        found.append([result.clone() for result in results])
    torch.cuda.synchronize()
    return found, peak


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("channels, positions", [(32, (32, 64)), (64, (17, 23))])
def test_lanes_change_neither_results_nor_memory(
    channels: int, positions: tuple[int, int], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Cells(channels, positions)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        with monkeypatch.context() as patch:
            patch.setattr(lanes, "_streams", lambda device: ())
            (wanted, *_), peak_of_chain = captured(lambda: network.step(backend))
        found, peak = captured(lambda: network.step(backend))
    for results in found:
        # The same kernels in another order: whatever differs was read too early or too late.
        assert all(torch.equal(*pair) for pair in zip(results, found[0], strict=True))
    for ours, chain in zip(found[0], wanted, strict=True):
        error = (ours.double() - chain.double()).norm()
        assert error <= 2e-3 * chain.double().norm() + 1e-9
    # cuBLAS takes a workspace on every stream, in both directions.
    workspaces = 2 * lanes.LANES * 32 * 2**20
    assert peak <= 1.02 * peak_of_chain + workspaces
