"""The dense 3x3 convolution against PyTorch's in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lgcnet_fast.kernels.conv3 import conv3
from lgcnet_fast.kernels.pointwise import ProductConfig
from tests.kernels.products import (
    CUDA,
    DTYPES,
    assert_close,
    assert_statistics,
    random_map,
    random_weight,
)

TILE = ProductConfig(block_m=16, block_n=16, block_k=16, warps=1, stages=2)


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]
    out_channels: int
    stride: int = 1
    relu: bool = True
    config: ProductConfig | None = None


SMALL = [
    Case((2, 1, 1, 1), 1),
    Case((1, 3, 3, 5), 20, config=TILE),
    Case((2, 17, 4, 3), 5, stride=2, relu=False),
    Case((1, 35, 5, 6), 18, stride=2, config=TILE),
]
LARGE = [
    Case((2, channels, 49, 97), out_channels, stride)
    for channels, out_channels in (
        (3, 32),
        (32, 64),
        (48, 48),
        (64, 64),
        (96, 48),
        (128, 128),
        (144, 48),
    )
    for stride in (1, 2)
]
LARGE += [Case((16, 48, 64, 128), 48), Case((2, 255, 13, 25), 255)]
CASES = SMALL + (LARGE if CUDA else [])


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    # Values of the storage dtype: the interpreter truncates where a GPU rounds.
    weight = random_weight((case.out_channels, case.shape[1], 3, 3), device).to(dtype)
    weight = weight.double() if dtype == torch.float64 else weight.float()
    weight = weight.contiguous(memory_format=torch.channels_last)
    return random_map(case.shape, dtype, device), weight


def reference(x: Tensor, weight: Tensor, case: Case) -> Tensor:
    x = x.relu() if case.relu else x
    return F.conv2d(x.double(), weight.double(), stride=case.stride, padding=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_convolution_and_statistics(case, dtype, device, guarded):
    x, weight = inputs(case, dtype, device)
    y, statistics = conv3(x, weight, case.stride, case.relu, config=case.config)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, reference(x, weight, case), reference(x.abs(), weight.abs(), case))
    assert_statistics(statistics, [y], 1e-5)


def test_nan_passes_the_relu(device):
    x, weight = inputs(Case((1, 4, 5, 5), 3), torch.float32, device)
    x[0, 1, 0, 0] = torch.nan
    y, _ = conv3(x, weight, relu=True)
    assert y[0, :, :2, :2].isnan().all() and y.isnan().sum() == 12


@pytest.mark.skipif(CUDA, reason="float64 is for the interpreter")
def test_float64_through_the_interpreter(device):
    case = Case((1, 5, 3, 4), 4, stride=2)
    x, weight = inputs(case, torch.float64, device)
    y, _ = conv3(x, weight, case.stride, case.relu)
    torch.testing.assert_close(y, reference(x, weight, case), rtol=1e-13, atol=1e-13)


def test_same_inputs_same_bits(device):
    case = LARGE[-2] if CUDA else SMALL[1]
    x, weight = inputs(case, torch.bfloat16, device)
    first, *others = [conv3(x, weight, config=case.config) for _ in range(3)]
    for y, statistics in others:
        assert torch.equal(y, first[0])
        assert torch.equal(statistics.variance, first[1].variance)


def test_bad_arguments_are_named(device):
    x, weight = inputs(Case((2, 4, 3, 5), 6), torch.float32, device)
    with pytest.raises(ValueError, match="stride: 3, need 1 or 2"):
        conv3(x, weight, 3)
    with pytest.raises(ValueError, match="x: strides"):
        conv3(x.contiguous(), weight)
    with pytest.raises(ValueError, match="weight: strides"):
        conv3(x, weight.contiguous())
    with pytest.raises(ValueError, match=r"weight: shape \(6, 4, 3, 3\), need \(6, 3, 3, 3\)"):
        conv3(random_map((2, 3, 3, 5), torch.float32, device), weight)
    with pytest.raises(ValueError, match=r"weight: need a map"):
        conv3(x, weight[0])
    with pytest.raises(ValueError, match="x: one value a channel"):
        conv3(random_map((1, 4, 2, 2), torch.float32, device), weight, 2)
