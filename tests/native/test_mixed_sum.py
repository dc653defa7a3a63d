"""The kernels of a mixed node against float64, on every route that this machine has."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lgcnet_fast.native.launcher import Launcher
from lgcnet_fast.native.mixed_sum import MAX_MAPS, Statistics, batch_statistics, mixed_sum
from lgcnet_fast.native.mixed_sum_backward import (
    GradientSums,
    mixed_sum_grad,
    mixed_sum_gradient_sums,
)
from lgcnet_fast.native.operands import STORAGE
from tests.native.truth import assert_close, nhwc, poisoned_memory

# Shape, branches, plain terms.
CASES = [
    ((2, 16, 5, 7), 3, 2),
    ((1, 3, 3, 5), 2, 0),
    ((1, 17, 1, 2), 1, 1),
    ((1, 8, 49, 31), 2, 1),
    ((1, 2, 3, 3), 40, 3),
    ((1, 1100, 2, 1), 1, 1),
]
LARGE = [((16, 64, 32, 64), 18, 3), ((4, 48, 97, 193), 10, 0), ((2, 255, 49, 97), 6, 1)]


@dataclass(frozen=True)
class Truth:
    """Inputs as the kernels get them, results in float64."""

    ys: list[Tensor]
    xs: list[Tensor]
    g: Tensor
    z: Tensor
    plain_z: Tensor
    mean: Tensor
    variance: Tensor
    out: Tensor
    dys: list[Tensor]
    dxs: list[Tensor]
    dz: Tensor
    dplain_z: Tensor


def truth(
    shape: tuple[int, int, int, int],
    branches: int,
    plain: int,
    dtype: torch.dtype,
    device: torch.device,
    offset: float = 0.5,
) -> Truth:
    generator = torch.Generator().manual_seed(sum(shape))

    def maps(count: int) -> list[Tensor]:
        values = (torch.randn(shape, generator=generator) + offset for _ in range(count))
        return [nhwc(value.to(dtype), device) for value in values]

    ys, xs, (g,) = maps(branches), maps(plain), maps(1)
    z, plain_z = (torch.rand(n, generator=generator).to(device) for n in (branches, plain))
    leaves = [leaf.double().requires_grad_() for leaf in (*ys, *xs, z, plain_z)]
    exact_ys, exact_xs = leaves[:branches], leaves[branches:-2]
    means = [y.mean((0, 2, 3), keepdim=True) for y in exact_ys]
    variances = [y.var((0, 2, 3), correction=0, keepdim=True) for y in exact_ys]
    statistics = zip(exact_ys, means, variances, strict=True)
    terms = [(y - mean) / (variance + 1e-5).sqrt() for y, mean, variance in statistics]
    weighted = zip([*terms, *exact_xs], [*leaves[-2], *leaves[-1]], strict=True)
    out = torch.stack([weight * term for term, weight in weighted]).sum(0)
    gradients = list(torch.autograd.grad(out, leaves, g.double(), materialize_grads=True))
    flat = [torch.stack([one.flatten() for one in kind]).detach() for kind in (means, variances)]
    dys, dxs = gradients[:branches], gradients[branches:-2]
    return Truth(ys, xs, g, z, plain_z, *flat, out.detach(), dys, dxs, *gradients[-2:])


def check(case: Truth, dtype: torch.dtype, launcher: Launcher) -> None:
    """Statistics, sum, gradient sums and gradients, each from what the kernels gave before."""
    with poisoned_memory():
        statistics = batch_statistics(case.ys, launcher=launcher)
        out = mixed_sum(case.ys, case.z, statistics, case.xs, case.plain_z, launcher=launcher)
        sums = mixed_sum_gradient_sums(case.g, case.ys, statistics, case.xs, launcher=launcher)
        dys, dxs = mixed_sum_grad(
            case.g, case.ys, case.z, statistics, sums, case.plain_z, launcher=launcher
        )
    positions = case.g.numel() // case.g.shape[1]
    single = torch.float32
    assert_close(statistics.mean, case.mean, single)
    assert_close(statistics.variance, case.variance, single, slack=2)
    # Where the variance is tiny, its relative error is that of 1 / sqrt(eps).
    exact_deviation = (case.variance + 1e-5).rsqrt()
    assert_close(statistics.inverse_deviation / exact_deviation, torch.ones_like(case.mean), single)
    large = statistics.inverse_deviation.max().item() * 4
    assert_close(out, case.out, dtype, len(case.ys), slack=large)
    for found, exact in zip((*dys, *dxs), (*case.dys, *case.dxs), strict=True):
        assert_close(found, exact, dtype, slack=large * 4)
    assert_close(sums.gradient, case.g.double().sum((0, 2, 3)), single, positions)
    terms = case.g.numel()
    assert_close(sums.normalised.sum(1), case.dz, single, terms, slack=large * terms**0.5)
    if case.xs:
        assert_close(sums.plain.sum(1), case.dplain_z, single, terms, slack=terms**0.5)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize(("shape", "branches", "plain"), CASES)
def test_a_node_and_its_gradients(
    launcher: Launcher,
    device: torch.device,
    shape: tuple[int, int, int, int],
    branches: int,
    plain: int,
    dtype: torch.dtype,
) -> None:
    check(truth(shape, branches, plain, dtype, device), dtype, launcher)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize(("shape", "branches", "plain"), LARGE)
def test_large_nodes(
    gpu_launcher: Launcher,
    shape: tuple[int, int, int, int],
    branches: int,
    plain: int,
    dtype: torch.dtype,
) -> None:
    device = torch.device(gpu_launcher.device_type)
    check(truth(shape, branches, plain, dtype, device), dtype, gpu_launcher)


def test_a_large_mean_does_not_cancel(launcher: Launcher, device: torch.device) -> None:
    """Mean 3000 times the deviation: E[y^2] - E[y]^2 would have no correct digit in float32."""
    case = truth((2, 8, 33, 20), 1, 0, torch.float32, device, offset=3000)
    statistics = batch_statistics(case.ys, launcher=launcher)
    ratio = statistics.variance.double() / case.variance
    assert (ratio - 1).abs().max() < 1e-4


def test_many_tiles_take_several_rounds(
    launcher: Launcher, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lgcnet_fast.native.mixed_sum.MOST_TILES", 2)
    case = truth((1, 256, 19, 11), 1, 0, torch.float32, device)
    statistics = batch_statistics(case.ys, launcher=launcher)
    assert_close(statistics.mean, case.mean, torch.float32)
    assert_close(statistics.variance, case.variance, torch.float32, slack=2)


def test_statistics_of_several_ranks(launcher: Launcher, device: torch.device) -> None:
    """`count` and summed sums: two halves of a batch give the gradients of the whole."""
    case = truth((2, 4, 5, 3), 2, 1, torch.float32, device)
    statistics = batch_statistics(case.ys, launcher=launcher)
    halves = [[nhwc(one[i : i + 1], device) for one in (case.g, *case.ys)] for i in range(2)]
    parts = [
        mixed_sum_gradient_sums(half[0], half[1:], statistics, launcher=launcher) for half in halves
    ]
    sums = GradientSums(
        sum(part.gradient for part in parts), sum(part.normalised for part in parts), parts[0].plain
    )
    for i, half in enumerate(halves):
        dys, dxs = mixed_sum_grad(
            half[0], half[1:], case.z, statistics, sums, case.plain_z, count=30, launcher=launcher
        )
        for found, exact in zip((*dys, *dxs), (*case.dys, *case.dxs), strict=True):
            assert_close(found, exact[i : i + 1], torch.float32, slack=4)


def test_unaligned_maps_and_statistics(launcher: Launcher, device: torch.device) -> None:
    case = truth((1, 8, 4, 3), 2, 1, torch.bfloat16, device)

    def moved(tensor: Tensor) -> Tensor:
        flat = tensor.new_empty(tensor.numel() + 1)[1:]
        return flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)

    ys = [moved(y) for y in case.ys]
    statistics = batch_statistics(ys, launcher=launcher)
    mean, deviation = moved(statistics.mean), moved(statistics.inverse_deviation)
    statistics = Statistics(mean, statistics.variance, deviation)
    out = mixed_sum(case.ys, case.z, statistics, case.xs, case.plain_z, launcher=launcher)
    assert_close(out, case.out, torch.bfloat16)


def test_weights_of_another_dtype(launcher: Launcher, device: torch.device) -> None:
    case = truth((1, 4, 3, 3), 2, 1, torch.float16, device)
    statistics = batch_statistics(case.ys, launcher=launcher)
    z, plain_z = case.z.double(), case.plain_z.double()
    out = mixed_sum(case.ys, z, statistics, case.xs, plain_z, launcher=launcher)
    assert_close(out, case.out, torch.float16)


def test_statistics_and_gradients_go_where_they_are_wanted(
    launcher: Launcher, device: torch.device
) -> None:
    case = truth((1, 4, 3, 5), 2, 0, torch.float32, device)
    out = torch.full((3, 2, 4), float("nan"), device=device)
    statistics = batch_statistics(case.ys, out=out, launcher=launcher)
    assert_close(out[0], case.mean, torch.float32)
    sums = mixed_sum_gradient_sums(case.g, case.ys, statistics, launcher=launcher)
    dys = [torch.full_like(y, float("nan")) for y in case.ys]
    found, _ = mixed_sum_grad(case.g, case.ys, case.z, statistics, sums, dys=dys, launcher=launcher)
    for given, returned, exact in zip(dys, found, case.dys, strict=True):
        assert returned is given
        assert_close(given, exact, torch.float32, slack=8)
    with pytest.raises(ValueError, match="dys: 1 maps, need 2"):
        mixed_sum_grad(case.g, case.ys, case.z, statistics, sums, dys=dys[:1], launcher=launcher)
    with pytest.raises(ValueError, match="out: shape"):
        batch_statistics(case.ys, out=out[:2], launcher=launcher)


def test_the_same_inputs_give_the_same_bits(launcher: Launcher, device: torch.device) -> None:
    case = truth((2, 12, 10, 9), 3, 1, torch.bfloat16, device)
    runs = []
    for _ in range(2):
        statistics = batch_statistics(case.ys, launcher=launcher)
        sums = mixed_sum_gradient_sums(case.g, case.ys, statistics, case.xs, launcher=launcher)
        runs.append((statistics.mean, statistics.variance, sums.normalised, sums.plain))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements(gpu_launcher: Launcher) -> None:
    shape = (2, 64, 4100, 4100)
    y = torch.zeros(shape, dtype=torch.bfloat16, device=gpu_launcher.device_type)
    y = y.contiguous(memory_format=torch.channels_last)
    y[1] = 2
    statistics = batch_statistics([y], eps=0, launcher=gpu_launcher)
    ones = torch.ones(1, 64, device=y.device)
    torch.testing.assert_close(statistics.mean, ones, rtol=1e-5, atol=0)
    torch.testing.assert_close(statistics.variance, ones, rtol=1e-5, atol=0)
    z = torch.ones(1, device=y.device)
    out = mixed_sum([y], z, statistics, launcher=gpu_launcher)
    assert (out[0, :, -1, -1] == -1).all() and (out[1, :, -1, -1] == 1).all()
    sums = mixed_sum_gradient_sums(y, [y], statistics, launcher=gpu_launcher)
    torch.testing.assert_close(sums.normalised[0], sums.gradient, rtol=1e-5, atol=0)


def test_bad_arguments_are_named(emulated: Launcher) -> None:
    case = truth((1, 4, 3, 3), 2, 1, torch.float32, torch.device("cpu"))
    ys, z = case.ys, case.z
    statistics = batch_statistics(ys, launcher=emulated)
    with pytest.raises(ValueError, match="ys: need at least one"):
        batch_statistics([], launcher=emulated)
    with pytest.raises(ValueError, match="ys: one value a channel"):
        batch_statistics([nhwc(torch.zeros(1, 4, 1, 1))], launcher=emulated)
    with pytest.raises(ValueError, match=r"ys\[1\]: dtype"):
        batch_statistics([ys[0], ys[1].half()], launcher=emulated)
    with pytest.raises(ValueError, match=r"ys\[0\]: strides .* not dense"):
        batch_statistics([nhwc(torch.zeros(1, 8, 3, 3))[:, :4]], launcher=emulated)
    with pytest.raises(ValueError, match="ys: 65 maps at one node, at most 64"):
        batch_statistics([ys[0]] * (MAX_MAPS + 1), launcher=emulated)
    with pytest.raises(ValueError, match="xs: 66 maps at one node"):
        mixed_sum(ys, z, statistics, [ys[0]] * MAX_MAPS, launcher=emulated)
    with pytest.raises(ValueError, match=r"z: shape \(1,\)"):
        mixed_sum(ys, z[:1], statistics, launcher=emulated)
    with pytest.raises(ValueError, match=r"plain_z: shape \(0,\)"):
        mixed_sum(ys, z, statistics, [ys[0]], launcher=emulated)
    wrong = Statistics(statistics.mean.double(), statistics.variance, statistics.inverse_deviation)
    with pytest.raises(ValueError, match=r"statistics.mean: dtype torch.float64"):
        mixed_sum(ys, z, wrong, launcher=emulated)
    with pytest.raises(ValueError, match=r"g\[0\]: shape"):
        mixed_sum_gradient_sums(nhwc(torch.zeros(1, 4, 3, 4)), ys, statistics, launcher=emulated)
    sums = mixed_sum_gradient_sums(case.g, ys, statistics, launcher=emulated)
    with pytest.raises(ValueError, match="sums.normalised: shape"):
        mixed_sum_grad(
            case.g,
            ys,
            z,
            statistics,
            GradientSums(sums.gradient, sums.normalised[:1], sums.plain),
            launcher=emulated,
        )
