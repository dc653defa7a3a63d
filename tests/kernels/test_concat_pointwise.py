"""The convolution of resized maps against float64 resizing, rounding, ReLU and product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lgcnet_fast.kernels.concat_pointwise import ProductConfig, concat_pointwise
from lgcnet_fast.kernels.concat_pointwise_backward import concat_pointwise_backward
from lgcnet_fast.kernels.concat_upsample import concat_upsample_forward
from lgcnet_fast.kernels.pointwise_backward import ProductGradientsConfig
from tests.kernels.products import CUDA, DTYPES, assert_close, random_map, random_weight

TILE = ProductConfig(block_m=16, block_n=16, block_k=16, warps=1, stages=2)
GRAD_TILE = ProductGradientsConfig(block_m=16, block_c=16, warps=1, stages=2, programs=3)
Size = tuple[int, int]


@dataclass(frozen=True)
class Case:
    sizes: tuple[Size, ...]
    channels: tuple[int, ...]
    size: Size
    out_channels: int
    relu: bool = True
    images: int = 2
    tiled: bool = False

    @property
    def tiles(self) -> tuple[ProductConfig | None, ProductGradientsConfig | None]:
        return (TILE, GRAD_TILE) if self.tiled else (None, None)


SMALL = [
    Case(((1, 1),), (1,), (1, 1), 1),
    Case(((3, 5), (2, 3), (1, 1)), (17, 3, 1), (3, 5), 20, tiled=True),
    Case(((2, 2), (4, 5)), (5, 33), (4, 5), 48, relu=False, tiled=True),
    Case(((4, 3), (2, 2), (1, 2), (5, 4)), (3, 2, 1, 4), (5, 4), 5),
    Case(((4, 4),), (6,), (2, 3), 7),
    Case(((3, 4), (3, 4), (3, 4)), (48, 48, 17), (3, 4), 48),
]
LARGE = [
    Case(((49, 97), (25, 49), (13, 25)), (48, 48, 48), (49, 97), 48),
    Case(((97, 193), (49, 97)), (48, 48), (97, 193), 48),
    Case(((45, 60), (23, 30), (12, 15)), (64, 17, 255), (90, 120), 128),
    Case(((64, 128), (32, 64), (16, 32)), (48, 48, 48), (64, 128), 48, images=16),
    Case(((90, 120),) * 3, (48, 48, 48), (90, 120), 48, images=16),
]
CASES = SMALL + (LARGE if CUDA else [])


def inputs(
    case: Case, dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], Tensor, Tensor]:
    """maps, weight, dy."""
    torch.manual_seed(0)
    maps = [
        random_map((case.images, c, *size), dtype, device)
        for c, size in zip(case.channels, case.sizes, strict=True)
    ]
    # Values of the storage dtype: the interpreter truncates where a GPU rounds.
    weight = random_weight((case.out_channels, sum(case.channels)), device).to(dtype)
    weight = weight.double() if dtype == torch.float64 else weight.float()
    return maps, weight, random_map((case.images, case.out_channels, *case.size), dtype, device)


def concatenated(case: Case, maps: Sequence[Tensor]) -> Tensor:
    """As another kernel, tested against PyTorch's interpolation, stores it."""
    return concat_upsample_forward(maps, case.size)


def back(case: Case, dv: Tensor) -> list[Tensor]:
    """The gradients of the maps from that of their concatenation."""
    shapes = zip(case.channels, case.sizes, strict=True)
    leaves = [dv.new_zeros(case.images, c, *size, requires_grad=True) for c, size in shapes]
    resized = [
        F.interpolate(x, size=case.size, mode="bilinear", align_corners=True) for x in leaves
    ]
    return list(torch.autograd.grad(torch.cat(resized, dim=1), leaves, dv))


def product(v: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("oc,nchw->nohw", weight.double(), v.double())


def slack(dtype: torch.dtype) -> float:
    """Factor of a bound: a resized value may round to the other side than its twin did."""
    return 1 + torch.finfo(dtype).eps * 2**24 / 32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case, dtype, device, guarded):
    maps, weight, _ = inputs(case, dtype, device)
    y = concat_pointwise(maps, weight, case.size, case.relu, config=case.tiles[0])
    v = concatenated(case, maps)
    v = v.relu() if case.relu else v
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, product(v, weight), product(v.abs(), weight.abs()) * slack(dtype))


