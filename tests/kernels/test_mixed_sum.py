"""The mixed sum and its gradients against float64 batch norms, element by element."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lgcnet_fast.kernels.mixed_sum import (
    Statistics,
    TileConfig,
    affine_sum,
    batch_statistics,
    mixed_sum,
)
from lgcnet_fast.kernels.mixed_sum_backward import (
    GradientSums,
    affine_sum_grad,
    mixed_sum_grad,
    mixed_sum_gradient_sums,
)
from lgcnet_fast.kernels.slabs import MOST_SLABS, SlabConfig
from tests.combinations import some_combinations

EPS = 1e-5
TILE = TileConfig(loads=2, ahead=2, warps=1)
SLABS = SlabConfig(block_c=16, warps=1, loads=1, maps=2, programs=24)


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]
    branches: int
    plain: int = 0
    config: TileConfig | None = None
    slabs: SlabConfig | None = None


SMALL = [
    Case((2, 1, 1, 1), 1),
    Case((1, 3, 3, 5), 2, 1, TILE, SLABS),
    Case((2, 17, 5, 7), 3, 2, TILE, SLABS),
    Case((2, 5, 9, 7), 3, 4, TILE, replace(SLABS, loads=8, maps=4, programs=4)),
    Case((2, 48, 4, 3), 18, 3),
    Case((1, 64, 17, 20), 1),
    Case((1, 24, 7, 19), 3, 1, TileConfig(loads=4, ahead=1, warps=1)),
    Case((2, 48, 9, 11), 5, 0, TILE),
    Case((1, 96, 5, 7), 2, 2, TileConfig(loads=1, ahead=8, warps=2)),
    Case((1, 144, 3, 5), 1, 0, TileConfig(loads=4, ahead=4, warps=1)),
    Case((2, 5, 17, 9), 1, 1, slabs=SlabConfig(8, warps=2, loads=4, maps=2, programs=1)),
]
LARGE = [Case((4, channels, 49, 97), 6, 1) for channels in (1, 3, 17, 48, 64, 255)] + [
    Case((2, 32, 193, 385), 20, 3),
    Case((16, 128, 16, 32), 12, 2),
]
CASES = SMALL + (LARGE if torch.cuda.is_available() else [])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_map(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, mean: float = 1.0
) -> Tensor:
    images, channels, height, width = shape
    values = torch.randn(images, height, width, channels, dtype=torch.float64) + mean
    return values.to(device, dtype).movedim(-1, 1)


def random_maps(case: Case, count: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    return [random_map(case.shape, dtype, device) for _ in range(count)]


@dataclass(frozen=True)
class Inputs:
    ys: list[Tensor]
    xs: list[Tensor]
    z: Tensor
    plain_z: Tensor
    g: Tensor


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    torch.manual_seed(0)
    z = torch.rand(case.branches + case.plain, dtype=torch.float64)
    z = z.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    return Inputs(
        random_maps(case, case.branches, dtype, device),
        random_maps(case, case.plain, dtype, device),
        z[: case.branches].contiguous(),
        z[case.branches :].contiguous(),
        random_map(case.shape, dtype, device),
    )


def reference(ys: Sequence[Tensor], xs: Sequence[Tensor], z: Tensor, plain_z: Tensor) -> Tensor:
    terms = [z[k] * F.batch_norm(y, None, None, training=True, eps=EPS) for k, y in enumerate(ys)]
    return sum(terms + [plain_z[j] * x for j, x in enumerate(xs)], torch.zeros_like(ys[0]))


def reference_gradients(values: Inputs) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """float64 gradients of ys, xs, z, plain_z."""
    ys = [y.double().requires_grad_() for y in values.ys]
    xs = [x.double().requires_grad_() for x in values.xs]
    weights = [z.double().requires_grad_() for z in (values.z, values.plain_z)]
    out = reference(ys, xs, *weights)
    leaves = [*ys, *xs, *weights]
    gradients = torch.autograd.grad(out, leaves, values.g.double(), allow_unused=True)
    return list(gradients[: len(ys)]), list(gradients[len(ys) : -2]), *gradients[-2:]


def assert_close(result: Tensor, truth: Tensor, rounding: float | Tensor) -> None:
    """One rounding to the storage dtype, and `rounding` absolute of the float32 arithmetic."""
    bound = torch.finfo(result.dtype).eps * truth.abs() + rounding
    assert result.shape == truth.shape and not result.isnan().any()
    assert not ((result.double() - truth).abs() > bound).any()


def rounding_of(case: Case) -> float:
    """Of two values a channel, which can lie so close that r is large, or of many."""
    return 1e-5 * (100 if case.shape[0] * case.shape[2] * case.shape[3] < 4 else 1)


TERM = 4 * 2**-24
"""Of a term of a sum: float32 rounds it up to three times, and partial sums, which cancel, less."""


def terms_of_dz(values: Inputs, statistics: Statistics) -> Tensor:
    """(K, N, C, H, W) float64: g times the maps, normalised by these statistics."""
    ys = torch.stack(values.ys).double()
    mean, r = (
        statistic.double()[:, None, :, None, None]
        for statistic in (statistics.mean, statistics.inverse_deviation)
    )
    return values.g.double() * (ys - mean) * r


def moved_by_mean(values: Inputs, statistics: Statistics) -> Tensor:
    """(K,) what a rounded mean may change dz by.

    It moves every normalised value of a channel alike, and so counts sum(g) times; `test_forward`
    allows it 1e-6 and one rounding.
    """
    of_mean = torch.finfo(torch.float32).eps * statistics.mean.double().abs() + 1e-6
    r = statistics.inverse_deviation.double()
    return (values.g.double().sum((0, 2, 3)).abs() * r * of_mean).sum(1)


@some_combinations("case, dtype", CASES, DTYPES)
def test_forward(case: Case, dtype: torch.dtype, device: torch.device, guarded: None) -> None:
    values = inputs(case, dtype, device)
    statistics = batch_statistics(values.ys, EPS, case.slabs)
    for k, y in enumerate(values.ys):
        y = y.double()
        assert_close(statistics.mean[k], y.mean((0, 2, 3)), 1e-6)
        variance = y.var((0, 2, 3), correction=0)
        # Where what the sums are about is two deviations off, their rounding counts five times.
        assert_close(statistics.variance[k], variance, 1e-6 + 5 * 2**-22 * variance)
    out = mixed_sum(values.ys, values.z, statistics, values.xs, values.plain_z, config=case.config)
    truth = reference(
        [y.double() for y in values.ys],
        [x.double() for x in values.xs],
        values.z.double(),
        values.plain_z.double(),
    )
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    assert_close(out, truth, rounding_of(case) * max(1, case.branches / 4))


@some_combinations("case, dtype", [case for case in CASES if case.shape[2] > 1], DTYPES)
def test_gradients(case: Case, dtype: torch.dtype, device: torch.device, guarded: None) -> None:
    values = inputs(case, dtype, device)
    statistics = batch_statistics(values.ys, EPS, case.slabs)
    weights = torch.full_like(torch.cat((values.z, values.plain_z)), torch.nan)
    sums = mixed_sum_gradient_sums(values.g, values.ys, statistics, values.xs, case.slabs, weights)
    dys, dxs = mixed_sum_grad(
        values.g, values.ys, values.z, statistics, sums, values.plain_z, config=case.config
    )
    truth_dys, truth_dxs, truth_dz, truth_plain_dz = reference_gradients(values)
    for dy, truth in zip(dys, truth_dys, strict=True):
        assert dy.dtype == dtype and dy.is_contiguous(memory_format=torch.channels_last)
        assert_close(dy, truth, 2e-5)
    for dx, truth in zip(dxs, truth_dxs, strict=True):
        assert_close(dx, truth, 1e-6)
    terms = terms_of_dz(values, statistics)
    rounding = TERM * terms.abs().sum((1, 3, 4)) + 1e-5
    assert_close(sums.normalised, terms.sum((1, 3, 4)), rounding)
    moved = moved_by_mean(values, statistics)
    assert sums.weights is not None
    dz, plain_dz = sums.weights.split([case.branches, case.plain])
    assert_close(dz, truth_dz, rounding.sum(1) + moved)
    if case.plain:
        terms = values.g.double() * torch.stack(values.xs).double()
        rounding = TERM * terms.abs().sum((1, 2, 3, 4)) + 1e-5
        assert_close(plain_dz, truth_plain_dz, rounding)


@some_combinations("case, dtype", [case for case in CASES if case.shape[2] > 1], DTYPES)
def test_affine_sum(case: Case, dtype: torch.dtype, device: torch.device, guarded: None) -> None:
    """Forward and gradients of the maps, where a gamma is zero."""
    values = inputs(case, dtype, device)
    gammas, betas = (
        [torch.randn(case.shape[1], device=device) for _ in values.ys] for _ in range(2)
    )
    gammas[0][0] = 0
    statistics = batch_statistics(values.ys, EPS, case.slabs)
    out = affine_sum(values.ys, gammas, betas, statistics, values.xs, config=case.config)
    sums = mixed_sum_gradient_sums(values.g, values.ys, statistics, config=case.slabs)
    dys = affine_sum_grad(values.g, values.ys, gammas, statistics, sums, config=case.config)

    ys = [y.double().requires_grad_() for y in values.ys]
    norms = [(gamma.double(), beta.double()) for gamma, beta in zip(gammas, betas, strict=True)]
    terms = [
        F.batch_norm(y, None, None, *norm, training=True, eps=EPS)
        for y, norm in zip(ys, norms, strict=True)
    ]
    truth = sum(terms) + sum(x.double() for x in values.xs)
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    assert_close(out, truth.detach(), rounding_of(case) * max(1, case.branches / 2))
    for dy, wanted in zip(dys, torch.autograd.grad(truth, ys, values.g.double()), strict=True):
        assert dy.dtype == dtype and dy.is_contiguous(memory_format=torch.channels_last)
        assert_close(dy, wanted, 1e-4)


def test_affine_parts_that_do_not_fit_are_named(device: torch.device) -> None:
    (y,) = random_maps(SMALL[1], 1, torch.float32, device)
    statistics, weight = batch_statistics([y]), torch.ones(3, device=device)
    with pytest.raises(ValueError, match="betas: 0 for 1 maps"):
        affine_sum([y], [weight], [], statistics)
    with pytest.raises(ValueError, match=r"gammas\[0\]"):
        affine_sum([y], [weight[:2]], [weight], statistics)


@pytest.mark.parametrize("mean", [1e3, -1e4])
def test_a_large_mean_does_not_cancel(mean: float, device: torch.device) -> None:
    torch.manual_seed(0)
    y = random_map((4, 5, 16, 16), torch.float32, device, mean)
    statistics = batch_statistics(
        [y], EPS, SlabConfig(block_c=8, warps=1, loads=1, maps=1, programs=8)
    )
    truth = y.double().var((0, 2, 3), correction=0)
    # Linear in the mean, where the difference of mean square and squared mean is quadratic.
    assert ((statistics.variance[0] - truth).abs() < 2**-24 * abs(mean)).all()
    out = mixed_sum([y], torch.ones(1, device=device), statistics)
    normalised = F.batch_norm(y.double(), None, None, training=True, eps=EPS)
    assert (out - normalised).abs().max() < 4 * 2**-24 * abs(mean)


@pytest.mark.parametrize("programs", [1, 4])
@pytest.mark.parametrize("outlier", [0.0, 9e3])
def test_an_outlier_among_the_first_values_does_not_cancel(
    outlier: float, programs: int, device: torch.device
) -> None:
    """It is among those that sums are about; all others are near one another, far from it."""
    torch.manual_seed(0)
    y = random_map((2, 3, 16, 16), torch.float32, device, mean=1e3)
    y[0, :, 0, 0] = outlier
    config = replace(SLABS, block_c=4, programs=programs)
    statistics = batch_statistics([y], EPS, config)
    assert_close(statistics.mean[0], y.double().mean((0, 2, 3)), 2**-23 * outlier + 1e-6)
    truth = y.double().var((0, 2, 3), correction=0)
    assert ((statistics.variance[0] - truth).abs() < 512 * 2**-23 * truth).all()


def test_more_slabs_than_one_step_adds_up(device: torch.device) -> None:
    torch.manual_seed(0)
    case = Case((1, 3, 1, 19), 1, 1)
    config = SlabConfig(block_c=256, warps=1, loads=1, maps=2, programs=MOST_SLABS)
    assert config.slab(19, 3, shares=1, tile=1) == 1
    assert config.shares(19, 2 * 256) < 19 and config.shares(19, 3 * 256) == 1
    values = inputs(case, torch.float32, device)
    (y,), (x,), g = values.ys, values.xs, values.g.double()
    statistics = batch_statistics([y], EPS, config)
    assert_close(statistics.mean[0], y.double().mean((0, 2, 3)), 1e-5)
    assert_close(statistics.variance[0], y.double().var((0, 2, 3), correction=0), 1e-5)
    sums = mixed_sum_gradient_sums(values.g, [y], statistics, [x], config)
    assert_close(sums.gradient, g.sum((0, 2, 3)), 1e-5)
    assert_close(sums.normalised, terms_of_dz(values, statistics).sum((1, 3, 4)), 1e-4)
    assert_close(sums.plain[0], (g * x.double()).sum((0, 2, 3)), 1e-4)


@pytest.mark.parametrize("position", [0, -1])
def test_nan_reaches_every_statistic(position: int, device: torch.device) -> None:
    y = random_map((1, 3, 5, 4), torch.float32, device)
    y[0, 1, position, position] = torch.nan
    statistics = batch_statistics([y], EPS, SLABS)
    for found in (statistics.mean, statistics.variance, statistics.inverse_deviation):
        assert torch.isnan(found[0]).tolist() == [False, True, False]


def test_slabs_cover_a_map_by_few_programs() -> None:
    config = SlabConfig(block_c=64, warps=4, loads=4, maps=1, programs=528)
    assert config.rows(torch.bfloat16) == 16 and config.rows(torch.float32) == 8
    assert config.slab(65536, 64, shares=1, tile=64) == 128  # 512 slabs, the most
    assert config.slab(65536, 64, shares=18, tile=64) == 36 * 64
    assert config.slab(65536, 64, shares=8, tile=64) == 16 * 64  # 66 slabs
    assert config.slab(100, 64, shares=1, tile=64) == 64
    assert config.slab(2**32, 64, shares=2000, tile=64) * 64 <= 2**30


def test_one_map_is_shared_out_to_all_multiprocessors() -> None:
    config = SlabConfig.default(64, maps=1)
    tile = config.rows(torch.bfloat16) * config.loads
    blocks = 64 // config.block_c
    slab = config.slab(32768, 64, shares=blocks, tile=tile)
    slabs = 32768 // slab
    assert blocks * slabs == 128 and slab % tile == 0
    # The last program of a group of channels adds up its slabs in one step.
    assert config.shares(slabs, 2 * config.block_c) == slabs


def test_a_constant_map_becomes_zero(device: torch.device) -> None:
    y = torch.full((2, 3, 4, 2), 7.5, device=device).contiguous(memory_format=torch.channels_last)
    statistics = batch_statistics([y], EPS, SLABS)
    assert (statistics.variance == 0).all()
    assert (mixed_sum([y], torch.ones(1, device=device), statistics) == 0).all()


def test_statistics_of_two_ranks_merge(device: torch.device) -> None:
    """Half the batch each; the sums added and the whole count give the whole batch's gradient."""
    case = Case((4, 3, 3, 2), 2)
    whole = inputs(case, torch.float32, device)
    statistics = batch_statistics(whole.ys, EPS, SLABS)
    sums = mixed_sum_gradient_sums(whole.g, whole.ys, statistics, config=SLABS)
    dys, _ = mixed_sum_grad(whole.g, whole.ys, whole.z, statistics, sums, config=TILE)

    halves = [(whole.g[half], [y[half] for y in whole.ys]) for half in (slice(2), slice(2, 4))]
    parts = [mixed_sum_gradient_sums(g, ys, statistics, config=SLABS) for g, ys in halves]
    added = GradientSums(
        parts[0].gradient + parts[1].gradient, parts[0].normalised + parts[1].normalised, sums.plain
    )
    for half, (g, ys) in enumerate(halves):
        merged, _ = mixed_sum_grad(g, ys, whole.z, statistics, added, count=24, config=TILE)
        for part, dy in zip(merged, dys, strict=True):
            torch.testing.assert_close(part, dy[2 * half : 2 * half + 2])


