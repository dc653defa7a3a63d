"""Gradients of pointwise products against float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from lgcnet_fast.kernels.pointwise_backward import (
    CORES,
    MAX_OUT_CHANNELS,
    ProductGradientsConfig,
    pointwise_backward,
    summed,
)
from tests.combinations import some_combinations
from tests.kernels.products import CUDA, DTYPES, assert_close, random_map, random_weight

TILE = ProductGradientsConfig(block_m=16, block_c=16, warps=1, stages=2, programs=3)


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]
    """Of the maps of dy and x, but for their channels."""
    out_channels: int
    branches: int = 1
    config: ProductGradientsConfig | None = None

    def inputs(
        self, dtype: torch.dtype, device: torch.device
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """dys, x, weights."""
        torch.manual_seed(0)
        images, channels, *size = self.shape
        like = (images, self.out_channels, *size)
        dys = [random_map(like, dtype, device) for _ in range(self.branches)]
        x = random_map((self.branches, *self.shape), dtype, device)
        return dys, x, random_weight((self.branches, self.out_channels, channels), device).to(dtype)


SMALL = [
    Case((2, 1, 1, 1), 1),
    Case((2, 3, 3, 5), 17),
    Case((1, 17, 5, 7), 33, branches=3, config=TILE),
    Case((2, 48, 3, 13), 20, branches=2, config=TILE),
    Case((1, 16, 4, 4), 16, branches=5),
    Case((3, 32, 9, 11), 16),
    Case((2, 32, 3, 13), 20, branches=2, config=replace(TILE, rest=16)),
    Case((1, 29, 5, 7), 33, branches=3, config=replace(TILE, rest=16)),
]
LARGE = [
    Case((2, channels, 49, 97), out_channels, branches)
    for channels, out_channels, branches in (
        (1, 1, 1),
        (3, 255, 1),
        (17, 48, 5),
        (32, 32, 8),
        (64, 64, 8),
        (128, 128, 4),
        (128, 128, 1),
        (144, 48, 5),
        (255, 3, 2),
        (384, 128, 1),
        (96, 256, 1),
    )
]
LARGE += [
    Case((16, 32, 64, 128), 32, 8),
    Case((16, 64, 32, 64), 64, 1),
    Case((16, 128, 16, 32), 128, 8),
    Case((16, 128, 16, 32), 128, 1),
]
CASES = SMALL + (LARGE if CUDA else [])


def assert_right(dys: list[Tensor], x: Tensor, weights: Tensor, dx: Tensor, dw: Tensor) -> None:
    """x: as it was before dx took its place."""
    dy, x, weights = torch.stack(dys).double(), x.double(), weights.double()
    for result, equation, other in ((dx, "bnohw,boc->bnchw", weights), (dw, "bnohw,bnchw->boc", x)):
        truth = torch.einsum(equation, dy, other)
        assert_close(result, truth, torch.einsum(equation, dy.abs(), other.abs()))


@some_combinations("case, dtype, in_place", CASES, DTYPES, [False, True])
def test_gradients(case, dtype, in_place, device, guarded):
    dys, x, weights = case.inputs(dtype, device)
    before = x.clone()
    dx, shares = pointwise_backward(dys, x, weights, x if in_place else None, case.config)
    assert (dx is x) == in_place and (in_place or torch.equal(x, before))
    assert dx.stride() == before.stride() and dx.dtype == dtype
    assert not shares.isnan().any()
    dw = summed(shares)
    assert dw.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_right(dys, before, weights, dx, dw)


def test_dys_may_be_parts_of_stacks(device):
    case = SMALL[4]
    dys, x, weights = case.inputs(torch.bfloat16, device)
    stacked = [*torch.stack(dys[:2]).unbind(), dys[2], *torch.stack(dys[3:]).unbind()]
    stacked = [dy.contiguous(memory_format=torch.channels_last) for dy in stacked]
    for found, wanted in zip(
        pointwise_backward(stacked, x, weights), pointwise_backward(dys, x, weights), strict=True
    ):
        assert torch.equal(found, wanted)


def test_a_product_alone_has_the_same_bits(device):
    dys, x, weights = SMALL[2].inputs(torch.float32, device)
    dx, shares = pointwise_backward(dys, x, weights, config=TILE)
    for branch in range(len(dys)):
        one = slice(branch, branch + 1)
        alone = pointwise_backward(dys[one], x[one], weights[one], config=TILE)
        assert torch.equal(alone[0], dx[one]) and torch.equal(alone[1], shares[:, one])


def test_same_inputs_same_bits(device):
    case = LARGE[-2] if CUDA else SMALL[3]
    dys, x, weights = case.inputs(torch.bfloat16, device)
    first, *others = [
        (dx, summed(shares))
        for dx, shares in (pointwise_backward(dys, x, weights) for _ in range(4))
    ]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("programs", [1, 2, 19, 300])
def test_shares_of_all_programs_are_added(programs, device):
    shares = torch.randn(programs, 2, 3, 17).to(device)
    dw = summed(shares)
    assert_close(dw, shares.double().sum(0), shares.double().abs().sum(0))
    assert torch.equal(dw, summed(shares))
    assert torch.equal(dw.half(), summed(shares, torch.float16))


@pytest.mark.skipif(CUDA, reason="float64 is for the interpreter")
def test_float64_through_the_interpreter(device):
    case = Case((2, 5, 3, 3), 4, branches=2, config=TILE)
    dys, x, weights = case.inputs(torch.float64, device)
    dx, shares = pointwise_backward(dys, x, weights)
    assert_right(dys, x, weights, dx, summed(shares))


@pytest.mark.parametrize("branches", [1, 4, 8])
@pytest.mark.parametrize(
    "channels, out_channels, positions",
    [(32, 32, 2**17), (64, 64, 2**15), (128, 128, 2**13), (144, 48, 2**17), (7, 3, 1), (4, 256, 9)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_default_tiles_share_out_the_positions(branches, channels, out_channels, positions, dtype):
    config = ProductGradientsConfig.default(branches, positions, channels, out_channels, dtype)
    tiles = -(-positions // config.block_m)
    assert 1 <= config.programs <= tiles
    if positions >= 2**13 and dtype == torch.bfloat16:
        blocks = -(-(channels - config.rest) // config.block_c)
        assert CORES / 3 <= config.programs * blocks * branches <= 3 * CORES


def test_channels_that_no_program_takes_are_named(device):
    dys, x, weights = Case((1, 33, 3, 5), 6).inputs(torch.float32, device)
    with pytest.raises(ValueError, match="config: 33 channels, block_c 16 and rest 16"):
        pointwise_backward(dys, x, weights, config=replace(TILE, rest=16))


@pytest.mark.skipif(not CUDA, reason="the interpreter serves float64")
def test_float64_is_refused_on_a_gpu(device):
    dys, x, weights = SMALL[1].inputs(torch.float64, device)
    with pytest.raises(ValueError, match=r"dys\[0\]: float64 .* interpreter only"):
        pointwise_backward(dys, x, weights)


def test_bad_arguments_are_named(device):
    dys, x, weights = Case((2, 4, 3, 5), 6, branches=2).inputs(torch.float32, device)
    wide = Case((1, 1, 1, 1), MAX_OUT_CHANNELS + 1).inputs(torch.float32, device)
    for arguments, message in (
        (([], x, weights), "dys: need at least one"),
        (([dys[0], dys[0][:1]], x, weights), r"dys\[1\]: shape"),
        (([dys[0].contiguous()] * 2, x, weights), r"dys\[0\]: strides"),
        (wide, r"dys\[0\]: 257 channels, need up to 256"),
        ((dys, x[0], weights), r"x: shape \(2, 4, 3, 5\), need maps"),
        ((dys, x[:1], weights), r"x: shape \(1, 2, 4, 3, 5\), need \(2, 2, 4, 3, 5\)"),
        ((dys, x.contiguous(), weights), "x: strides"),
        ((dys, x.half(), weights), "x: dtype"),
        ((dys, x, weights[:1]), "weights: shape"),
        ((dys, x, weights.mT.contiguous().mT), "weights: strides"),
        ((dys, x, weights.half()), "weights: dtype"),
        ((dys, x, weights, x[:1]), "out: shape"),
        ((dys, x, weights, x.half()), "out: torch.float16"),
        ((dys, x, weights, x.contiguous()), "out: torch.float32, strides"),
    ):
        with pytest.raises(ValueError, match=message):
            pointwise_backward(*arguments)


@pytest.mark.gpu
def test_more_than_2_31_elements(device):
    dy, x = (
        torch.randn(3, 4096, 2816, 64, device=device, dtype=torch.bfloat16).movedim(-1, 1)
        for _ in range(2)
    )
    assert x.numel() > 2**31
    weights = random_weight((1, 64, 64), device).bfloat16()
    dx, _ = pointwise_backward([dy], x[None], weights)
    last, _ = pointwise_backward([dy[2:]], x[None, 2:], weights)
    assert torch.equal(dx[0, 2:], last[0])