@pytest.mark.parametrize("dtype", DTYPES if CUDA else DTYPES[:2], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case, dtype, device, guarded):
    maps, weight, dy = inputs(case, dtype, device)
    dxs, dw = concat_pointwise_backward(dy, maps, weight, case.size, case.relu, case.tiles[1])

    v = concatenated(case, maps)
    dv = torch.einsum("oc,nohw->nchw", weight.double(), dy.double())
    terms = torch.einsum("oc,nohw->nchw", weight.double().abs(), dy.double().abs())
    if case.relu:
        # The other kernel's sums may contract otherwise, and a tiny value have the other sign.
        terms = terms.where(v.abs() > 1e-6, terms * 2**19)
        dv = dv.where(v > 0, 0)
        v = v.relu()
    truths = back(case, dv)
    magnitudes = back(case, terms)
    for dx, x, truth, magnitude in zip(dxs, maps, truths, magnitudes, strict=True):
        assert dx.dtype == dtype and dx.shape == x.shape
        assert_close(dx, truth, magnitude * slack(dtype))
    assert dw.dtype == torch.float32
    dw_truth = torch.einsum("nohw,nchw->oc", dy.double(), v.double())
    magnitude = torch.einsum("nohw,nchw->oc", dy.double().abs(), v.double().abs())
    assert_close(dw, dw_truth, magnitude * slack(dtype))


class _ConcatPointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, size, weight, *maps):
        ctx.size = size
        ctx.save_for_backward(weight, *maps)
        return concat_pointwise(maps, weight, size, relu=True, config=TILE)

    @staticmethod
    def backward(ctx, dy):
        weight, *maps = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        dxs, dw = concat_pointwise_backward(dy, maps, weight, ctx.size, True, GRAD_TILE)
        return None, dw, *dxs


@pytest.mark.skipif(CUDA, reason="float64 is for the interpreter")
def test_gradcheck(device):
    case = Case(((3, 3), (2, 2)), (2, 1), (3, 3), 3, images=1)
    maps, weight, _ = inputs(case, torch.float64, device)
    leaves = [leaf.requires_grad_() for leaf in (weight, *maps)]
    assert torch.autograd.gradcheck(
        lambda *leaves: _ConcatPointwise.apply(case.size, *leaves), leaves, fast_mode=True
    )


def test_same_inputs_same_bits(device):
    case = LARGE[-1] if CUDA else SMALL[1]
    maps, weight, dy = inputs(case, torch.bfloat16, device)

    def results() -> list[Tensor]:
        y = concat_pointwise(maps, weight, case.size, True, config=case.tiles[0])
        dxs, dw = concat_pointwise_backward(dy, maps, weight, case.size, True, case.tiles[1])
        return [y, dw, *dxs]

    first, *others = [results() for _ in range(3 if CUDA else 2)]
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_bad_arguments_are_named(device):
    x = random_map((2, 4, 3, 5), torch.float32, device)
    weight = random_weight((6, 8), device)
    with pytest.raises(ValueError, match="maps: 0 given, need 1 to 4"):
        concat_pointwise([], weight, (3, 5))
    with pytest.raises(ValueError, match=r"maps\[1\]: shape \(1, 4, 3, 5\)"):
        concat_pointwise([x, x[:1]], weight, (3, 5))
    with pytest.raises(ValueError, match=r"size: \(0, 5\)"):
        concat_pointwise([x, x], weight, (0, 5))
    with pytest.raises(ValueError, match=r"weight: shape \(6, 8\), need \(6, 4\)"):
        concat_pointwise([x], weight, (3, 5))
    with pytest.raises(ValueError, match=r"weight: shape \(6,\), need \(C_out, 8\)"):
        concat_pointwise([x, x], weight[:, 0], (3, 5))
    with pytest.raises(ValueError, match=r"dy: shape \(2, 4, 3, 5\), need \(2, 6, 3, 5\)"):
        concat_pointwise_backward(x, [x, x], weight, (3, 5))
    dy = random_map((2, 6, 3, 5), torch.float32, device)
    with pytest.raises(ValueError, match=r"dy: dtype torch.float16, maps\[0\] has torch.float32"):
        concat_pointwise_backward(dy.half(), [x, x], weight, (3, 5))
    wide = random_map((2, 129, 3, 5), torch.float32, device)
    with pytest.raises(ValueError, match="dy: 129 channels, need up to 128"):
        concat_pointwise_backward(wide, [x], random_weight((129, 4), device), (3, 5))