def test_same_inputs_same_bits(device: torch.device) -> None:
    case = LARGE[-1] if torch.cuda.is_available() else Case((2, 3, 5, 4), 2, 1, TILE, SLABS)
    values = inputs(case, torch.bfloat16, device)
    runs = []
    for _ in range(3):
        statistics = batch_statistics(values.ys, EPS, case.slabs)
        sums = mixed_sum_gradient_sums(values.g, values.ys, statistics, values.xs, case.slabs)
        assert sums.weights is None
        dys, _ = mixed_sum_grad(values.g, values.ys, values.z, statistics, sums)
        runs.append([statistics.mean, statistics.variance, sums.normalised, sums.plain, *dys])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


class _MixedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, plain_z, x, *ys):  # type: ignore[no-untyped-def]
        statistics = batch_statistics(ys, EPS, SLABS)
        ctx.save_for_backward(z, plain_z, x, *ys)
        ctx.statistics = statistics
        return mixed_sum(ys, z, statistics, (x,), plain_z, config=TILE)

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        z, plain_z, x, *ys = ctx.saved_tensors
        g = g.contiguous(memory_format=torch.channels_last)
        weights = torch.full((len(ys) + 1,), torch.nan, dtype=g.dtype, device=g.device)
        sums = mixed_sum_gradient_sums(g, ys, ctx.statistics, (x,), SLABS, weights)
        dys, dxs = mixed_sum_grad(g, ys, z, ctx.statistics, sums, plain_z, config=TILE)
        return *sums.weights.split([len(ys), 1]), *dxs, *dys


