"""Dense 3x3 convolutions and their input gradients against PyTorch's in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lgcnet_fast.kernels.common import MOST_SHARED
from lgcnet_fast.kernels.conv3 import Conv3Config, conv3_forward, conv3_input_grad, fits, serves
from tests.combinations import some_combinations
from tests.kernels.products import CUDA, DTYPES, assert_close, random_map

TILE = Conv3Config(rows=2, block_p=16, block_o=16, block_c=16, targets=1, warps=4, stages=2)
PAIR = Conv3Config(rows=3, block_p=16, block_o=16, block_c=16, targets=2, warps=4, stages=3)


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]
    out_channels: int
    edges: int = 1
    relu: bool = True
    config: Conv3Config | None = None

    def inputs(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        """The map, and the weights."""
        torch.manual_seed(0)
        x = random_map(self.shape, dtype, device)
        like = (self.out_channels, self.shape[1], 3, 3)
        return x, [random_map(like, dtype, device) for _ in range(self.edges)]

    def gradients(self, x: Tensor) -> list[Tensor]:
        images, _, *size = self.shape
        like = (images, self.out_channels, *size)
        return [random_map(like, x.dtype, x.device) for _ in range(self.edges)]


SMALL = [
    Case((2, 1, 1, 1), 1),
    Case((1, 3, 1, 3), 2, relu=False),
    Case((2, 16, 3, 5), 17, edges=2),
    Case((1, 17, 5, 3), 16, edges=3, config=TILE),
    Case((2, 20, 3, 7), 32, edges=2, relu=False, config=TILE),
    Case((1, 32, 7, 9), 16, edges=2, config=PAIR),
    Case((1, 48, 3, 5), 96),
]
LARGE = [
    Case((2, channels, 49, 97), out_channels, edges)
    for channels, out_channels, edges in (
        (1, 1, 1),
        (3, 255, 1),
        (17, 48, 3),
        (32, 32, 5),
        (64, 64, 4),
        (128, 128, 3),
        (144, 48, 1),
        (160, 96, 2),
    )
]
LARGE += [
    Case((16, 16, 64, 128), 32, relu=False),
    Case((16, 48, 64, 128), 48),
    Case((16, 96, 32, 64), 48),
    Case((16, 48, 16, 32), 48),
    Case((16, 32, 64, 128), 32, 2),
    Case((16, 64, 32, 64), 64, 1),
    Case((16, 64, 32, 64), 64, 2),
    Case((16, 128, 16, 32), 128, 2),
]
CASES = SMALL + (LARGE if CUDA else [])


def rectified(x: Tensor, relu: bool) -> Tensor:
    return F.relu(x.double()) if relu else x.double()


def assert_results(ys: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor], relu: bool) -> None:
    r = rectified(x, relu)
    for y, weight in zip(ys, weights, strict=True):
        truth = F.conv2d(r, weight.double(), padding=1)
        assert_close(y, truth, F.conv2d(r.abs(), weight.double().abs(), padding=1))


def assert_input_gradient(
    dx: Tensor, gs: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor], relu: bool
) -> None:
    def total(maps: Sequence[Tensor], windows: Sequence[Tensor]) -> Tensor:
        pairs = zip(maps, windows, strict=True)
        found = sum(F.conv_transpose2d(g.double(), w.double(), padding=1) for g, w in pairs)
        return torch.where(x <= 0, 0.0, found) if relu else found

    assert_close(dx, total(gs, weights), total([g.abs() for g in gs], [w.abs() for w in weights]))


@some_combinations("case, dtype", CASES, DTYPES)
def test_results(case, dtype, device, guarded):
    x, weights = case.inputs(dtype, device)
    ys = conv3_forward(x, weights, case.relu, case.config)
    assert all(y.dtype == dtype for y in ys)
    assert_results(ys, x, weights, case.relu)


@some_combinations("case, dtype", CASES, DTYPES)
def test_input_gradients(case, dtype, device, guarded):
    x, weights = case.inputs(dtype, device)
    gs = case.gradients(x)
    config = TILE if case.config else None
    dx = conv3_input_grad(gs, x, weights, case.relu, config)
    assert dx.dtype == dtype and dx.stride() == x.stride()
    assert_input_gradient(dx, gs, x, weights, case.relu)


@pytest.mark.skipif(CUDA, reason="float64 is for the interpreter")
def test_float64_through_the_interpreter(device):
    case = Case((1, 5, 4, 3), 4, edges=2)
    x, weights = case.inputs(torch.float64, device)
    gs = case.gradients(x)
    assert_results(conv3_forward(x, weights, True, PAIR), x, weights, True)
    assert_input_gradient(conv3_input_grad(gs, x, weights, True, TILE), gs, x, weights, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_passes_the_relu_both_ways(dtype, device):
    """What NaN touches going forward is NaN; its own gradient passes, as PyTorch's does."""
    case = Case((1, 16, 3, 5), 16)
    x, weights = case.inputs(dtype, device)
    x[0, 3, 1, 1] = torch.nan
    (y,) = conv3_forward(x, weights, True)
    assert y[..., :3].isnan().all() and not y[..., 3:].isnan().any()
    gs = case.gradients(x)
    dx = conv3_input_grad(gs, x, weights, True)
    assert not dx.isnan().any()
    assert dx[0, 3, 1, 1] == conv3_input_grad(gs, x, weights)[0, 3, 1, 1] != 0


