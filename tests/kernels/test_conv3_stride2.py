"""3x3 convolutions of stride 2, transposed ones and weight gradients, against float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lgcnet_fast.kernels.common import MOST_SHARED
from lgcnet_fast.kernels.conv3_backward import summed
from lgcnet_fast.kernels.conv3_stride2 import (
    Stride2Config,
    fits,
    serves,
    small_size,
    strided_convolutions,
    transposed_convolutions,
)
from lgcnet_fast.kernels.conv3_stride2_backward import (
    RESIDENT,
    StridedWeightGradConfig,
    strided_weight_grad,
)
from tests.combinations import some_combinations
from tests.kernels.products import CUDA, DTYPES, assert_close, random_map

TILE = Stride2Config(rows=2, block_p=16, block_n=16, block_k=16, warps=4, stages=2)
PAIR = replace(TILE, rows=3, targets=2)
SHARES = StridedWeightGradConfig(
    rows=2, block_p=16, block_o=16, block_k=16, warps=4, stages=2, programs=3
)


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]
    """Of x."""
    out_channels: int
    edges: int = 1
    tiled: bool = False

    @property
    def size(self) -> tuple[int, int]:
        return self.shape[2:]

    @property
    def whole_eights(self) -> bool:
        return self.shape[1] % 8 == self.out_channels % 8 == 0

    @property
    def tiles(self) -> tuple[Stride2Config | None, StridedWeightGradConfig | None]:
        if not self.tiled:
            return None, None
        return PAIR if self.edges % 2 == 0 else TILE, SHARES

    def inputs(
        self, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """x, ys and weights."""
        torch.manual_seed(0)
        small = (self.shape[0], self.out_channels, *small_size(self.size))
        window = (self.out_channels, self.shape[1], 3, 3)
        x = random_map(self.shape, dtype, device)
        return x, *(
            [random_map(shape, dtype, device) for _ in range(self.edges)]
            for shape in (small, window)
        )


SMALL = [
    Case((2, 1, 1, 1), 1),
    Case((1, 3, 1, 4), 2),
    Case((2, 8, 4, 7), 16),
    Case((1, 17, 5, 6), 20, tiled=True),
    Case((3, 16, 7, 5), 32, edges=2, tiled=True),
    Case((1, 8, 4, 4), 8, edges=3),
]
LARGE = [
    Case((2, channels, 49, 98), out_channels)
    for channels, out_channels in ((1, 1), (3, 255), (8, 16), (48, 48), (64, 128), (160, 96))
]
LARGE += [
    Case((16, 64, 64, 128), 64, edges=2),
    Case((16, 128, 32, 64), 128, edges=2),
    Case((16, 48, 64, 128), 48),
    Case((16, 8, 128, 256), 16),
    Case((16, 16, 97, 97), 128),
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


def assert_all(x: Tensor, ys: Sequence[Tensor], weights: Sequence[Tensor], case: Case) -> None:
    tile, shares = case.tiles
    for y, weight in zip(strided_convolutions(x, weights, tile), weights, strict=True):
        assert y.dtype == x.dtype and y.stride() == ys[0].stride()
        assert_close(y, strided(x, weight), strided(x.abs(), weight.abs()))
    found = transposed_convolutions(ys, weights, case.size, tile)
    assert found.dtype == x.dtype and found.stride() == x.stride()
    pairs = list(zip(ys, weights, strict=True))
    truth = sum(transposed(y, weight, case.size) for y, weight in pairs)
    magnitude = sum(transposed(y.abs(), weight.abs(), case.size) for y, weight in pairs)
    assert_close(found, truth, magnitude)
    if CUDA and not case.whole_eights:
        with pytest.raises(ValueError, match="need whole eights"):
            strided_weight_grad(ys, [x] * len(ys), shares)
        return
    for dw, y in zip(summed(strided_weight_grad(ys, [x] * len(ys), shares)), ys, strict=True):
        assert dw.is_contiguous(memory_format=torch.channels_last)
        assert_close(dw, weight_gradient(y, x), weight_gradient(y.abs(), x.abs()))


@some_combinations("case, dtype", CASES, DTYPES)
def test_results(case, dtype, device, guarded):
    assert_all(*case.inputs(dtype, device), case)


@pytest.mark.skipif(CUDA, reason="float64 is for the interpreter")
def test_float64_through_the_interpreter(device):
    case = Case((1, 5, 4, 3), 4, tiled=True)
    assert_all(*case.inputs(torch.float64, device), case)


def test_what_is_not_finite_stays_near(device):
    """A NaN reaches what its taps reach, and as the rule says one column more of a block."""
    case = Case((1, 8, 6, 8), 8)
    x, [y], [weight] = case.inputs(torch.bfloat16, device)
    x[0, 3, 2, 4] = torch.nan
    (found,) = strided_convolutions(x, [weight])
    reached = strided(x, weight).isnan()
    assert torch.equal(found.isnan(), reached)
    y[0, 3, 1, 2] = torch.nan
    found = transposed_convolutions([y], [weight], case.size).isnan()
    reached = transposed(y, weight, case.size).isnan()
    assert found[reached].all()
    reached[..., :-1] |= reached[..., 1:].clone()
    assert not found[~reached].any()


def test_of_a_relu(device):
    """NaN passes; where it is NaN so does its gradient."""
    case = Case((2, 16, 4, 7), 8, tiled=True)
    x, [y], [weight] = case.inputs(torch.bfloat16, device)
    tile, shares = case.tiles
    found = transposed_convolutions([y], [weight], case.size, tile, relu=True)
    r = y.relu()
    assert torch.equal(found, transposed_convolutions([r], [weight], case.size, tile))
    found = strided_weight_grad([y], [x], shares, relu=True)
    assert torch.equal(found, strided_weight_grad([r], [x], shares))
    y[0, 3, 1, 2] = torch.nan
    (plain,) = strided_convolutions(x, [weight], tile)
    (found,) = strided_convolutions(x, [weight], tile, mask=y)
    assert torch.equal(found, torch.where(y <= 0, 0, plain)) and found[0, 3, 1, 2] != 0
    assert transposed_convolutions([y], [weight], case.size, relu=True)[0].isnan().any()
    with pytest.raises(ValueError, match=r"mask\[0\]: shape"):
        strided_convolutions(x, [weight], mask=x)


def test_same_inputs_same_bits(device):
    case = LARGE[-5] if CUDA else SMALL[2]
    x, ys, weights = case.inputs(torch.bfloat16, device)
    first, *others = [
        [
            *strided_convolutions(x, weights),
            transposed_convolutions(ys, weights, case.size),
            summed(strided_weight_grad(ys, [x] * len(ys))),
        ]
        for _ in range(3)
    ]
    assert all(torch.equal(*pair) for other in others for pair in zip(first, other, strict=True))


def test_each_result_is_the_same_without_the_others(device):
    case = SMALL[4]
    x, ys, weights = case.inputs(torch.bfloat16, device)
    shares = strided_weight_grad(ys, [x, x], SHARES)
    found = strided_convolutions(x, weights, PAIR)
    for index, (y, weight) in enumerate(zip(ys, weights, strict=True)):
        assert torch.equal(found[index], strided_convolutions(x, [weight], TILE)[0])
        assert torch.equal(shares[:, index : index + 1], strided_weight_grad([y], [x], SHARES))


@pytest.mark.parametrize(
    ("shape", "out_channels"),
    [((16, 64, 64, 128), 64), ((16, 128, 32, 64), 128), ((16, 48, 32, 64), 48), ((1, 8, 1, 1), 8)],
    ids=str,
)
@pytest.mark.parametrize("branches", [1, 2])
def test_default_shares_fill_the_device(shape, out_channels, branches):
    config = StridedWeightGradConfig.default(branches, shape, out_channels, torch.bfloat16)
    height, width = small_size(shape[2:])
    blocks = -(-out_channels // config.block_o) * -(-3 * shape[1] // config.block_k) * branches
    tiles = -(-height // config.rows) * -(-shape[0] * width // config.block_p)
    assert 1 <= config.programs <= tiles
    assert blocks * config.programs <= RESIDENT
    if tiles > 1:
        assert blocks * config.programs > 0.3 * RESIDENT


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(128, 256), (16, 32), (1, 1)], ids=str)
@pytest.mark.parametrize("targets", [1, 2])
def test_default_tiles_fit_an_h200(targets, size, dtype):
    for out_channels in (1, 48, 64, 128):
        tile = Stride2Config.strided((16, 1, *size), out_channels, dtype, targets)
        assert tile.shared_of_strided(dtype) <= MOST_SHARED


def test_serves_eights_of_16_bits(device):
    if CUDA and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs sm_90")
    x, _, [weight] = Case((1, 8, 2, 2), 48).inputs(torch.bfloat16, device)
    assert serves(x, weight) and fits(x, weight)
    assert not serves(x.float(), weight) and not serves(x, weight[:20])
    assert not fits(x, weight.repeat(4, 1, 1, 1))
    assert not serves(x, weight[:, :4]) and not serves(x, weight[..., :1])


def test_bad_arguments_are_named(device):
    x, ys, weights = Case((2, 4, 3, 5), 6, edges=2).inputs(torch.float32, device)
    for bad, message in (
        ((x, []), "weights: need at least one"),
        ((x.contiguous(), weights), "x: strides"),
        ((x[:0], weights), "x: empty map"),
        ((x, [weights[0][:, :3]]), r"weights\[0\]: shape \(6, 3, 3, 3\), need \(6, 4, 3, 3\)"),
        ((x, [weights[0], weights[1].half()]), r"weights\[1\]: dtype torch.float16"),
        ((x, [weights[0].contiguous()]), r"weights\[0\]: strides"),
    ):
        with pytest.raises(ValueError, match=message):
            strided_convolutions(*bad)
    with pytest.raises(ValueError, match="config: targets 2 of 1"):
        strided_convolutions(x, weights[:1], PAIR)
    for bad, message in (
        (([], weights, (3, 5)), "ys: need at least one"),
        ((ys[:1], weights, (3, 5)), "ys: 1 maps, weights: 2"),
        (([ys[0].contiguous()] * 2, weights, (3, 5)), r"ys\[0\]: strides"),
        ((ys, [w[:5].clone() for w in weights], (3, 5)), r"weights\[0\]: shape .* of 6 channels"),
        ((ys, weights, (3, 7)), r"size: \(3, 7\), need 2 n - 1 or 2 n of \(2, 3\)"),
        ((ys, weights, (3,)), r"size: \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            transposed_convolutions(*bad)
    for bad, message in (
        (([], [x]), "ys: need at least one"),
        ((ys, []), "xs: need at least one"),
        ((ys, [x]), "ys: 2 maps, xs: 1"),
        (([ys[0].contiguous()], [x]), r"ys\[0\]: strides"),
        ((ys[:1], [x.contiguous()]), r"xs\[0\]: strides"),
        (([ys[0][:1]], [x]), r"ys\[0\]: shape \(1, 6, 2, 3\), need \(2, 6, 2, 3\)"),
        (([ys[0].half()], [x]), r"ys\[0\]: dtype torch.float16"),
    ):
        with pytest.raises(ValueError, match=message):
            strided_weight_grad(*bad)


@pytest.mark.gpu
def test_more_than_2_31_elements(device):
    x = torch.randn(3, 4096, 5632, 32, device=device, dtype=torch.bfloat16).movedim(-1, 1)
    assert x.numel() > 2**31
    weights = [random_map((32, 32, 3, 3), torch.bfloat16, device)]
    ys = strided_convolutions(x, weights)
    last = [ys[0][2:]]
    assert torch.equal(last[0], strided_convolutions(x[2:], weights)[0])
    back = transposed_convolutions(ys, weights, (4096, 5632))
    assert torch.equal(back[2:], transposed_convolutions(last, weights, (4096, 5632)))
    ys[0][:2] = 0
    dw, alone = (summed(strided_weight_grad(*maps)) for maps in ((ys, [x]), (last, [x[2:]])))
    magnitude = summed(strided_weight_grad([last[0].abs()], [x[2:].abs()]))
    assert ((dw - alone).abs() <= 2**-18 * magnitude).all()
