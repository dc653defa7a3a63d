"""The operations of a mixed node on the CUDA kernels, against the reference."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from lgcnet_fast.errors import BackendError
from lgcnet_fast.native import depthwise, gradient_sum, max_pool, mixed_sum, mixed_sum_backward
from lgcnet_fast.native.launcher import Launcher
from lgcnet_fast.nn.cell import SearchCell
from lgcnet_fast.ops import backend, separable_branches, use_backend
from lgcnet_fast.ops import max_pool as pooled


@pytest.fixture(autouse=True)
def route(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launch of the backend `cuda` takes the route of the test."""
    for module in (depthwise, gradient_sum, max_pool, mixed_sum, mixed_sum_backward):
        monkeypatch.setattr(module, "load", lambda: launcher)
    monkeypatch.setattr(backend, "why_not", lambda name, device: None)


def random_map(*shape: int, device: torch.device) -> Tensor:
    images, channels, height, width = shape
    values = torch.randn(images, height, width, channels, device=device)
    return values.movedim(-1, 1).requires_grad_()


@pytest.mark.parametrize("reduction", [False, True])
def test_search_cell(reduction: bool, device: torch.device) -> None:
    """Output, gradients and running statistics; 3 channels: windows that are not aligned."""
    torch.manual_seed(0)
    cell = SearchCell(3, 4, 3, reduction, reduce_first=False)
    cell = cell.to(device, memory_format=torch.channels_last)
    s0, s1 = random_map(2, 3, 5, 6, device=device), random_map(2, 4, 5, 6, device=device)
    z = torch.rand(5, 8, device=device).softmax(1).requires_grad_()
    found = []
    for name in ("reference", "cuda"):
        module = copy.deepcopy(cell)
        with use_backend(name):
            out = module(s0, s1, z)
        g = torch.arange(float(out.numel()), device=device).remainder(7).view_as(out) - 3
        leaves = [s0, s1, z, *module.parameters()]
        found.append([out, *torch.autograd.grad(out, leaves, g), *module.state_dict().values()])
    for wanted, value in zip(*found, strict=True):
        assert value.dtype == wanted.dtype
        scale = wanted.double().square().mean().sqrt()
        assert (value - wanted).abs().max() <= 1e-3 * scale + 1e-5


@pytest.mark.parametrize("stride", [1, 2])
def test_half_precision_branches_and_pool(stride: int, device: torch.device) -> None:
    torch.manual_seed(0)
    x = random_map(1, 4, 5, 6, device=device).detach().half().requires_grad_()
    weights = [torch.randn(4, *tail, device=device).half() for tail in ((1, 3, 3), (4, 1, 1))]
    found = []
    for name in ("reference", "cuda"):
        with use_backend(name):
            ((y,),) = separable_branches(x, weights[:1], weights[1:], (2,), stride)
            out = y.view(1, 4, *y.shape[-2:]) + pooled(x, stride)
        found.append((out, *torch.autograd.grad(out.float().sum(), x)))
    for wanted, value in zip(*found, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-2, atol=2e-2)


def test_float64_is_refused(device: torch.device) -> None:
    x = torch.rand(1, 2, 3, 3, dtype=torch.float64, device=device)
    weights = [x.new_ones(2, 1, 3, 3)], [x.new_ones(2, 2, 1, 1)]
    cell = SearchCell(2, 2, 2, reduction=False, reduce_first=False).to(device, torch.float64)
    with use_backend("cuda"):
        with pytest.raises(BackendError, match="no float64"):
            separable_branches(x, *weights, (1,))
        with pytest.raises(BackendError, match="no float64"):
            pooled(x)
        with pytest.raises(BackendError, match="no float64"):
            cell(x, x, torch.rand(5, 8, device=device, dtype=torch.float64))
