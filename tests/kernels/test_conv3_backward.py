"""Weight gradients of dense 3x3 convolutions against PyTorch's in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lgcnet_fast.kernels.conv3_backward import (
    RESIDENT,
    WeightGradConfig,
    conv3_weight_grad,
    summed,
)
from tests.combinations import some_combinations
from tests.kernels.products import CUDA, DTYPES, assert_close, random_map

TILE = WeightGradConfig(block_p=16, block_o=16, block_c=16, rows=2, warps=4, programs=3, stages=2)


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]
    out_channels: int
    branches: int = 1
    config: WeightGradConfig | None = None
    relu: bool = False

    def inputs(self, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        """dys, xs."""
        torch.manual_seed(0)
        images, _, *size = self.shape
        like = (images, self.out_channels, *size)
        return tuple(
            [random_map(shape, dtype, device) for _ in range(self.branches)]
            for shape in (like, self.shape)
        )


SMALL = [
    Case((2, 1, 1, 1), 1),
    Case((1, 3, 1, 3), 2),
    Case((2, 3, 3, 5), 17, branches=2, relu=True),
    Case((1, 17, 5, 7), 33, branches=3, config=TILE, relu=True),
    Case((2, 20, 3, 18), 20, config=TILE),
    Case((1, 32, 9, 33), 32),
]
LARGE = [
    Case((2, channels, 49, 97), out_channels, branches)
    for channels, out_channels, branches in (
        (1, 1, 1),
        (3, 255, 1),
        (17, 48, 3),
        (32, 32, 5),
        (64, 64, 4),
        (64, 32, 1),
        (128, 128, 3),
        (144, 48, 1),
        (160, 96, 2),
    )
]
LARGE += [
    Case((16, 16, 64, 128), 32),
    Case((16, 48, 64, 128), 48, relu=True),
    Case((16, 32, 64, 128), 32, 4, relu=True),
    Case((16, 64, 32, 64), 64, 1, relu=True),
    Case((16, 64, 32, 64), 64, 5),
    Case((16, 128, 16, 32), 128, 2),
    Case((16, 128, 16, 32), 128, 4),
]
CASES = SMALL + (LARGE if CUDA else [])


def reference(g: Tensor, x: Tensor) -> Tensor:
    shape = (g.shape[1], x.shape[1], 3, 3)
    return torch.nn.grad.conv2d_weight(x.double(), shape, g.double(), padding=1)


def assert_right(dys: list[Tensor], xs: list[Tensor], dw: Tensor) -> None:
    for result, g, x in zip(dw, dys, xs, strict=True):
        assert_close(result, reference(g, x), reference(g.abs(), x.abs()))


@some_combinations("case, dtype", CASES, DTYPES)
def test_gradients(case, dtype, device, guarded):
    dys, xs = case.inputs(dtype, device)
    shares = conv3_weight_grad(dys, xs, case.relu, case.config)
    assert not shares.isnan().any()
    dw = summed(shares)
    assert dw.dtype == torch.float32
    assert dw[0].is_contiguous(memory_format=torch.channels_last)
    assert_right(dys, [F.relu(x) for x in xs] if case.relu else xs, dw)


@pytest.mark.skipif(not CUDA, reason="many programs")
@pytest.mark.parametrize("tile", [(32, 32, 32), (32, 32, 64), (32, 64, 64), (16, 16, 16)], ids=str)
@pytest.mark.parametrize("width", [64, 128])
def test_tiles(tile, width, device):
    case = Case((3, width, 33, 70), width, branches=2)
    dys, xs = case.inputs(torch.bfloat16, device)
    config = WeightGradConfig.of_tile(2, case.shape, width, *tile)
    assert_right(dys, xs, summed(conv3_weight_grad(dys, xs, config=config)))


def test_convolutions_may_share_a_map(device):
    dys, xs = SMALL[2].inputs(torch.bfloat16, device)
    dw = summed(conv3_weight_grad(dys, xs[:1] * 2))
    assert_right(dys, xs[:1] * 2, dw)


def test_same_inputs_same_bits(device):
    case = LARGE[-2] if CUDA else SMALL[3]
    dys, xs = case.inputs(torch.bfloat16, device)
    first, *others = [summed(conv3_weight_grad(dys, xs)) for _ in range(4)]
    assert all(torch.equal(first, other) for other in others)


def test_each_convolution_is_the_same_without_the_others(device):
    dys, xs = SMALL[3].inputs(torch.bfloat16, device)
    shares = conv3_weight_grad(dys, xs, config=TILE)
    for branch in range(len(dys)):
        one = slice(branch, branch + 1)
        alone = conv3_weight_grad(dys[one], xs[one], config=TILE)
        assert torch.equal(alone, shares[:, one])


@pytest.mark.skipif(CUDA, reason="float64 is for the interpreter")
def test_float64_through_the_interpreter(device):
    dys, xs = Case((2, 5, 4, 3), 4, branches=2).inputs(torch.float64, device)
    dw = summed(conv3_weight_grad(dys, xs, config=TILE))
    for result, g, x in zip(dw, dys, xs, strict=True):
        torch.testing.assert_close(result, reference(g, x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("branches", [1, 2, 4])
@pytest.mark.parametrize(
    "shape",
    [
        (16, 32, 64, 128),
        (16, 48, 64, 128),
        (16, 64, 32, 64),
        (16, 128, 16, 32),
        (16, 32, 193, 193),
        (1, 3, 1, 1),
    ],
    ids=str,
)
def test_default_tiles_fill_the_device(shape, branches):
    config = WeightGradConfig.default(branches, shape, shape[1])
    blocks = -(-shape[1] // config.block_o) * -(-shape[1] // config.block_c)
    walks = shape[0] * -(-shape[2] // config.rows) * -(-shape[3] // config.block_p)
    assert 1 <= config.programs <= walks
    resident = RESIDENT * (4 if shape[1] < 64 else 1)
    assert blocks * branches * config.programs <= resident
    if shape[1] >= 32:
        assert blocks * branches * config.programs > 0.4 * resident


def test_bad_arguments_are_named(device):
    dys, xs = Case((2, 4, 3, 5), 6, branches=2).inputs(torch.float32, device)
    for arguments, message in (
        (([], xs), "dys: need at least one"),
        ((dys, []), "xs: need at least one"),
        ((dys[:1], xs), "dys: 1 maps, xs: 2"),
        (([dys[0], dys[0][:1]], xs), r"dys\[1\]: shape"),
        (([dys[0].contiguous()] * 2, xs), r"dys\[0\]: strides"),
        (([g[:1] for g in dys], xs), r"dys\[0\]: shape \(1, 6, 3, 5\), need \(2, 6, 3, 5\)"),
        (([g.half() for g in dys], xs), r"dys\[0\]: dtype torch.float16"),
        ((dys, [xs[0], xs[1].half()]), r"xs\[1\]: "),
    ):
        with pytest.raises(ValueError, match=message):
            conv3_weight_grad(*arguments)


@pytest.mark.gpu
def test_more_than_2_31_elements(device):
    g, x = (
        torch.randn(3, 4096, 5632, 32, device=device, dtype=torch.bfloat16).movedim(-1, 1)
        for _ in range(2)
    )
    assert x.numel() > 2**31
    g[:2] = 0
    dw = summed(conv3_weight_grad([g], [x]))
    last = summed(conv3_weight_grad([g[2:]], [x[2:]]))
    magnitude = summed(conv3_weight_grad([g[2:].abs()], [x[2:].abs()]))
    assert ((dw - last).abs() <= 2**-18 * magnitude).all()
