"""The max pooling kernels against PyTorch, on every route that this machine has."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lgcnet_fast.native import instances
from lgcnet_fast.native.launcher import Launcher
from lgcnet_fast.native.max_pool import (
    Tile,
    backward_tile,
    forward_tile,
    max_pool_backward,
    max_pool_forward,
)
from lgcnet_fast.native.operands import STORAGE
from tests.native.truth import (
    assert_canaries_live,
    assert_close,
    nhwc,
    poisoned,
    poisoned_memory,
)

Shape = tuple[int, int, int, int]
SHAPES = [(2, 8, 9, 13), (1, 3, 1, 1), (1, 17, 5, 3), (2, 16, 2, 1), (1, 1, 1, 4), (1, 4, 10, 6)]
LARGE = [(4, 48, 49, 97), (1, 255, 97, 193), (16, 64, 32, 64), (2, 32, 193, 385)]
NAN, INF = float("nan"), float("inf")


def inputs(shape: Shape, dtype: torch.dtype, stride: int, values: int = 5) -> tuple[Tensor, Tensor]:
    """x of few distinct values, so that most windows hold ties, and dy."""
    generator = torch.Generator().manual_seed(sum(shape) + stride)
    images, channels, height, width = shape
    x = torch.randint(values, shape, generator=generator)
    out_shape = (images, channels, -(-height // stride), -(-width // stride))
    dy = torch.randn(out_shape, generator=generator)
    return x.to(dtype), dy.to(dtype)


def truth(x: Tensor, dy: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """y and dx in float64."""
    leaf = x.double().requires_grad_()
    y = F.max_pool2d(leaf, 3, stride, padding=1)
    (dx,) = torch.autograd.grad(y, leaf, dy.double())
    return y.detach(), dx


def check(launcher: Launcher, x: Tensor, dy: Tensor, stride: int, **options: Tile) -> None:
    device = torch.device(launcher.device_type)
    y, dx = truth(x, dy, stride)
    with poisoned_memory():
        found = max_pool_forward(nhwc(x, device), stride, launcher=launcher)
        gradient = max_pool_backward(
            nhwc(x, device), nhwc(dy, device), stride, launcher=launcher, **options
        )
    torch.testing.assert_close(found.double().cpu(), y, rtol=0, atol=0, equal_nan=True)
    assert_close(gradient, dx, x.dtype)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(
    launcher: Launcher, shape: Shape, stride: int, dtype: torch.dtype
) -> None:
    check(launcher, *inputs(shape, dtype, stride), stride)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", LARGE)
def test_large_maps(gpu_launcher: Launcher, shape: Shape, stride: int, dtype: torch.dtype) -> None:
    check(gpu_launcher, *inputs(shape, dtype, stride, 200), stride)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_first_of_equal_values_wins(launcher: Launcher, stride: int) -> None:
    _, dy = inputs((1, 4, 9, 8), torch.float32, stride)
    check(launcher, torch.zeros(1, 4, 9, 8), dy, stride)
    check(launcher, torch.full((1, 4, 9, 8), -INF), dy, stride)
    signs = torch.where(torch.rand(1, 4, 9, 8) < 0.5, 0.0, -0.0)
    check(launcher, signs, dy, stride)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("share", [0.02, 0.3, 1.0])
def test_the_last_nan_wins(
    launcher: Launcher, share: float, stride: int, dtype: torch.dtype
) -> None:
    x, dy = inputs((1, 4, 9, 8), dtype, stride)
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < share] = NAN
    check(launcher, x, dy, stride)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("stride", [1, 2])
def test_every_tile_gives_the_same(launcher: Launcher, stride: int, dtype: torch.dtype) -> None:
    case = inputs((2, 8, 11, 14), dtype, stride)
    kernel = "max_pool_backward" if stride == 1 else "max_pool_backward_stride2"
    vectors = [
        int(one.parameters[1])
        for one in instances.all_instances()
        if one.kernel == kernel and STORAGE[dtype] in one.parameters[0]
    ]
    assert len(vectors) == 3
    for vector in vectors:
        for rows, threads in ((1, 256), (3, 40), (20, 128)):
            check(launcher, *case, stride, tile=Tile(vector, rows, threads))


@pytest.mark.parametrize(
    "shape, rows", [((16, 32, 64, 128), 8), ((16, 64, 32, 64), 4), ((1, 128, 49, 97), 2)]
)
def test_walks_are_short_where_maps_are_small(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, shape: Shape, rows: int
) -> None:
    monkeypatch.setattr(type(launcher), "processors", lambda self, device: 132)
    x = nhwc(torch.empty(shape), torch.device("cpu"))
    assert forward_tile(x, x, launcher).rows == backward_tile(x, x, x, launcher).rows == rows


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [5, 16])
def test_slices_are_read_and_written_in_place(
    launcher: Launcher, device: torch.device, stride: int, channels: int
) -> None:
    values, gradients = inputs((2, channels, 6, 7), torch.float32, stride)
    exact_y, exact_dx = truth(values, gradients, stride)
    x, dx = (poisoned(tuple(values.shape), torch.float32, device) for _ in range(2))
    dy, y = (poisoned(tuple(gradients.shape), torch.float32, device) for _ in range(2))
    x.copy_(values)
    dy.copy_(gradients)
    assert max_pool_forward(x, stride, out=y, launcher=launcher) is y
    assert_close(y, exact_y, torch.float32)
    assert_canaries_live(y)
    assert max_pool_backward(x, dy, stride, out=dx, launcher=launcher) is dx
    assert_close(dx, exact_dx, torch.float32)
    assert_canaries_live(dx)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements(gpu_launcher: Launcher) -> None:
    shape = (2, 64, 4100, 4100)
    x = torch.zeros(shape, dtype=torch.bfloat16, device=gpu_launcher.device_type)
    x = x.contiguous(memory_format=torch.channels_last)
    x[1, :, -1, -1] = 1
    y = max_pool_forward(x, launcher=gpu_launcher)
    assert (y[1, :, -2:, -2:] == 1).all() and y.sum(dtype=torch.float64) == 4 * 64
    dx = max_pool_backward(x, y, launcher=gpu_launcher)
    assert (dx[1, :, -1, -1] == 4).all()


def test_bad_arguments_are_named(emulated: Launcher) -> None:
    x = nhwc(torch.zeros(1, 4, 5, 6))
    with pytest.raises(ValueError, match="x: strides"):
        max_pool_forward(torch.zeros(1, 4, 5, 6), launcher=emulated)
    with pytest.raises(ValueError, match="stride: 3"):
        max_pool_forward(x, 3, launcher=emulated)
    with pytest.raises(ValueError, match="dy: shape"):
        max_pool_backward(x, x, 2, launcher=emulated)
    with pytest.raises(ValueError, match="dy: dtype"):
        max_pool_backward(x, x.half(), launcher=emulated)
    with pytest.raises(ValueError, match="out: shape"):
        max_pool_forward(x, 2, out=x, launcher=emulated)
    with pytest.raises(ValueError, match="no compiled kernel"):
        max_pool_forward(x, tile=Tile(3, 4, 128), launcher=emulated)
    with pytest.raises(ValueError, match="1 to 256 threads"):
        max_pool_forward(x, tile=Tile(4, 4, 257), launcher=emulated)
