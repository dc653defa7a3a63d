"""Sums of pointwise products, raw and plain maps against float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lgcnet_fast.kernels.product_sum import MAX_CHANNELS, ProductSumConfig, product_sum, serves
from tests.kernels.products import CUDA, DTYPES, assert_close, random_map, random_weight

TILE = ProductSumConfig(block_m=16, block_c=16, warps=1, stages=2)


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]
    out_channels: int
    maps: int = 1
    raw: int = 0
    plain: int = 0
    config: ProductSumConfig | None = None

    def inputs(self, dtype: torch.dtype, device: torch.device) -> dict[str, object]:
        """The arguments of `product_sum`."""
        torch.manual_seed(0)
        images, channels, *size = self.shape
        like = (images, self.out_channels, *size)
        acc = torch.float64 if dtype == torch.float64 else torch.float32

        def random_maps(count: int, shape: tuple[int, int, int, int]) -> list[Tensor]:
            return [random_map(shape, dtype, device) for _ in range(count)]

        return {
            "ds": random_maps(self.maps, self.shape),
            "matrices": random_weight((self.maps, self.out_channels, channels), device).to(dtype),
            "shifts": random_weight((self.maps, self.out_channels), device).to(acc),
            "ys": random_maps(self.raw, like),
            "statistics": random_weight((3, self.raw, self.out_channels), device).to(acc),
            "xs": random_maps(self.plain, like),
            "weights": random_weight((self.raw + self.plain,), device),
        }


SMALL = [
    Case((1, 1, 1, 1), 1),
    Case((2, 3, 3, 5), 17, 2, 1, 2),
    Case((1, 17, 5, 7), 33, 3, 2, 0, TILE),
    Case((2, 48, 3, 13), 20, 2, 0, 1, TILE),
    Case((1, 48, 4, 5), 48, 5, 3, 1),
    Case((1, 144, 3, 5), 48, 2, 1),
    Case((1, 32, 3, 50), 32, 2, 1),
]
LARGE = [
    Case((2, channels, 49, 97), out_channels, 5, 3, 2)
    for channels, out_channels in ((1, 1), (3, 255), (17, 48), (144, 48), (255, 3), (256, 256))
]
LARGE += [
    Case((16, 32, 64, 128), 32, 25, 15, 5),
    Case((16, 64, 32, 64), 64, 8, 5, 2),
    Case((16, 128, 16, 32), 128, 8, 5, 2),
]
CASES = SMALL + (LARGE if CUDA else [])


def assert_right(out: Tensor, ds, matrices, shifts, ys, statistics, xs, weights) -> None:
    def added(of) -> Tensor:
        """The sum, or that of the magnitudes of all terms."""
        total = of(-shifts.double()).sum(0)[:, None, None]
        for d, matrix in zip(ds, matrices, strict=True):
            terms = torch.einsum("nchw,oc->nohw", of(d.double()), of(matrix.double()))
            total = total + terms
        mean, _, inverse = statistics.double()[..., None, None]
        for r, y in enumerate(ys):
            scale = inverse[r] * weights[r].double()
            total = total + of(y.double() * scale) + of(-mean[r] * scale)
        for x, weight in zip(xs, weights[len(ys) :], strict=True):
            total = total + of(x.double() * weight.double())
        return total

    assert_close(out, added(_same), added(torch.abs).double())


def _same(values: Tensor) -> Tensor:
    return values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sum(case, dtype, device, guarded):
    arguments = case.inputs(dtype, device)
    out = product_sum(**arguments, config=case.config)
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    assert_right(out, **arguments)


def test_same_inputs_same_bits(device):
    arguments = (LARGE[-1] if CUDA else SMALL[2]).inputs(torch.bfloat16, device)
    first, *others = [product_sum(**arguments) for _ in range(4)]
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.skipif(CUDA, reason="float64 is for the interpreter")
def test_float64_through_the_interpreter(device):
    arguments = Case((2, 5, 3, 3), 4, 2, 1, 1, TILE).inputs(torch.float64, device)
    assert_right(product_sum(**arguments), **arguments)


def test_maps_that_programs_cannot_hold(device):
    d = torch.zeros(1, MAX_CHANNELS, 1, 1, dtype=torch.bfloat16, device=device)
    assert not serves(d, MAX_CHANNELS + 1)
    assert not serves(d.new_zeros(1, MAX_CHANNELS + 1, 1, 1), 1)
    if not CUDA:
        assert serves(d, MAX_CHANNELS)


def test_bad_arguments_are_named(device):
    arguments = Case((2, 4, 3, 5), 6, 2, 1, 1).inputs(torch.float32, device)
    ds, matrices, shifts = arguments["ds"], arguments["matrices"], arguments["shifts"]
    for changed, message in (
        ({"ds": []}, "ds: need at least one"),
        ({"ds": [ds[0], ds[1][:1]]}, r"ds\[1\]: shape"),
        ({"ds": [ds[0].contiguous()] * 2}, r"ds\[0\]: strides"),
        ({"ds": [ds[0].new_zeros(1, 257, 1, 1)]}, r"ds\[0\]: 257 channels, need up to 256"),
        ({"matrices": matrices[0]}, r"matrices: shape \(6, 4\), need \(K, C_out, C\)"),
        ({"matrices": matrices[:1]}, r"matrices: shape \(1, 6, 4\), need \(2, 6, 4\)"),
        ({"matrices": matrices.new_zeros(2, 257, 4)}, "matrices: 257 output channels"),
        ({"matrices": matrices.half()}, "matrices: dtype"),
        ({"matrices": matrices.mT.contiguous().mT}, "matrices: strides"),
        ({"ys": ds[:1]}, r"ys\[0\]: shape"),
        ({"xs": ds[:1]}, r"xs\[0\]: shape"),
        ({"shifts": shifts[:1]}, r"shifts: shape \(1, 6\), need \(2, 6\)"),
        ({"shifts": shifts.half()}, "shifts: dtype"),
        ({"statistics": shifts}, r"statistics: shape \(2, 6\), need \(3, 1, 6\)"),
        ({"weights": shifts[0]}, r"weights: shape \(6,\), need \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            product_sum(**(arguments | changed))


@pytest.mark.gpu
def test_more_than_2_31_elements(device):
    ds = [
        torch.randn(3, 4096, 2816, 64, device=device, dtype=torch.bfloat16).movedim(-1, 1)
        for _ in range(2)
    ]
    assert ds[0].numel() > 2**31
    arguments = Case((1, 64, 1, 1), 64).inputs(torch.bfloat16, device)
    arguments["ys"], arguments["statistics"] = ds[1:], torch.ones(3, 1, 64, device=device)
    arguments["weights"], arguments["ds"] = torch.ones(1, device=device), ds[:1]
    out = product_sum(**arguments)
    arguments["ys"], arguments["ds"] = [ds[1][2:]], [ds[0][2:]]
    assert torch.equal(out[2:], product_sum(**arguments))
