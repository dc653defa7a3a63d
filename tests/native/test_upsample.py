"""The resizing kernels against float64, on every route that this machine has."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lgcnet_fast.native.launcher import Launcher
from lgcnet_fast.native.operands import STORAGE
from lgcnet_fast.native.upsample import (
    concat_upsample_backward,
    concat_upsample_forward,
    upsample_backward,
    upsample_forward,
)
from tests.native.truth import assert_close, nhwc

CASES = [
    ((2, 16, 4, 5), (7, 9)),
    ((1, 3, 1, 1), (9, 10)),
    ((1, 5, 2, 2), (41, 33)),
    ((1, 16, 5, 5), (60, 21)),
    ((1, 4, 9, 9), (4, 3)),
    ((1, 4, 3, 3), (1, 1)),
    ((2, 8, 3, 5), (3, 5)),
]
LARGE = [
    ((4, 48, 49, 97), (97, 193)),
    ((2, 48, 1, 1), (193, 385)),
    ((2, 48, 5, 5), (97, 193)),
    ((1, 255, 12, 23), (45, 90)),
]


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def check(
    launcher: Launcher,
    device: torch.device,
    shape: tuple[int, int, int, int],
    size: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    """Forward and backward."""
    torch.manual_seed(0)
    x, dy = torch.randn(shape).to(dtype), torch.randn(*shape[:2], *size).to(dtype)
    exact_x = x.double().requires_grad_()
    exact = resized(exact_x, size)
    (exact_dx,) = torch.autograd.grad(exact, exact_x, dy.double())
    y = upsample_forward(nhwc(x, device), size, launcher=launcher)
    dx = upsample_backward(nhwc(dy, device), shape[2:], launcher=launcher)
    assert_close(y, exact.detach(), dtype, slack=2)
    support = 4 * (size[0] // shape[2] + 1) * (size[1] // shape[3] + 1)
    assert_close(dx, exact_dx, dtype, support, slack=2)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize(("shape", "size"), CASES)
def test_forward_and_backward(
    launcher: Launcher,
    device: torch.device,
    shape: tuple[int, int, int, int],
    size: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    check(launcher, device, shape, size, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize(("shape", "size"), LARGE)
def test_large_maps(
    gpu_launcher: Launcher,
    shape: tuple[int, int, int, int],
    size: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    check(gpu_launcher, torch.device(gpu_launcher.device_type), shape, size, dtype)


def test_a_map_of_the_right_size_is_copied(launcher: Launcher, device: torch.device) -> None:
    x = nhwc(torch.tensor([float("inf"), 1.0, float("nan"), 3.0]).reshape(1, 1, 1, 4), device)
    y = upsample_forward(x, (1, 4), launcher=launcher)
    torch.testing.assert_close(y, x, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("channels", [(8, 16, 8), (3, 1, 5)])
def test_concatenation_and_its_gradients(
    launcher: Launcher, device: torch.device, channels: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    size, sizes = (9, 13), [(9, 13), (5, 7), (1, 1)]
    maps = [torch.randn(2, c, *own) for c, own in zip(channels, sizes, strict=True)]
    exact_maps = [one.double().requires_grad_() for one in maps]
    exact = torch.cat([resized(one, size) for one in exact_maps], dim=1)
    dy = torch.randn(2, sum(channels), *size)
    exact_gradients = torch.autograd.grad(exact, exact_maps, dy.double())

    whole = torch.full((3, *size, sum(channels)), float("nan"), device=device)
    out = whole.permute(0, 3, 1, 2)[:2]
    given = concat_upsample_forward(
        [nhwc(one, device) for one in maps], size, out=out, launcher=launcher
    )
    assert given is out
    assert_close(out, exact.detach(), torch.float32, slack=2)
    assert whole[2].isnan().all()
    gradients = concat_upsample_backward(nhwc(dy, device), channels, sizes, launcher=launcher)
    for found, exact_gradient in zip(gradients, exact_gradients, strict=True):
        assert_close(found, exact_gradient, torch.float32, 120, slack=2)


@pytest.mark.parametrize("size", [(2, 2), (1, 1)])
def test_a_gradient_into_a_slice_leaves_the_rest_alone(
    launcher: Launcher, device: torch.device, size: tuple[int, int]
) -> None:
    whole = torch.full((2, *size, 12), float("nan"), device=device).permute(0, 3, 1, 2)
    dy = nhwc(torch.ones(2, 4, 24, 3), device)
    upsample_backward(dy, size, out=whole[:, 4:8], launcher=launcher)
    torch.testing.assert_close(whole[:, 4:8].sum((2, 3)).cpu(), torch.full((2, 4), 72.0))
    assert whole[:, :4].isnan().all() and whole[:, 8:].isnan().all()


def test_the_same_inputs_give_the_same_bits(launcher: Launcher, device: torch.device) -> None:
    dy = nhwc(torch.randn(2, 12, 40, 30), device)
    for size in ((2, 3), (20, 15)):
        first, second = (upsample_backward(dy, size, launcher=launcher) for _ in range(2))
        assert torch.equal(first, second)


def test_bad_arguments_are_named(emulated: Launcher) -> None:
    x = nhwc(torch.zeros(1, 4, 3, 3), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"size: \(0, 4\)"):
        upsample_forward(x, (0, 4), launcher=emulated)
    with pytest.raises(ValueError, match="x: strides"):
        upsample_forward(torch.zeros(1, 4, 3, 3), (5, 5), launcher=emulated)
    with pytest.raises(ValueError, match="out: shape"):
        upsample_forward(x, (5, 5), out=x, launcher=emulated)
    with pytest.raises(ValueError, match="maps: none"):
        concat_upsample_forward([], (5, 5), launcher=emulated)
    with pytest.raises(ValueError, match="channels: "):
        concat_upsample_backward(x, (3, 3), [(1, 1), (2, 2)], launcher=emulated)
