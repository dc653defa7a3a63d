"""3x3 convolutions whose weights stay at hand, and their input gradients, as `conv3_forward`'s."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lgcnet_fast.kernels.common import MOST_SHARED
from lgcnet_fast.kernels.conv3_walk import (
    MOST_CHANNELS,
    WalkConfig,
    conv3_walk,
    conv3_walk_input_grad,
    walks,
)
from tests.kernels.products import CUDA, DTYPES, random_map
from tests.kernels.test_conv3 import assert_input_gradient, assert_results

TILE = WalkConfig(rows=2, block_p=16, block_o=16, warps=4, stages=2)


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]
    out_channels: int
    relu: bool = True
    config: WalkConfig | None = None

    def inputs(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """dy, the map and the weight."""
        torch.manual_seed(0)
        images, channels, *size = self.shape
        shapes = (images, self.out_channels, *size), self.shape
        dy, x = (random_map(shape, dtype, device) for shape in shapes)
        return dy, x, random_map((self.out_channels, channels, 3, 3), dtype, device)


SMALL = [
    Case((2, 1, 1, 1), 1),
    Case((1, 3, 1, 3), 2, relu=False),
    Case((2, 16, 5, 7), 17, config=TILE),
    Case((1, 20, 9, 3), 32, relu=False, config=TILE),
    Case((1, 48, 3, 5), 48),
]
LARGE = [
    Case((16, 48, 64, 128), 48),
    Case((2, 48, 97, 193), 144),
    Case((3, 48, 10, 70), 80, relu=False),
]
CASES = SMALL + (LARGE if CUDA else [])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_and_input_gradients(case, dtype, device, guarded):
    dy, x, weight = case.inputs(dtype, device)
    y = conv3_walk(x, weight, case.relu, case.config)
    dx = conv3_walk_input_grad(dy, x, weight, case.relu, case.config)
    assert y.dtype == dx.dtype == dtype and dx.stride() == x.stride()
    assert_results([y], x, [weight], case.relu)
    assert_input_gradient(dx, [dy], x, [weight], case.relu)


@pytest.mark.skipif(CUDA, reason="float64 is for the interpreter")
def test_float64_through_the_interpreter(device):
    dy, x, weight = Case((1, 5, 4, 3), 4).inputs(torch.float64, device)
    assert_results([conv3_walk(x, weight, True, TILE)], x, [weight], True)
    dx = conv3_walk_input_grad(dy, x, weight, True, TILE)
    assert_input_gradient(dx, [dy], x, [weight], True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_passes_the_relu_both_ways(dtype, device):
    dy, x, weight = Case((1, 16, 3, 5), 16).inputs(dtype, device)
    x[0, 3, 1, 1] = torch.nan
    y = conv3_walk(x, weight, True)
    assert y[..., :3].isnan().all() and not y[..., 3:].isnan().any()
    dx = conv3_walk_input_grad(dy, x, weight, True)
    assert not dx.isnan().any()
    assert dx[0, 3, 1, 1] == conv3_walk_input_grad(dy, x, weight)[0, 3, 1, 1] != 0


def test_same_inputs_same_bits(device):
    dy, x, weight = (LARGE[0] if CUDA else SMALL[2]).inputs(torch.bfloat16, device)
    first, *others = [
        (conv3_walk(x, weight, True), conv3_walk_input_grad(dy, x, weight, True)) for _ in range(3)
    ]
    assert all(map(torch.equal, first * len(others), [y for other in others for y in other]))


def test_walks_down_large_maps_of_few_channels():
    large, small = (torch.empty(16, 48, *size, device="meta") for size in ((64, 128), (32, 64)))
    assert walks(large) and not walks(small)
    assert not walks(torch.empty(16, 144, 64, 128, device="meta"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_default_tiles_fit_an_h200(masked, dtype):
    for channels in (1, 48, 80, MOST_CHANNELS):
        for out_channels in (48, 144):
            tile = WalkConfig.default(channels, out_channels, dtype, masked)
            assert tile.shared(channels, dtype) <= MOST_SHARED


def test_bad_arguments_are_named(device):
    dy, x, weight = Case((2, 4, 3, 5), 6).inputs(torch.float32, device)
    for bad, message in (
        ((x, weight[:, :3]), r"weights\[0\]: shape \(6, 3, 3, 3\), need \(6, 4, 3, 3\)"),
        ((x, weight.half()), r"weights\[0\]: dtype torch.float16"),
        ((x.contiguous(), weight), "x: strides"),
        ((random_map((1, 145, 1, 1), x.dtype, device), weight), "x: 145 channels, need up to 144"),
    ):
        with pytest.raises(ValueError, match=message):
            conv3_walk(*bad)
    for bad, message in (
        ((dy[:1], x, weight), r"dy: shape \(1, 6, 3, 5\), need \(2, 6, 3, 5\)"),
        ((dy.half(), x, weight), "dy: dtype torch.float16, x has torch.float32"),
        ((dy.contiguous(), x, weight), "dy: strides"),
    ):
        with pytest.raises(ValueError, match=message):
            conv3_walk_input_grad(*bad)


@pytest.mark.gpu
def test_more_than_2_31_elements(device):
    x = torch.randn(3, 4096, 5632, 32, device=device, dtype=torch.bfloat16).movedim(-1, 1)
    weight = random_map((32, 32, 3, 3), torch.bfloat16, device)
    assert x.numel() > 2**31
    for convolve in (
        lambda x: conv3_walk(x, weight, True),
        lambda x: conv3_walk_input_grad(x, x, weight, True),
    ):
        assert torch.equal(convolve(x)[2:], convolve(x[2:]))
