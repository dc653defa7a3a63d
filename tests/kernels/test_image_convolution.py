"""3x3 convolutions of images and their weight gradients against PyTorch's in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lgcnet_fast.kernels.common import has_matrix_units
from lgcnet_fast.kernels.image_convolution import (
    RESIDENT,
    ImageConfig,
    ImageWeightGradConfig,
    image_convolution,
    image_weight_grad,
    output_size,
)
from tests.kernels.products import CUDA, DTYPES, assert_close, random_map

TILE = ImageConfig(block_p=16, block_o=16, warps=1)
SHARED = ImageWeightGradConfig(block_p=16, block_o=16, warps=1, programs=3)


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]
    out_channels: int
    stride: int
    planes: bool
    """Whether the channels of the image are planes (NCHW)."""

    def inputs(
        self, storage: torch.dtype, device: torch.device, image: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images, weight and gradient of the output.

        Triton's interpreter cuts off what does not fit bfloat16, where a GPU rounds.
        """
        torch.manual_seed(0)
        x = random_map(self.shape, image, device)
        if not CUDA and storage == torch.bfloat16:
            x = x.bfloat16().to(image)
        weight = torch.randn(self.out_channels, self.shape[1], 3, 3, dtype=torch.float64)
        size = output_size(self.shape[2:], self.stride)
        dy = random_map((self.shape[0], self.out_channels, *size), storage, device)
        return x.contiguous() if self.planes else x, weight.to(device, storage), dy


SMALL = [
    Case((2, 3, 1, 1), 8, 2, True),
    Case((1, 1, 3, 5), 1, 1, False),
    Case((2, 3, 3, 5), 17, 2, False),
    Case((2, 4, 7, 6), 33, 2, True),
    Case((1, 3, 7, 6), 3, 1, True),
    Case((1, 2, 5, 35), 64, 2, False),
]
LARGE = [
    Case((2, channels, 97, 193), out_channels, stride, planes)
    for channels, out_channels in ((1, 1), (2, 17), (3, 8), (3, 64), (4, 255))
    for stride in (1, 2)
    for planes in (False, True)
]
LARGE.append(Case((16, 3, 256, 512), 8, 2, True))
CASES = SMALL + (LARGE if CUDA else [])


def reference(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    return F.conv2d(x.double(), weight.double(), None, stride, 1)


def weight_reference(g: Tensor, x: Tensor, stride: int) -> Tensor:
    shape = (g.shape[1], x.shape[1], 3, 3)
    return torch.nn.grad.conv2d_weight(x.double(), shape, g.double(), stride, 1)


def assert_right(y: Tensor, x: Tensor, weight: Tensor, stride: int) -> None:
    """y: of images whose values y's dtype rounds."""
    x = x.to(y.dtype)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, reference(x, weight, stride), reference(x.abs(), weight.abs(), stride))


def assert_gradient_right(dw: Tensor, dy: Tensor, x: Tensor, stride: int) -> None:
    x = x.to(dy.dtype)
    truth = weight_reference(dy, x, stride)
    assert_close(dw, truth, weight_reference(dy.abs(), x.abs(), stride))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case, dtype, device, guarded):
    x, weight, dy = case.inputs(dtype, device)
    y = image_convolution(x, weight, case.stride, dtype)
    assert y.dtype == dtype and y.shape == dy.shape
    assert_right(y, x, weight, case.stride)
    dw = image_weight_grad(dy, x, case.stride)
    assert dw.dtype == torch.float32 and dw.is_contiguous(memory_format=torch.channels_last)
    assert_gradient_right(dw, dy, x, case.stride)


@pytest.mark.parametrize("stride", [1, 2])
def test_many_blocks_of_positions_and_channels(stride, device, guarded):
    """And an image of 16 bits."""
    case = Case((2, 3, 3, 37), 17, stride, True)
    x, weight, dy = case.inputs(torch.bfloat16, device, torch.bfloat16)
    assert_right(image_convolution(x, weight, stride, config=TILE), x, weight, stride)
    assert_gradient_right(image_weight_grad(dy, x, stride, SHARED), dy, x, stride)


