"""Average pooling to several numbers of bins against PyTorch's in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lgcnet_fast.kernels import average_pool
from lgcnet_fast.kernels.average_pool import (
    PoolWindows,
    average_pools_backward,
    average_pools_forward,
)

CUDA = torch.cuda.is_available()
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (1, 17, 3, 10)]
if CUDA:
    SHAPES += [(2, 48, 49, 97), (3, 144, 64, 128), (1, 255, 193, 97)]
BINS = (2, 1, 5)


def map_of(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    images, channels, height, width = shape
    values = torch.randn(images, height, width, channels, dtype=torch.float64)
    return values.to(device, dtype).movedim(-1, 1)


def reference(x: Tensor) -> Tensor:
    """In the order of the kernels."""
    pooled = [F.adaptive_avg_pool2d(x, count).movedim(1, -1).flatten() for count in BINS]
    return torch.cat(pooled)


@pytest.mark.parametrize(("pixels", "rows"), [(4, 1), (512, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(shape, dtype, pixels, rows, device, guarded, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(average_pool, "PIXELS", pixels)
    x = map_of(shape, dtype, device)
    y = average_pools_forward(x, PoolWindows.of(*shape[2:], BINS, device))
    exact = x.double().requires_grad_()
    truth = reference(exact)
    bound = torch.finfo(dtype).eps
    assert y.dtype == dtype
    assert ((y.double() - truth).abs() <= bound * truth.abs() + 1e-5).all()

    dy = map_of((1, truth.numel(), 1, 1), dtype, device).flatten()
    (wanted,) = torch.autograd.grad(truth, exact, dy.double())
    dx = average_pools_backward(dy, shape, BINS, rows)
    assert dx.dtype == dtype and dx.is_contiguous(memory_format=torch.channels_last)
    assert ((dx.double() - wanted).abs() <= bound * wanted.abs() + 1e-5).all()


def test_same_inputs_same_bits(device):
    shape = (16, 48, 64, 128) if CUDA else (1, 3, 7, 5)
    x = map_of(shape, torch.bfloat16, device)
    windows = PoolWindows.of(*shape[2:], BINS, device)
    first, second = (average_pools_forward(x, windows) for _ in range(2))
    assert torch.equal(first, second)


def test_bad_arguments_are_named(device):
    x = map_of((1, 3, 4, 5), torch.float32, device)
    windows = PoolWindows.of(4, 5, (1,), device)
    with pytest.raises(ValueError, match=r"x: strides .* channels_last"):
        average_pools_forward(x.contiguous(), windows)
    y = average_pools_forward(x, windows)
    with pytest.raises(ValueError, match=r"dy: shape \(3,\), need \(15,\)"):
        average_pools_backward(y, (1, 3, 4, 5), (1, 2))
    with pytest.raises(ValueError, match=r"bins: \[256\]"):
        average_pools_backward(y.new_zeros(3 * 256**2), (1, 3, 4, 5), (256,))


@pytest.mark.gpu
def test_more_than_2_31_elements(device):
    x = torch.randn(3, 4096, 2816, 64, device=device, dtype=torch.bfloat16).movedim(-1, 1)
    assert x.numel() > 2**31
    windows = PoolWindows.of(4096, 2816, (2,), device)
    y, last = average_pools_forward(x, windows), average_pools_forward(x[2:], windows)
    assert torch.equal(y[-last.numel() :], last)
    dx = average_pools_backward(y, x.shape, (2,))
    assert torch.equal(dx[2:], average_pools_backward(last, (1, *x.shape[1:]), (2,)))