def test_same_inputs_same_bits(device):
    case = LARGE[-2] if CUDA else SMALL[2]
    x, weights = case.inputs(torch.bfloat16, device)
    gs = case.gradients(x)
    first, *others = [
        [*conv3_forward(x, weights, True), conv3_input_grad(gs, x, weights, True)] for _ in range(3)
    ]
    assert all(map(torch.equal, first * len(others), [y for other in others for y in other]))


def test_each_result_is_the_same_without_the_others(device):
    x, weights = SMALL[3].inputs(torch.bfloat16, device)
    ys = conv3_forward(x, weights, True, TILE)
    for y, weight in zip(ys, weights, strict=True):
        assert torch.equal(y, conv3_forward(x, [weight], True, TILE)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("channels", "out_channels", "whole"),
    [(32, 64, True), (16, 32, True), (48, 96, True), (160, 32, True), (144, 48, True)]
    + [(176, 48, False), (24, 64, False), (64, 24, False)],
)
def test_serves_blocks_of_16_bits(channels, out_channels, whole, dtype, device):
    if CUDA and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs sm_90")
    x = random_map((1, channels, 1, 1), dtype, device)
    expected = whole and dtype == torch.bfloat16
    assert serves(x, out_channels) == fits(x, out_channels) == expected


@pytest.mark.parametrize("channels", [1, 16, 32, 48, 80, 96, 128, 144])
@pytest.mark.parametrize("size", [(64, 128), (16, 32), (1, 1)], ids=str)
def test_default_tiles_leave_the_device_no_larger_part_masked_than_a_quarter(channels, size):
    config = Conv3Config.default((16, 1, *size), channels, channels, torch.bfloat16)
    for block in (config.block_o, config.block_c):
        assert channels < 16 or -(-channels // block) * block * 0.75 <= channels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(64, 128), (16, 32), (1, 1)], ids=str)
@pytest.mark.parametrize("targets", [1, 2])
def test_default_tiles_fit_an_h200(targets, size, dtype):
    for channels in (1, 32, 48, 64, 128):
        for out_channels in (1, 32, 48, 64, 128):
            tile = Conv3Config.default((16, 1, *size), channels, out_channels, dtype, targets)
            assert tile.shared(dtype) <= MOST_SHARED


def test_bad_arguments_are_named(device):
    case = Case((2, 4, 3, 5), 6, edges=2)
    x, weights = case.inputs(torch.float32, device)
    gs = case.gradients(x)
    for bad, message in (
        ((x, []), "weights: need at least one"),
        ((x, [weights[0], weights[1][:3]]), r"weights\[1\]: shape"),
        ((x, [weights[0][:, :3]] * 2), r"weights\[0\]: shape \(6, 3, 3, 3\), need \(6, 4, 3, 3\)"),
        ((x, [weights[0].contiguous()] * 2), r"weights\[0\]: strides"),
        ((x, [weights[0].half()] * 2), r"weights\[0\]: dtype torch.float16"),
        ((x.contiguous(), weights), "x: strides"),
        ((x[:0], weights), "x: empty map"),
    ):
        with pytest.raises(ValueError, match=message):
            conv3_forward(*bad)
    for bad, message in (
        (([], x, weights), "dys: need at least one"),
        ((gs[:1], x, weights), "dys: 1 maps, weights: 2"),
        (([g[:1] for g in gs], x, weights), r"dys\[0\]: shape \(1, 6, 3, 5\), need \(2, 6, 3, 5\)"),
        (([g.half() for g in gs], x, weights), r"dys\[0\]: dtype torch.float16"),
        (([g.contiguous() for g in gs], x, weights), r"dys\[0\]: strides"),
    ):
        with pytest.raises(ValueError, match=message):
            conv3_input_grad(*bad)
    with pytest.raises(ValueError, match="config: targets 2 of 1"):
        conv3_forward(x, weights[:1], config=PAIR)


@pytest.mark.gpu
def test_more_than_2_31_elements(device):
    x = torch.randn(3, 4096, 5632, 32, device=device, dtype=torch.bfloat16).movedim(-1, 1)
    weight = random_map((32, 32, 3, 3), torch.bfloat16, device)
    assert x.numel() > 2**31
    for convolve in (
        lambda x: conv3_forward(x, [weight], True)[0],
        lambda x: conv3_input_grad([x], x, [weight], True),
    ):
        assert torch.equal(convolve(x)[2:], convolve(x[2:]))