def test_any_strides_of_images_and_weights(device):
    x = torch.randn(2, 4, 9, 21, device=device)[:, 1:, ::2, 2:].transpose(2, 3)
    weight = torch.randn(5, 3, 3, 3, device=device)
    wanted = image_convolution(x.contiguous(), weight, 2)
    weight = weight.contiguous(memory_format=torch.channels_last)
    assert torch.equal(image_convolution(x, weight, 2), wanted)
    assert torch.equal(
        image_weight_grad(wanted, x, 2), image_weight_grad(wanted, x.contiguous(), 2)
    )


def test_same_inputs_same_bits(device):
    case = LARGE[-1] if CUDA else SMALL[3]
    x, weight, dy = case.inputs(torch.bfloat16, device)
    for run in (
        lambda: image_convolution(x, weight, case.stride, dy.dtype),
        lambda: image_weight_grad(dy, x, case.stride),
    ):
        first, *others = [run() for _ in range(3)]
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.skipif(CUDA, reason="float64 is for the interpreter")
def test_float64_through_the_interpreter(device):
    case = Case((2, 3, 4, 3), 4, 2, True)
    x, weight, dy = case.inputs(torch.float64, device, torch.float64)
    exact = {"rtol": 1e-13, "atol": 1e-13}
    y = image_convolution(x, weight, 2)
    torch.testing.assert_close(y, reference(x, weight, 2), **exact)
    dw = image_weight_grad(dy, x, 2, SHARED)
    torch.testing.assert_close(dw, weight_reference(dy, x, 2), **exact)


@pytest.mark.parametrize("matrix_units", [False, True])
@pytest.mark.parametrize("shape", [(16, 8, 128, 256), (16, 8, 385, 385), (1, 255, 1, 1)], ids=str)
def test_default_tiles_fill_the_device(shape, matrix_units):
    config = ImageWeightGradConfig.default(3, shape, matrix_units)
    blocks = shape[0] * shape[2] * -(-shape[3] // config.block_p)
    programs = config.programs * -(-shape[1] // config.block_o)
    assert 1 <= config.programs <= blocks and programs <= RESIDENT
    if shape[0] > 1:
        assert programs > 0.8 * RESIDENT


def test_tiles_outside_matrix_units_are_small(device):
    x = torch.zeros(1, device=device)
    matrix_units = ImageConfig.default(3, 256, 64, has_matrix_units(x.bfloat16()))
    others = ImageConfig.default(3, 256, 64, matrix_units=False)
    assert others.block_p * others.block_o < matrix_units.block_p * matrix_units.block_o


def test_bad_arguments_are_named(device):
    x, weight, dy = SMALL[2].inputs(torch.float32, device)
    for arguments, message in (
        ((x[0], weight, 2), r"x: need images .* got shape \(3, 3, 5\)"),
        ((x[:0], weight, 2), "x: need images"),
        ((torch.cat([x, x], dim=1), weight, 2), "up to 4 channels"),
        ((x.int(), weight, 2), "x: torch.int32 is not one of"),
        ((x, weight, 2, torch.uint8), "dtype: torch.uint8 is not one of"),
        ((x, weight[:, :2], 2), r"weight: shape \(17, 2, 3, 3\), need \(17, 3, 3, 3\)"),
        ((x, weight, 3), "stride: 3, need 1 or 2"),
        ((x.new_empty(1, 3, 32768, 32768, device="meta"), weight, 2), "x: images of"),
    ):
        with pytest.raises(ValueError, match=message):
            image_convolution(*arguments)
    for arguments, message in (
        ((dy.contiguous(), x, 2), "dy: strides"),
        ((dy, x, 1), r"dy: shape \(2, 17, 2, 3\), need \(2, 17, 3, 5\)"),
        ((dy, x.int(), 2), "x: torch.int32"),
    ):
        with pytest.raises(ValueError, match=message):
            image_weight_grad(*arguments)


@pytest.mark.gpu
def test_more_than_2_31_elements(device):
    x = torch.randn(2, 3, 16384, 24576, device=device, dtype=torch.bfloat16)
    assert x.numel() > 2**31
    weight = torch.randn(8, 3, 3, 3, device=device, dtype=torch.bfloat16)
    y = image_convolution(x, weight, 1)
    assert torch.equal(y[1:], image_convolution(x[1:], weight, 1))
    y[0] = 0
    dw, last = (image_weight_grad(y[first:], x[first:], 1) for first in (0, 1))
    magnitude = image_weight_grad(y[1:].abs(), x[1:].abs(), 1)
    assert ((dw - last).abs() <= 2**-18 * magnitude).all()
