"""Pointwise products against float64, their statistics against those of the stored maps."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lgcnet_fast.kernels.pointwise import ProductConfig, pointwise
from tests.kernels.products import (
    CUDA,
    DTYPES,
    assert_close,
    assert_statistics,
    random_map,
    random_weight,
    rounded,
)

TILE = ProductConfig(block_m=16, block_n=16, block_k=16, warps=1, stages=2)


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]
    out_channels: int
    branches: int = 1
    relu: bool = True
    affine: bool = False
    config: ProductConfig | None = None


SMALL = [
    Case((2, 1, 1, 1), 1),
    Case((2, 3, 3, 5), 17, relu=False),
    Case((1, 17, 5, 7), 33, branches=3, config=TILE),
    Case((2, 48, 3, 5), 20, branches=2, affine=True, config=TILE),
    Case((1, 20, 3, 3), 5, relu=False, affine=True),
]
LARGE = [
    Case((2, channels, 49, 97), out_channels, branches)
    for channels, out_channels, branches in (
        (1, 1, 1),
        (3, 255, 1),
        (17, 48, 5),
        (64, 64, 4),
        (128, 128, 4),
        (255, 3, 2),
        (384, 128, 1),
        (96, 384, 1),
    )
]
LARGE += [
    Case((16, 64, 64, 128), 64, 4, affine=True),
    Case((2, 128, 49, 97), 128, 2, affine=True),
    Case((16, 48, 193, 193), 48),
]
CASES = SMALL + (LARGE if CUDA else [])


@dataclass(frozen=True)
class Inputs:
    maps: list[Tensor]
    weights: Tensor
    scale: Tensor | None
    shift: Tensor | None


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    torch.manual_seed(0)
    channels = case.shape[1]
    # Values of the storage dtype: the interpreter truncates where a GPU rounds.
    weights = random_weight((case.branches, case.out_channels, channels), device).to(dtype)
    weights = weights.double() if dtype == torch.float64 else weights.float()
    affine = None, None
    if case.affine:
        affine = tuple(random_weight((case.branches, channels), device) for _ in range(2))
    maps = [random_map(case.shape, dtype, device) for _ in range(case.branches)]
    return Inputs(maps, weights, *affine)


def operands(case: Case, i: Inputs) -> tuple[Tensor, Tensor]:
    """(B, N, C, H, W) and (B, C_out, C) as the product sees them, in float64."""
    x = torch.stack(i.maps).double()
    dtype = i.maps[0].dtype
    if i.scale is not None and i.shift is not None:
        x = i.scale.double()[:, None, :, None, None] * x + i.shift.double()[:, None, :, None, None]
        x = rounded(x, dtype)
    return x.relu() if case.relu else x, i.weights.double()


def product(x: Tensor, weights: Tensor) -> Tensor:
    return torch.einsum("boc,bnchw->bnohw", weights, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_and_statistics(case, dtype, device, guarded):
    i = inputs(case, dtype, device)
    y, statistics = pointwise(i.maps, i.weights, case.relu, i.scale, i.shift, config=case.config)
    x, weights = operands(case, i)
    magnitude = product(x.abs(), weights.abs())
    if case.affine:  # A rounding of r may fall to the other side.
        magnitude = magnitude * (1 + torch.finfo(dtype).eps * 2**24 / 32)
    assert y.dtype == dtype
    assert all(part.is_contiguous(memory_format=torch.channels_last) for part in y)
    assert_close(y, product(x, weights), magnitude)
    assert_statistics(statistics, list(y), 1e-5)


def test_nan_passes_the_relu(device):
    x = random_map((1, 4, 2, 3), torch.float32, device)
    x[0, 2, 1, 1] = torch.nan
    y, _ = pointwise([x], random_weight((1, 5, 4), device), relu=True)
    assert y[0, 0, :, 1, 1].isnan().all() and y.isnan().sum() == 5


def test_a_stack_of_maps_serves_as_their_list(device):
    stack = random_map((3, 2, 5, 2, 3), torch.float32, device)
    weights = random_weight((3, 4, 5), device)
    from_stack, _ = pointwise(stack, weights)
    from_list, _ = pointwise([part.clone() for part in stack], weights)
    assert torch.equal(from_stack, from_list)


def test_a_large_mean_does_not_cancel(device):
    x = random_map((2, 1, 9, 9), torch.float32, device) + 1e3
    weights = torch.ones(1, 1, 1, device=device)
    y, statistics = pointwise([x], weights, config=TILE)
    assert torch.equal(y[0], x)
    truth = x.double().var(correction=0)
    assert abs(statistics.variance.item() - truth.item()) < 2**-24 * 1e3


def test_same_inputs_same_bits(device):
    case = LARGE[-3] if CUDA else Case((1, 20, 5, 7), 17, branches=2, config=TILE)
    i = inputs(case, torch.bfloat16, device)
    first, *others = [pointwise(i.maps, i.weights, config=case.config) for _ in range(3)]
    for y, statistics in others:
        assert torch.equal(y, first[0])
        assert torch.equal(statistics.mean, first[1].mean)
        assert torch.equal(statistics.variance, first[1].variance)


@pytest.mark.skipif(not CUDA, reason="the interpreter truncates")
def test_weights_are_rounded_to_the_storage_dtype(device):
    x = random_map((2, 20, 5, 7), torch.bfloat16, device)
    weights = random_weight((1, 17, 20), device)
    y, _ = pointwise([x], weights)
    assert torch.equal(y, pointwise([x], weights.bfloat16())[0])


@pytest.mark.skipif(CUDA, reason="float64 is for the interpreter")
def test_float64_through_the_interpreter(device):
    case = Case((1, 5, 3, 3), 4, branches=2, affine=True)
    i = inputs(case, torch.float64, device)
    y, statistics = pointwise(i.maps, i.weights, case.relu, i.scale, i.shift)
    x, weights = operands(case, i)
    torch.testing.assert_close(y, product(x, weights), rtol=1e-13, atol=1e-13)
    assert statistics.mean.dtype == torch.float64
    torch.testing.assert_close(statistics.mean, y.mean((1, 3, 4)), rtol=1e-13, atol=1e-13)


@pytest.mark.skipif(not CUDA, reason="the interpreter serves float64")
def test_float64_is_refused_on_a_gpu(device):
    x = random_map((1, 4, 2, 3), torch.float64, device)
    with pytest.raises(ValueError, match=r"maps\[0\]: float64 .* interpreter only"):
        pointwise([x], random_weight((1, 5, 4), device))


def test_bad_arguments_are_named(device):
    x = random_map((2, 4, 3, 5), torch.float32, device)
    weights = random_weight((1, 6, 4), device)
    with pytest.raises(ValueError, match="maps: need at least one"):
        pointwise([], weights)
    with pytest.raises(ValueError, match=r"maps\[1\]: shape"):
        pointwise([x, x[:1]], weights)
    with pytest.raises(ValueError, match=r"maps\[1\]: dtype"):
        pointwise([x, x.half()], weights)
    with pytest.raises(ValueError, match=r"maps\[0\]: strides"):
        pointwise([x.contiguous()], weights)
    with pytest.raises(ValueError, match=r"weights: shape \(1, 6, 4\), need \(2, 6, 4\)"):
        pointwise([x, x], weights)
    with pytest.raises(ValueError, match=r"weights: shape \(6, 4\), need \(branches, C_out, C\)"):
        pointwise([x], weights[0])
    with pytest.raises(ValueError, match="weights: strides"):
        pointwise([x], weights.mT.contiguous().mT)
    with pytest.raises(ValueError, match="shift: missing"):
        pointwise([x], weights, scale=weights[:, 0])
    with pytest.raises(ValueError, match=r"shift: shape \(4,\), need \(1, 4\)"):
        pointwise([x], weights, scale=weights[:, 0], shift=weights[0, 0])
    with pytest.raises(ValueError, match="maps: one value a channel"):
        pointwise([random_map((1, 4, 1, 1), torch.float32, device)], weights)


@pytest.mark.gpu
def test_more_than_2_31_elements(device):
    x = torch.randn(3, 4096, 2816, 64, device=device, dtype=torch.bfloat16).movedim(-1, 1)
    assert x.numel() > 2**31
    weights = random_weight((1, 64, 64), device)
    y, statistics = pointwise([x], weights)
    last, _ = pointwise([x[2:]], weights)
    assert torch.equal(y[0, 2:], last[0])
    assert_statistics(statistics, [y[0]], 1e-5)
