"""Gradients of sums of pointwise products against float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lgcnet_fast.kernels.product_gradients import (
    CORES,
    InputGradientsConfig,
    ProductSumsConfig,
    product_input_gradients,
    product_sums,
)
from tests.combinations import some_combinations
from tests.kernels.products import CUDA, DTYPES, assert_close, random_map, random_weight

SUMS = ProductSumsConfig(block_m=16, block_c=16, maps=2, warps=1, stages=2, programs=3)
TILE = InputGradientsConfig(block_m=16, block_n=16, warps=1, stages=2, programs=2)


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]
    out_channels: int
    maps: int = 1
    sums: ProductSumsConfig | None = None
    tile: InputGradientsConfig | None = None

    def inputs(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        """g, ds."""
        torch.manual_seed(0)
        images, _, *size = self.shape
        g = random_map((images, self.out_channels, *size), dtype, device)
        return g, [random_map(self.shape, dtype, device) for _ in range(self.maps)]

    def coefficients(self, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """A, B, c."""
        channels = self.shape[1]
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        return [
            random_weight((self.maps, channels, self.out_channels), device).to(dtype),
            random_weight((self.maps, channels, channels), device).to(dtype),
            random_weight((self.maps, channels), device).to(acc),
        ]


SMALL = [
    Case((1, 1, 1, 1), 1),
    Case((2, 3, 3, 5), 17, 2),
    Case((1, 17, 5, 7), 33, 3, SUMS, TILE),
    Case((2, 48, 3, 13), 20, 3, SUMS, TILE),
    Case((1, 48, 4, 5), 48, 5),
    Case((1, 144, 3, 5), 48, 2),
    Case((1, 32, 3, 50), 32, 2),
]
LARGE = [
    Case((2, channels, 49, 97), out_channels, 5)
    for channels, out_channels in ((1, 1), (3, 255), (17, 48), (144, 48), (255, 3), (256, 256))
]
LARGE += [
    Case((16, 32, 64, 128), 32, 25),
    Case((16, 64, 32, 64), 64, 8),
    Case((16, 128, 16, 32), 128, 8),
]
CASES = SMALL + (LARGE if CUDA else [])


@some_combinations("case, dtype", CASES, DTYPES)
def test_sums(case, dtype, device, guarded):
    g, ds = case.inputs(dtype, device)
    sums, s0 = product_sums(g, ds, case.sums)
    assert sums.dtype == s0.dtype == torch.float32
    assert sums.is_contiguous() and s0.is_contiguous()
    d, g = torch.stack(ds).double(), g.double()
    equation = "nohw,bnchw->boc"
    truth, magnitude = (torch.einsum(equation, *each) for each in ((g, d), (g.abs(), d.abs())))
    assert_close(sums, truth, magnitude)
    assert_close(s0, g.sum((0, 2, 3)), g.abs().sum((0, 2, 3)))


@some_combinations("case, dtype, in_place", CASES, DTYPES, [False, True])
def test_input_gradients(case, dtype, in_place, device, guarded):
    (g, ds), coefficients = case.inputs(dtype, device), case.coefficients(dtype, device)
    before = [d.clone() for d in ds]
    # Something must be allocated under guard.
    outs = ds if in_place else [d.new_empty(d.movedim(1, -1).shape).movedim(-1, 1) for d in ds]
    if in_place:
        g.new_empty(1)
    found = product_input_gradients(g, ds, *coefficients, outs, case.tile)
    assert all(dd is out for dd, out in zip(found, outs, strict=True))
    assert_right(found, g, before, *coefficients)
    assert in_place or all(torch.equal(d, other) for d, other in zip(ds, before, strict=True))


def assert_right(
    found: list[Tensor],
    g: Tensor,
    ds: list[Tensor],
    from_gradient: Tensor,
    from_map: Tensor | None,
    shift: Tensor | None,
) -> None:
    for k, (dd, d) in enumerate(zip(found, ds, strict=True)):
        truth, magnitude = 0, 0
        for matrix, values in ((from_gradient, g), (from_map, d)):
            if matrix is not None:
                pair = matrix[k].double(), values.double()
                truth = truth + torch.einsum("ci,nihw->nchw", *pair)
                magnitude = magnitude + torch.einsum("ci,nihw->nchw", *map(torch.abs, pair))
        if shift is not None:
            truth = truth + shift[k].double()[:, None, None]
            magnitude = magnitude + shift[k].double().abs()[:, None, None]
        assert dd.dtype == d.dtype and dd.stride() == d.stride()
        assert_close(dd, truth, magnitude)


@pytest.mark.parametrize("tile", [None, TILE])
def test_what_is_none_counts_as_zero(tile, device, guarded):
    case = Case((2, 20, 3, 5), 7, 2, tile=tile)
    g, ds = case.inputs(torch.bfloat16, device)
    from_gradient, _, shift = case.coefficients(torch.bfloat16, device)
    for given in ((from_gradient, None, None), (from_gradient, None, shift)):
        assert_right(product_input_gradients(g, ds, *given, config=tile), g, ds, *given)


def test_same_inputs_same_bits(device):
    case = LARGE[-1] if CUDA else SMALL[3]
    g, ds = case.inputs(torch.bfloat16, device)
    coefficients = case.coefficients(torch.bfloat16, device)
    first, *others = [
        [*product_sums(g, ds, case.sums), *product_input_gradients(g, ds, *coefficients)]
        for _ in range(4)
    ]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.skipif(CUDA, reason="float64 is for the interpreter")
def test_float64_through_the_interpreter(device):
    case = Case((2, 5, 3, 3), 4, 2)
    g, ds = case.inputs(torch.float64, device)
    coefficients = case.coefficients(torch.float64, device)
    assert_right(product_input_gradients(g, ds, *coefficients), g, ds, *coefficients)
    sums, s0 = product_sums(g, ds, SUMS)
    torch.testing.assert_close(sums, torch.einsum("nohw,bnchw->boc", g, torch.stack(ds)))
    torch.testing.assert_close(s0, g.sum((0, 2, 3)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("maps", [1, 8, 25])
@pytest.mark.parametrize(
    "channels, out_channels, positions",
    [(32, 32, 2**17), (64, 64, 2**15), (128, 128, 2**13), (144, 48, 2**17), (7, 3, 1), (4, 256, 9)],
)
def test_default_tiles_share_out_the_positions(maps, channels, out_channels, positions, dtype):
    arguments = (maps, positions, channels, out_channels, dtype)
    sums, tile = ProductSumsConfig.default(*arguments), InputGradientsConfig.default(*arguments)
    groups = -(-maps // sums.maps) * -(-channels // sums.block_c)
    for config, products in ((sums, groups), (tile, maps)):
        assert 1 <= config.programs <= -(-positions // config.block_m)
        if positions > 2**13 and dtype == torch.bfloat16:
            assert CORES / 2 <= config.programs * products <= 6 * CORES


def test_bad_arguments_are_named(device):
    case = Case((2, 4, 3, 5), 6, 2)
    g, ds = case.inputs(torch.float32, device)
    a, b, c = case.coefficients(torch.float32, device)
    wide = g.new_zeros(2, 257, 3, 5).contiguous(memory_format=torch.channels_last)
    for arguments, message in (
        ((g, []), "ds: need at least one"),
        ((g, [ds[0], ds[1][:1]]), r"ds\[1\]: shape"),
        ((g[:1], ds), "g: shape"),
        ((g.half(), ds), "g: dtype"),
        ((g.contiguous(), ds), r"g\[0\]: strides"),
        ((wide, ds), r"g\[0\]: 257 channels, need up to 256"),
    ):
        with pytest.raises(ValueError, match=message):
            product_sums(*arguments)
        with pytest.raises(ValueError, match=message):
            product_input_gradients(*arguments, a, b, c)
    for arguments, message in (
        ((b, b, c), "from_gradient: shape"),
        ((a.half(), b, c), "from_gradient: dtype"),
        ((a, a, c), "from_map: shape"),
        ((a, b.mT, c), "from_map: strides"),
        ((a, b, c[:1]), "shift: shape"),
        ((a, b, c.half()), "shift: dtype"),
        ((a, b, c, ds[:1]), "outs: 1 maps, need 2"),
        ((a, b, c, [g, g]), r"outs\[0\]: shape"),
        ((a, b, c, [d.contiguous() for d in ds]), r"outs\[0\]: strides"),
    ):
        with pytest.raises(ValueError, match=message):
            product_input_gradients(g, ds, *arguments)


@pytest.mark.gpu
def test_more_than_2_31_elements(device):
    g, d = (
        torch.randn(3, 4096, 2816, 64, device=device, dtype=torch.bfloat16).movedim(-1, 1)
        for _ in range(2)
    )
    assert d.numel() > 2**31
    coefficients = Case((1, 64, 1, 1), 64).coefficients(torch.bfloat16, device)
    s0 = product_sums(g, [d])[1]
    torch.testing.assert_close(s0.double(), g.double().sum((0, 2, 3)), rtol=1e-3, atol=10)
    (last,) = product_input_gradients(g[2:], [d[2:]], *coefficients)
    (dd,) = product_input_gradients(g, [d], *coefficients, [d])
    assert torch.equal(dd[2:], last)
