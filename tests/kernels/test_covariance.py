"""Covariances of channels against float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lgcnet_fast.kernels.covariance import LONGEST, TILES, CovarianceConfig, covariance
from lgcnet_fast.kernels.product_sum import MAX_CHANNELS
from tests.combinations import some_combinations
from tests.kernels.products import CUDA, DTYPES, random_map

TILE = CovarianceConfig(block_m=16, block_c=16, warps=1, stages=2, programs=12)

ROUNDED = 2**-16 if CUDA else 2**-18
"""Relative error of sums of many squares, each step rounded to nearest."""
CUT_OFF = 2**-27 if CUDA else 0
"""Of a sum of n squares, times n, what matrix units cut off. A step aligns 16 products and the sum
so far to the largest and cuts each off two bits below the unit of float32: an eighth of a unit on
average, 17 times, two units in all. A growing sum has on average 3/8 of the last unit, at most
2^-23 of it, and n / 16 steps: n / 16 * 2 * 3/8 * 2^-23 < n 2^-27. On an H200 it was 3.64e-5 of 6554
squares of float16, and 7.0e-4 of 2^18 of bfloat16 in variances 1.8 times as large."""


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]
    maps: int = 1
    config: CovarianceConfig | None = None

    def inputs(self, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        torch.manual_seed(0)
        return [random_map(self.shape, dtype, device) for _ in range(self.maps)]


SMALL = [
    Case((1, 1, 1, 1)),
    Case((2, 3, 3, 5), 3),
    Case((1, 17, 9, 23), 2, TILE),
    Case((1, 48, 7, 19), 1, TILE),
    Case((2, 48, 5, 31), 2),
    Case((1, 144, 3, 13)),
]
LARGE = [
    Case((2, channels, 49, 97), maps)
    for channels, maps in ((1, 1), (3, 2), (17, 5), (48, 5), (144, 5), (255, 2), (256, 1))
]
LARGE += [Case((16, 32, 64, 128), 8), Case((16, 64, 32, 64), 25), Case((16, 128, 16, 32), 8)]
CASES = SMALL + (LARGE if CUDA else [])


def reference(d: Tensor) -> tuple[Tensor, Tensor]:
    rows = d.double().movedim(1, -1).flatten(0, 2)
    mean = rows.mean(0)
    return mean, (rows - mean).T @ (rows - mean) / len(rows)


def sums_error(ds: list[Tensor], config: CovarianceConfig | None) -> float:
    """Relative, of the sums of squares of a share."""
    config = config or CovarianceConfig.default(ds[0].shape[1], ds[0].dtype)
    return ROUNDED + CUT_OFF * config.share(len(ds), ds[0].numel() // ds[0].shape[1])


def assert_right(
    ds: list[Tensor],
    mean: Tensor,
    matrices: Tensor,
    config: CovarianceConfig | None,
    rounding: float = 0,
) -> None:
    """Within float32 rounding and, where differences are rounded, of one in the storage dtype."""
    accumulated = sums_error(ds, config)
    for k, d in enumerate(ds):
        true_mean, truth = reference(d)
        deviation = truth.diagonal().sqrt()
        assert not mean[k].isnan().any() and not matrices[k].isnan().any()
        bound = 2**-21 * (true_mean.abs() + deviation) + rounding * deviation + 1e-9
        assert ((mean[k] - true_mean).abs() <= bound).all()
        bound = (accumulated + rounding) * (deviation[:, None] * deviation) + 1e-9
        assert ((matrices[k] - truth).abs() <= bound).all()


@some_combinations("case, dtype", CASES, DTYPES)
def test_mean_and_covariance(case, dtype, device, guarded):
    ds = case.inputs(dtype, device)
    mean, matrices = covariance(ds, case.config)
    channels = case.shape[1]
    assert mean.shape == (case.maps, channels) and mean.dtype == torch.float32
    assert matrices.shape == (case.maps, channels, channels) and matrices.dtype == torch.float32
    assert mean.is_contiguous() and matrices.is_contiguous()
    assert_right(ds, mean, matrices, case.config)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ratio", [3.0, 5.0, 100.0, -100.0])
def test_a_large_mean_costs_no_digits(ratio, dtype, device):
    """Of every other channel; the maps are as the storage dtype holds them."""
    torch.manual_seed(0)
    d = torch.randn(2, 10, 16, 20, dtype=torch.float64)
    d[..., ::2] += ratio
    ds = [d.to(device, dtype).movedim(-1, 1)]
    # Where means are near, some differences have more digits than the storage dtype.
    rounding = torch.finfo(dtype).eps * (abs(ratio) if dtype == torch.float32 else 1 / 16)
    assert_right(ds, *covariance(ds, TILE), TILE, rounding)


def test_an_outlier_among_the_first_values(device):
    d = Case((2, 5, 9, 16)).inputs(torch.float32, device)[0]
    d[0, :, 0, 0] = 1e4
    assert_right([d], *covariance([d], TILE), TILE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_channels_have_no_variance(dtype, device):
    d = Case((2, 5, 9, 7)).inputs(dtype, device)[0]
    d[:, 1], d[:, 3] = 7.3, 0
    mean, matrices = covariance([d], TILE)
    value = d[0, 1, 0, 0].item()
    assert mean[0, 1].item() == pytest.approx(value, rel=1e-6) and mean[0, 3] == 0
    assert matrices[0, 1].abs().max() < 1e-5 and matrices[0, 1, 1] >= 0
    assert not matrices[0, 3].any()


@pytest.mark.parametrize("position", [0, -1])
def test_nan_reaches_its_rows_and_columns(position, device):
    d = Case((1, 3, 9, 4)).inputs(torch.float32, device)[0]
    d[0, 1, position, position] = torch.nan
    mean, matrices = covariance([d], TILE)
    assert mean[0].isnan().tolist() == [False, True, False]
    assert matrices[0].isnan().sum() == 5 and matrices[0, 1].isnan().all()


def test_same_inputs_same_bits(device):
    case = LARGE[-1] if CUDA else SMALL[2]
    ds = case.inputs(torch.bfloat16, device)
    first, *others = [covariance(ds, case.config) for _ in range(4)]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_maps_may_be_parts_of_stacks(device):
    ds = SMALL[1].inputs(torch.bfloat16, device)
    stack = torch.stack([d.movedim(1, -1) for d in ds]).movedim(-1, 2)
    for found, wanted in zip(covariance(stack.unbind()), covariance(ds), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.skipif(CUDA, reason="float64 is for the interpreter")
def test_float64_through_the_interpreter(device):
    ds = Case((2, 5, 7, 9), 2).inputs(torch.float64, device)
    for k, (mean, matrix) in enumerate(zip(*covariance(ds, TILE), strict=True)):
        true_mean, truth = reference(ds[k])
        torch.testing.assert_close(mean, true_mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(matrix, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("channels, positions", [(32, 2**17), (64, 2**15), (128, 2**13), (3, 1)])
@pytest.mark.parametrize("maps", [1, 8, 25])
def test_shares_are_whole_tiles_of_about_as_many_programs(maps, channels, positions, dtype):
    config = CovarianceConfig.default(channels, dtype)
    share = config.share(maps, positions)
    shares = -(-positions // share)
    assert share % config.block_m == 0 and (shares == 1 or share >= TILES * config.block_m)
    assert shares == 1 or shares * maps <= config.programs
    assert config.share(1000, 2**31) <= LONGEST


def test_bad_arguments_are_named(device):
    ds = SMALL[1].inputs(torch.float32, device)
    for maps, message in (
        ([], "ds: need at least one"),
        ([ds[0], ds[1][:1]], r"ds\[1\]: shape"),
        ([ds[0], ds[1].half()], r"ds\[1\]: dtype"),
        ([ds[0].contiguous()], r"ds\[0\]: strides"),
        ([ds[0].new_zeros(1, MAX_CHANNELS + 1, 1, 1)], r"ds\[0\]: 257 channels, need up to 256"),
    ):
        with pytest.raises(ValueError, match=message):
            covariance(maps)


@pytest.mark.gpu
def test_more_than_2_31_elements(device):
    d = torch.randn(3, 4096, 2816, 64, device=device, dtype=torch.bfloat16).movedim(-1, 1)
    assert d.numel() > 2**31
    d[2, :, -1] += 100
    mean, matrices = covariance([d])
    torch.testing.assert_close(mean[0], d.double().mean((0, 2, 3)).float(), rtol=0, atol=1e-5)
    variance = d.double().var((0, 2, 3), correction=0).float()
    rtol = sums_error([d], None)
    torch.testing.assert_close(matrices[0].diagonal(), variance, rtol=rtol, atol=0)
