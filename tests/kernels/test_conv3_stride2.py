"""3x3 convolutions of stride 2, transposed ones and weight gradients, against float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lgcnet_fast.kernels.conv3_backward import summed
from lgcnet_fast.kernels.conv3_stride2 import (
    Stride2Config,
    fits,
    serves,
    small_size,
    strided_convolution,
    transposed_convolution,
)
from lgcnet_fast.kernels.conv3_stride2_backward import (
    RESIDENT,
    StridedWeightGradConfig,
    strided_weight_grad,
)
from tests.kernels.products import CUDA, DTYPES, assert_close, random_map

TILE = Stride2Config(rows=2, block_p=16, block_n=16, block_k=16, warps=4, stages=2)
SHARES = StridedWeightGradConfig(
    rows=2, block_p=16, block_o=16, block_k=16, warps=4, stages=2, programs=3
)


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]
    """Of x."""
    out_channels: int
    tiled: bool = False

    @property
    def size(self) -> tuple[int, int]:
        return self.shape[2:]

    @property
    def tiles(self) -> tuple[Stride2Config, StridedWeightGradConfig] | tuple[None, None]:
        return (TILE, SHARES) if self.tiled else (None, None)

    def inputs(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """x, y and the weight."""
        torch.manual_seed(0)
        small = (self.shape[0], self.out_channels, *small_size(self.size))
        window = (self.out_channels, self.shape[1], 3, 3)
        return tuple(random_map(shape, dtype, device) for shape in (self.shape, small, window))


SMALL = [
    Case((2, 1, 1, 1), 1),
    Case((1, 3, 1, 4), 2),
    Case((2, 8, 4, 7), 16),
    Case((1, 17, 5, 6), 20, tiled=True),
    Case((3, 16, 7, 5), 32, tiled=True),
]
LARGE = [
    Case((2, channels, 49, 98), out_channels)
    for channels, out_channels in ((1, 1), (3, 255), (8, 16), (48, 48), (64, 128), (160, 96))
]
LARGE += [
    Case((16, 64, 64, 128), 64),
    Case((16, 128, 32, 64), 128),
    Case((16, 48, 64, 128), 48),
    Case((16, 8, 128, 256), 16),
]
CASES = SMALL + (LARGE if CUDA else [])


def strided(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x.double(), weight.double(), stride=2, padding=1)


def transposed(y: Tensor, weight: Tensor, size: tuple[int, int]) -> Tensor:
    beyond = [1 - length % 2 for length in size]
    return F.conv_transpose2d(y.double(), weight.double(), None, 2, 1, beyond)


def weight_gradient(y: Tensor, x: Tensor) -> Tensor:
    shape = (y.shape[1], x.shape[1], 3, 3)
    return torch.nn.grad.conv2d_weight(x.double(), shape, y.double(), stride=2, padding=1)


def assert_all(x: Tensor, y: Tensor, weight: Tensor, case: Case) -> None:
    tile, shares = case.tiles
    found = strided_convolution(x, weight, tile)
    assert found.dtype == x.dtype and found.stride() == y.stride()
    assert_close(found, strided(x, weight), strided(x.abs(), weight.abs()))
    found = transposed_convolution(y, weight, case.size, tile)
    assert found.dtype == y.dtype and found.stride() == x.stride()
    truth = transposed(y, weight, case.size)
    assert_close(found, truth, transposed(y.abs(), weight.abs(), case.size))
    found = summed(strided_weight_grad(y, x, shares))[0]
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_close(found, weight_gradient(y, x), weight_gradient(y.abs(), x.abs()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results(case, dtype, device, guarded):
    assert_all(*case.inputs(dtype, device), case)


@pytest.mark.skipif(CUDA, reason="float64 is for the interpreter")
def test_float64_through_the_interpreter(device):
    case = Case((1, 5, 4, 3), 4, tiled=True)
    assert_all(*case.inputs(torch.float64, device), case)


def test_what_is_not_finite_stays_near(device):
    """A NaN reaches what its taps reach, and as the rule says one column more of a block."""
    case = Case((1, 8, 6, 8), 8)
    x, y, weight = case.inputs(torch.bfloat16, device)
    x[0, 3, 2, 4] = torch.nan
    found = strided_convolution(x, weight)
    reached = strided(x, weight).isnan()
    assert torch.equal(found.isnan(), reached)
    y[0, 3, 1, 2] = torch.nan
    found = transposed_convolution(y, weight, case.size).isnan()
    reached = transposed(y, weight, case.size).isnan()
    assert found[reached].all()
    reached[..., :-1] |= reached[..., 1:].clone()
    assert not found[~reached].any()


def test_same_inputs_same_bits(device):
    case = LARGE[-4] if CUDA else SMALL[2]
    x, y, weight = case.inputs(torch.bfloat16, device)
    first, *others = [
        (
            strided_convolution(x, weight),
            transposed_convolution(y, weight, case.size),
            summed(strided_weight_grad(y, x)),
        )
        for _ in range(3)
    ]
    assert all(torch.equal(*pair) for other in others for pair in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("shape", "out_channels"),
    [((16, 64, 64, 128), 64), ((16, 128, 32, 64), 128), ((16, 48, 32, 64), 48), ((1, 8, 1, 1), 8)],
    ids=str,
)
def test_default_shares_fill_the_device(shape, out_channels):
    config = StridedWeightGradConfig.default(shape, out_channels)
    height, width = small_size(shape[2:])
    blocks = -(-out_channels // config.block_o) * -(-3 * shape[1] // config.block_k)
    tiles = -(-height // config.rows) * -(-shape[0] * width // config.block_p)
    assert 1 <= config.programs <= tiles
    assert blocks * config.programs <= 2 * RESIDENT
    if tiles > 1:
        assert blocks * config.programs > 0.4 * RESIDENT


def test_serves_eights_of_16_bits(device):
    if CUDA and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs sm_90")
    x, _, weight = Case((1, 8, 2, 2), 48).inputs(torch.bfloat16, device)
    assert serves(x, weight) and fits(x, weight)
    assert not serves(x.float(), weight) and not serves(x, weight[:20])
    assert not serves(x, weight[:, :4]) and not serves(x, weight[..., :1])


def test_bad_arguments_are_named(device):
    x, y, weight = Case((2, 4, 3, 5), 6).inputs(torch.float32, device)
    for bad, message in (
        ((x.contiguous(), weight), "x: strides"),
        ((x[:0], weight), "x: empty map"),
        ((x, weight[:, :3]), r"weight: shape \(6, 3, 3, 3\), need \(6, 4, 3, 3\)"),
        ((x, weight.half()), "weight: dtype torch.float16"),
        ((x, weight.contiguous()), "weight: strides"),
    ):
        with pytest.raises(ValueError, match=message):
            strided_convolution(*bad)
    for bad, message in (
        ((y.contiguous(), weight, (3, 5)), "y: strides"),
        ((y, weight[:5], (3, 5)), r"weight: shape \(5, 4, 3, 3\), need \(6, 4, 3, 3\)"),
        ((y, weight, (3, 7)), r"size: \(3, 7\), y has \(2, 3\)"),
        ((y, weight, (3,)), r"size: \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            transposed_convolution(*bad)
    for bad, message in (
        ((y.contiguous(), x), "y: strides"),
        ((y, x.contiguous()), "x: strides"),
        ((y[:1], x), r"y: shape \(1, 6, 2, 3\), need \(2, 6, 2, 3\)"),
        ((y.half(), x), "y: dtype torch.float16"),
    ):
        with pytest.raises(ValueError, match=message):
            strided_weight_grad(*bad)


@pytest.mark.gpu
def test_more_than_2_31_elements(device):
    x = torch.randn(3, 4096, 5632, 32, device=device, dtype=torch.bfloat16).movedim(-1, 1)
    assert x.numel() > 2**31
    weight = random_map((32, 32, 3, 3), torch.bfloat16, device)
    y = strided_convolution(x, weight)
    assert torch.equal(y[2:], strided_convolution(x[2:], weight))
    back = transposed_convolution(y, weight, (4096, 5632))
    assert torch.equal(back[2:], transposed_convolution(y[2:], weight, (4096, 5632)))
    y[:2] = 0
    dw, last = (summed(strided_weight_grad(*maps)) for maps in ((y, x), (y[2:], x[2:])))
    magnitude = summed(strided_weight_grad(y[2:].abs(), x[2:].abs()))
    assert ((dw - last).abs() <= 2**-18 * magnitude).all()
