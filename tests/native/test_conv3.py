"""Dense 3x3 convolutions in float32, on every route that this machine has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lgcnet_fast.native.conv3 import MOST_CONVOLUTIONS, conv3, conv3_map_gradient
from lgcnet_fast.native.launcher import Launcher
from tests.native.truth import assert_close, nhwc, poisoned_memory

SHAPES = [
    (1, 4, 4, 1, 1),
    (1, 20, 64, 5, 7),
    (2, 8, 32, 3, 5),
    (1, 12, 48, 7, 9),
    (3, 4, 36, 49, 13),
    (2, 16, 100, 1, 30),
]
"""N, C, C_out, H, W: blocks that end within rows, images and outputs."""


def some(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator)


def packed(weights: Tensor) -> Tensor:
    """(B, C_out, C, 3, 3) as `conv3` wants it."""
    return weights.permute(0, 3, 4, 2, 1).contiguous()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("count", "relu"), [(1, False), (3, True)])
def test_convolutions(
    shape: tuple[int, ...], count: int, relu: bool, launcher: Launcher, device: torch.device
) -> None:
    images, channels, outputs, height, width = shape
    x = nhwc(some(images, channels, height, width))
    weights = some(count, outputs, channels, 3, 3)
    read = x.double().relu() if relu else x.double()
    with poisoned_memory():
        found = conv3(x.to(device), packed(weights).to(device), relu=relu, launcher=launcher)
    assert len(found) == count
    for y, weight in zip(found, weights, strict=True):
        assert y.is_contiguous(memory_format=torch.channels_last)
        wanted = F.conv2d(read, weight.double(), padding=1)
        assert_close(y.cpu(), wanted, torch.float32, terms=9 * channels)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("count", "masked"), [(1, False), (3, True)])
def test_gradients_of_the_map(
    shape: tuple[int, ...], count: int, masked: bool, launcher: Launcher, device: torch.device
) -> None:
    images, outputs, channels, height, width = shape
    x = nhwc(some(images, outputs, height, width))
    dys = [nhwc(some(images, channels, height, width) + index) for index in range(count)]
    weights = some(count, channels, outputs, 3, 3)
    given = weights.permute(0, 3, 4, 1, 2).contiguous().to(device)
    with poisoned_memory():
        found = conv3_map_gradient(
            [dy.to(device) for dy in dys],
            given,
            mask=x.to(device) if masked else None,
            launcher=launcher,
        )
    assert found.is_contiguous(memory_format=torch.channels_last)
    each = zip(dys, weights.double(), strict=True)
    wanted = sum(F.conv_transpose2d(dy.double(), weight, padding=1) for dy, weight in each)
    if masked:
        wanted = wanted.where(x > 0, 0)
    assert_close(found.cpu(), wanted, torch.float32, terms=9 * channels * count)


def test_nan_passes_the_relu(launcher: Launcher, device: torch.device) -> None:
    x, weight = nhwc(some(1, 4, 3, 5)), some(1, 4, 4, 3, 3)
    x[0, 1, 1, 2] = float("nan")
    (y,) = conv3(x.to(device), packed(weight).to(device), relu=True, launcher=launcher)
    assert y[:, :, :, 1:4].isnan().all() and y[:, :, :, [0, 4]].isfinite().all()
    dy = nhwc(some(1, 4, 3, 5))
    given = weight.permute(0, 3, 4, 1, 2).contiguous().to(device)
    dx = conv3_map_gradient([dy.to(device)], given, mask=x.to(device), launcher=launcher)
    assert dx[0, 1, 1, 2] != 0


def test_memory_around_the_maps_stays(launcher: Launcher, device: torch.device) -> None:
    """What lies before and behind the map would show, as NaN, in what is computed from it."""
    memory = torch.full((2, 8 + 4 * 6 * 8 + 8), float("nan"), device=device)
    x, dy = (row[8:-8].view(1, 4, 6, 8).movedim(-1, 1) for row in memory)
    weight = packed(some(1, 8, 8, 3, 3)).to(device)
    x.copy_(some(1, 8, 4, 6))
    dy.copy_(some(1, 8, 4, 6))
    (y,) = conv3(x, weight, launcher=launcher)
    assert y.isfinite().all()
    assert conv3_map_gradient([dy], weight, mask=x, launcher=launcher).isfinite().all()
    assert memory[:, :8].isnan().all() and memory[:, -8:].isnan().all()


def test_same_bits(launcher: Launcher, device: torch.device) -> None:
    x, weight = nhwc(some(2, 16, 9, 17)).to(device), packed(some(2, 32, 16, 3, 3)).to(device)
    first, second = (conv3(x, weight, launcher=launcher) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_bad_arguments_are_named(emulated: Launcher) -> None:
    x, weight = nhwc(some(2, 8, 3, 5)), packed(some(2, 12, 8, 3, 3))
    bad = {
        r"x\[0\]: strides": (some(2, 8, 3, 5), weight),
        r"x: no kernel for this, torch.float16": (x.half(), weight),
        r"x: no kernel for this, 3 channels": (nhwc(some(1, 3, 3, 5)), packed(some(1, 8, 3, 3, 3))),
        r"weight: shape \(3, 3, 8, 12\)": (x, weight[0]),
        r"weight: shape": (x, weight[:, :, :, :4]),
        r"weight: strides": (x, weight.movedim(1, 2)),
        r"weight: dtype": (x, weight.double()),
    }
    for message, (one, given) in bad.items():
        with pytest.raises(ValueError, match=message):
            conv3(one, given, launcher=emulated)
    dys = [nhwc(some(2, 8, 3, 5))] * 3
    with pytest.raises(ValueError, match="weight: 2 convolutions, 3 gradients"):
        conv3_map_gradient(dys, weight, launcher=emulated)
    with pytest.raises(ValueError, match=r"mask\[0\]: shape"):
        conv3_map_gradient(dys[:2], weight, mask=dys[0], launcher=emulated)
    with pytest.raises(ValueError, match="dys: need at least one"):
        conv3_map_gradient([], weight, launcher=emulated)
    several = [x] * (MOST_CONVOLUTIONS + 1)
    with pytest.raises(ValueError, match="17 convolutions, at most 16"):
        conv3_map_gradient(
            several, weight[:1].expand(17, -1, -1, -1, -1).contiguous(), launcher=emulated
        )
