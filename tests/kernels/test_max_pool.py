"""Max pooling against PyTorch's, bit for bit: rounding happens only where gradients meet."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lgcnet_fast.kernels.max_pool import (
    PoolConfig,
    max_pool_backward,
    max_pool_forward,
    max_pool_winners,
)
from tests.combinations import some_combinations

CUDA = torch.cuda.is_available()
TILE = PoolConfig(rows=2, block_p=16, block_c=16, warps=1)

# (N, C, H, W), tile
CASES: list[tuple[tuple[int, int, int, int], PoolConfig | None]] = [
    ((1, 1, 1, 1), None),
    ((2, 3, 3, 5), None),
    ((1, 17, 5, 2), TILE),
    ((2, 4, 6, 7), TILE),
]
if CUDA:
    CASES += [((2, channels, 49, 97), None) for channels in (1, 3, 48, 64, 255)]
    CASES += [((16, 64, 64, 128), None), ((3, 32, 193, 385), None)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def values_of(kind: str, shape: tuple[int, ...]) -> Tensor:
    """Continuous values, many ties (with signed zeros), or NaN and both infinities among ties."""
    if kind == "continuous":
        return torch.randn(shape, dtype=torch.float64)
    pool = [-1.0, -0.0, 0.0, 1.0]
    if kind == "special":
        pool = [torch.nan, torch.nan, -torch.inf, -torch.inf, torch.inf, 0.0]
    return torch.tensor(pool, dtype=torch.float64)[torch.randint(len(pool), shape)]


def map_of(
    kind: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    images, channels, height, width = shape
    return values_of(kind, (images, height, width, channels)).to(device, dtype).movedim(-1, 1)


def reference(x: Tensor, stride: int) -> Tensor:
    return F.max_pool2d(x, 3, stride, padding=1)


def reference_gradient(x: Tensor, dy: Tensor, stride: int) -> Tensor:
    """In float64, so that the sums of dy are exact; the winners are those of x's own values.

    In NCHW: for channels_last PyTorch's CUDA kernel takes pixel 0 of the map for the winner of a
    window in which all is minus infinity, and so loses its gradient.
    """
    x = x.double().clone(memory_format=torch.contiguous_format).requires_grad_()
    return torch.autograd.grad(reference(x, stride), x, dy.double())[0]


def gradient(x: Tensor, dy: Tensor, stride: int, tile: PoolConfig | None = None) -> Tensor:
    _, winners = max_pool_winners(x, stride, tile)
    return max_pool_backward(winners, [dy], (x.shape[2], x.shape[3]), stride, tile)


@pytest.mark.parametrize("kind", ["continuous", "ties", "special"])
@pytest.mark.parametrize("stride", [1, 2])
@some_combinations("case, dtype", CASES, DTYPES)
def test_equals_pytorch(case, dtype, stride, kind, device, guarded):
    shape, tile = case
    torch.manual_seed(0)
    x = map_of(kind, shape, dtype, device)
    y = max_pool_forward(x, stride, tile)
    truth = reference(x, stride)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, truth, rtol=0, atol=0, equal_nan=True)
    with_winners, winners = max_pool_winners(x, stride, tile)
    torch.testing.assert_close(with_winners, y, rtol=0, atol=0, equal_nan=True)
    assert winners.dtype == torch.uint8 and winners.shape == y.shape

    # Up to nine of these add up exactly in every storage dtype.
    dy = torch.randint(-8, 9, (*truth.movedim(1, -1).shape,)).to(device, dtype).movedim(-1, 1)
    dx = max_pool_backward(winners, [dy], (x.shape[2], x.shape[3]), stride, tile)
    assert dx.dtype == dtype and dx.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(dx.double(), reference_gradient(x, dy, stride))


@pytest.mark.parametrize("stride", [1, 2])
def test_every_order_of_a_window_of_equals(stride, device):
    """Maps of 3 x 3, six of their pixels in every combination of two numbers and NaN."""
    ranks = torch.tensor([0.0, 1.0, torch.nan])
    choices = torch.tensor(list(itertools.product(range(3), repeat=6)))
    x = torch.zeros(len(choices), 9)
    x[:, torch.randperm(9, generator=torch.Generator().manual_seed(1))[:6]] = ranks[choices]
    # As channels, of which one program instance serves many.
    x = x.t().contiguous().view(1, 3, 3, -1).movedim(-1, 1).to(device)
    wanted = reference(x, stride)
    torch.testing.assert_close(max_pool_forward(x, stride), wanted, equal_nan=True)
    dy = torch.arange(1.0, 1 + wanted[0, 0].numel(), device=device).view(wanted.shape[2:])
    dy = (2.0**dy).expand(wanted.shape).contiguous(memory_format=torch.channels_last)
    assert torch.equal(gradient(x, dy, stride).double(), reference_gradient(x, dy, stride))


@pytest.mark.parametrize("stride", [1, 2])
def test_gradient_sums_are_rounded_once(stride, device):
    torch.manual_seed(0)
    x = map_of("continuous", (1, 5, 9, 8), torch.bfloat16, device)
    dy = map_of("continuous", (1, 5, -(-9 // stride), 8 // stride), torch.bfloat16, device)
    truth = reference_gradient(x, dy, stride)
    dx = gradient(x, dy, stride)
    assert ((dx.double() - truth).abs() <= torch.finfo(dx.dtype).eps * truth.abs() + 1e-5).all()


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_several_readers_are_rounded_once(stride, count, device, guarded):
    torch.manual_seed(0)
    x = map_of("continuous", (2, 5, 7, 4), torch.bfloat16, device)
    shape = (2, 5, -(-7 // stride), 4 // stride)
    dys = [map_of("continuous", shape, torch.bfloat16, device) for _ in range(count)]
    total = sum(dy.double() for dy in dys)
    truth = reference_gradient(x, total, stride)
    _, winners = max_pool_winners(x, stride)
    dx = max_pool_backward(winners, dys, (7, 4), stride, TILE)
    assert ((dx.double() - truth).abs() <= torch.finfo(dx.dtype).eps * truth.abs() + 1e-5).all()


@pytest.mark.parametrize("stride", [1, 2])
def test_gradcheck(stride, device):
    class Pool(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y, winners = max_pool_winners(x, stride)
            ctx.save_for_backward(winners)
            return y

        @staticmethod
        def backward(ctx, dy):
            dy = dy.contiguous(memory_format=torch.channels_last)
            return max_pool_backward(*ctx.saved_tensors, [dy], (4, 3), stride)

    torch.manual_seed(0)
    x = map_of("continuous", (1, 2, 4, 3), torch.float64, device).requires_grad_()
    assert torch.autograd.gradcheck(Pool.apply, (x,), fast_mode=True)


def test_same_inputs_same_bits(device):
    shape = (16, 64, 64, 128) if CUDA else (1, 3, 7, 5)
    x = map_of("continuous", shape, torch.bfloat16, device)
    first, *others = [(max_pool_forward(x, 1), gradient(x, x, 1)) for _ in range(3)]
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_bad_arguments_are_named(device):
    x = map_of("continuous", (2, 4, 5, 6), torch.float32, device)
    with pytest.raises(ValueError, match="stride: 3, need 1 or 2"):
        max_pool_forward(x, 3)
    with pytest.raises(ValueError, match=r"x: strides .* channels_last"):
        max_pool_forward(x[:, :2])
    with pytest.raises(ValueError, match=r"x: strides .* channels_last"):
        max_pool_forward(x.contiguous())
    with pytest.raises(ValueError, match="x: empty map"):
        max_pool_forward(x[:0])
    winners = max_pool_winners(x)[1]
    with pytest.raises(
        ValueError, match=r"dys\[0\]: shape \(2, 4, 5, 6\) is not that of .* stride 2"
    ):
        max_pool_backward(winners, [x], (5, 6), 2)
    with pytest.raises(ValueError, match=r"dys\[0\]: strides .* channels_last"):
        max_pool_backward(winners, [x.contiguous()], (5, 6))
    with pytest.raises(ValueError, match="dys: need at least one"):
        max_pool_backward(winners, [], (5, 6))
    with pytest.raises(ValueError, match=r"dys\[1\]: dtype"):
        max_pool_backward(winners, [x, x.half()], (5, 6))
    with pytest.raises(ValueError, match=r"winners: shape \(2, 3, 5, 6\), need \(2, 4, 5, 6\)"):
        max_pool_backward(winners[:, :3], [x], (5, 6))
    with pytest.raises(ValueError, match="winners: torch.float32, strides .* need uint8"):
        max_pool_backward(x, [x], (5, 6))


@pytest.mark.gpu
def test_more_than_2_31_elements(device):
    x = torch.randn(3, 4096, 2816, 64, device=device, dtype=torch.bfloat16).movedim(-1, 1)
    assert x.numel() > 2**31
    for stride in (1, 2):
        y, winners = max_pool_winners(x, stride)
        assert torch.equal(y[2:], max_pool_forward(x[2:], stride))
        dx = max_pool_backward(winners, [y], (4096, 2816), stride)
        assert torch.equal(dx[2:], gradient(x[2:], y[2:], stride))