def test_gradcheck(device: torch.device) -> None:
    values = inputs(Case((2, 2, 3, 2), 2, 1), torch.float64, device)
    leaves = [values.z, values.plain_z, *values.xs, *values.ys]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(_MixedSum.apply, leaves, fast_mode=True)


def test_bad_arguments_are_named(device: torch.device) -> None:
    values = inputs(Case((2, 3, 4, 5), 2, 1), torch.float32, device)
    ys, z = values.ys, values.z
    statistics = batch_statistics(ys)
    with pytest.raises(ValueError, match="ys: need at least one"):
        batch_statistics([])
    with pytest.raises(ValueError, match="ys: one value a channel"):
        batch_statistics([random_map((1, 3, 1, 1), torch.float32, device)])
    with pytest.raises(ValueError, match=r"ys\[1\]: shape"):
        batch_statistics([ys[0], random_map((2, 3, 4, 4), torch.float32, device)])
    with pytest.raises(ValueError, match=r"ys\[1\]: dtype"):
        batch_statistics([ys[0], ys[1].half()])
    with pytest.raises(ValueError, match=r"ys\[0\]: strides"):
        batch_statistics([ys[0].contiguous()])
    with pytest.raises(ValueError, match=r"z: shape \(1,\), need \(2,\)"):
        mixed_sum(ys, z[:1], statistics)
    with pytest.raises(ValueError, match=r"plain_z: shape \(0,\), need \(1,\)"):
        mixed_sum(ys, z, statistics, values.xs)
    with pytest.raises(ValueError, match=r"xs\[0\]: dtype"):
        mixed_sum(ys, z, statistics, [values.xs[0].double()], values.plain_z)
    with pytest.raises(ValueError, match=r"statistics.mean: dtype"):
        mixed_sum(ys, z, replace(statistics, mean=statistics.mean.double()))
    with pytest.raises(ValueError, match=r"statistics.inverse_deviation: shape"):
        mixed_sum(ys, z, Statistics(statistics.mean, z, z))
    with pytest.raises(ValueError, match=r"g\[0\]: shape"):
        mixed_sum_gradient_sums(values.g[:1], ys, statistics)
    with pytest.raises(ValueError, match="weights: shape"):
        mixed_sum_gradient_sums(values.g, ys, statistics, weights=values.g.new_empty(1))


@pytest.mark.gpu
def test_more_than_2_31_elements(device: torch.device) -> None:
    y = torch.randn(3, 4096, 2816, 64, device=device, dtype=torch.bfloat16).movedim(-1, 1)
    assert y.numel() > 2**31
    z = torch.ones(1, device=device)
    statistics = batch_statistics([y])
    out = mixed_sum([y], z, statistics)
    sums = mixed_sum_gradient_sums(y, [y], statistics)
    dys, _ = mixed_sum_grad(y, [y], z, statistics, sums)
    # g = y: S1 = M / r var, so dy = r (y - mean) (1 - r^2 var) vanishes but for eps.
    assert dys[0].abs().max() < 1e-2
    mean, r = statistics.mean[0], statistics.inverse_deviation[0]
    last = y[2, :, -4:].float()
    truth = (last - mean[:, None, None]) * r[:, None, None]
    torch.testing.assert_close(out[2, :, -4:].float(), truth, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(r, torch.ones_like(r), rtol=1e-2, atol=1e-2)
