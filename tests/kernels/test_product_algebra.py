"""What makes a node of products of its maps, against float64, and the node as a whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lgcnet_fast.kernels.covariance import CovarianceConfig, covariance
from lgcnet_fast.kernels.product_algebra import product_coefficients, product_weights
from lgcnet_fast.kernels.product_gradients import (
    InputGradientsConfig,
    ProductSumsConfig,
    product_input_gradients,
    product_sums,
)
from lgcnet_fast.kernels.product_sum import ProductSumConfig, product_sum
from tests.combinations import some_combinations
from tests.kernels.products import CUDA, DTYPES, random_map

EPS = 1e-5
SMALL = [(1, 1, 1), (2, 3, 17), (3, 17, 3), (2, 48, 33), (1, 144, 48)]
"""Products, channels, output channels."""
LARGE = [(8, 32, 32), (25, 64, 64), (8, 128, 128), (2, 255, 3), (2, 256, 256)]
SIZES = SMALL + (LARGE if CUDA else [])
POSITIONS = 1000


def random_inputs(
    size: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """mean, covariance, matrices, z, sums, s0 of random maps."""
    torch.manual_seed(0)
    products, channels, out_channels = size
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    factor = torch.randn(products, channels, channels) / channels**0.5
    values = {
        "mean": 3 * torch.randn(products, channels),
        "covariance": factor @ factor.mT + torch.eye(channels),
        "z": torch.rand(products),
        "sums": torch.randn(products, out_channels, channels) * POSITIONS**0.5,
        "s0": torch.randn(out_channels) * POSITIONS**0.5,
    }
    matrices = torch.randn(products, out_channels, channels).to(dtype) / channels**0.5
    return {name: value.to(device, acc) for name, value in values.items()} | {
        "matrices": matrices.to(device)
    }


def close(
    found: Tensor, truth: Tensor, tolerance: float = 1e-5, terms: Tensor | None = None
) -> None:
    """Relative to the largest value, or the largest of its terms; one rounding to the dtype."""
    assert found.shape == truth.shape and found.is_contiguous() and not found.isnan().any()
    if found.dtype == torch.float64:
        tolerance = 1e-12
    largest = (truth if terms is None else terms).abs().max()
    bound = torch.finfo(found.dtype).eps * truth.abs() + tolerance * largest
    if found.dtype == torch.float16:
        bound += 2**-24
    assert ((found.double() - truth).abs() <= bound).all()


STORAGE = (*DTYPES, *(() if CUDA else (torch.float64,)))


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_weights(size, dtype, device, guarded):
    inputs = random_inputs(size, dtype, device)
    mean, v, p, z = (inputs[name].double() for name in ("mean", "covariance", "matrices", "z"))
    given = (inputs[name] for name in ("mean", "covariance", "matrices", "z"))
    statistics, weights, shift = product_weights(*given, EPS)
    variance = torch.einsum("koc,kcd,kod->ko", p, v, p)
    r = (variance + EPS).rsqrt()
    assert statistics.dtype == shift.dtype == mean.to(inputs["mean"].dtype).dtype
    close(statistics[0], torch.einsum("koc,kc->ko", p, mean))
    close(statistics[1], variance)
    close(statistics[2], r)
    assert weights.dtype == dtype
    close(weights, z[:, None, None] * r[:, :, None] * p)
    close(shift, torch.einsum("koc,kc->ko", weights.double(), mean))


@pytest.mark.parametrize("training", [True, False])
@some_combinations("size, dtype", SIZES, STORAGE)
def test_coefficients(size, dtype, training, device, guarded):
    inputs = random_inputs(size, dtype, device)
    given = (inputs[name] for name in ("mean", "covariance", "matrices", "z"))
    inputs["statistics"] = product_weights(*given, EPS).statistics
    dz, dp, from_gradient, from_map, shift = product_coefficients(
        **inputs, positions=POSITIONS, training=training
    )
    mean, v, p, z, t, s0, statistics = (
        inputs[name].double()
        for name in ("mean", "covariance", "matrices", "z", "sums", "s0", "statistics")
    )
    of_mean, _, r = statistics
    s1 = r * ((p * t).sum(2) - of_mean * s0)
    close(dz, s1.sum(1), 1e-4)
    scale = (z[:, None] * r)[:, :, None]
    truth = t
    if training:
        truth = t - s0[:, None] * mean[:, None, :] - (s1 * r)[:, :, None] * (p @ v)
    close(dp, scale * truth, terms=scale * t)
    assert from_gradient.dtype == dtype
    close(from_gradient, (scale * p).mT)
    if not training:
        assert from_map is None and shift is None
        return
    assert from_map.dtype == dtype
    close(from_map, -p.mT @ (scale * (r * s1)[:, :, None] / POSITIONS * p))
    rounded = from_gradient.double() @ s0 / POSITIONS
    close(shift, -rounded - torch.einsum("kcd,kd->kc", from_map.double(), mean), 1e-4)


def test_given_statistics_need_no_covariance(device):
    inputs = random_inputs(SMALL[1], torch.float32, device)
    statistics = torch.rand(3, 2, 17, device=device)
    with_them = product_coefficients(
        **inputs, statistics=statistics, positions=POSITIONS, training=False
    )
    without = inputs | {"mean": None, "covariance": None}
    found = product_coefficients(
        **without, statistics=statistics, positions=POSITIONS, training=False
    )
    assert all(torch.equal(a, b) for a, b in zip(found[:3], with_them[:3], strict=True))
    with pytest.raises(ValueError, match="mean: need it in training"):
        product_coefficients(**without, statistics=statistics, positions=POSITIONS, training=True)


def test_same_inputs_same_bits(device):
    inputs = random_inputs(SMALL[3], torch.bfloat16, device)
    runs = []
    for _ in range(3):
        given = (inputs[name] for name in ("mean", "covariance", "matrices", "z"))
        weights = product_weights(*given, EPS)
        found = product_coefficients(
            **inputs, statistics=weights.statistics, positions=POSITIONS, training=True
        )
        runs.append([*weights, *found])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


def test_bad_arguments_are_named(device):
    inputs = random_inputs((2, 3, 4), torch.float32, device)
    mean, v, p, z = (inputs[name] for name in ("mean", "covariance", "matrices", "z"))
    for arguments, message in (
        ((mean, v, p[0], z), r"matrices: shape \(4, 3\), need \(K, C_out, C\)"),
        ((mean, v, p.new_zeros(1, 257, 1), z), "matrices: shape .* need up to 256 channels"),
        ((mean, v, p.mT.contiguous().mT, z), "matrices: strides"),
        ((mean, v, p.int(), z), "matrices: dtype"),
        ((mean[:1], v, p, z), "mean: shape"),
        ((mean.double(), v, p, z), "mean: dtype"),
        ((mean, v[:, :2], p, z), "covariance: shape"),
        ((mean, v, p, z[:1]), "z: shape"),
    ):
        with pytest.raises(ValueError, match=message):
            product_weights(*arguments, EPS)
    inputs["statistics"] = torch.rand(3, 2, 4, device=device)
    for name in ("sums", "s0", "statistics", "z"):
        with pytest.raises(ValueError, match=f"{name}: shape"):
            product_coefficients(**(inputs | {name: inputs[name][:1]}), positions=1, training=True)


class _Node(torch.autograd.Function):
    """Products of maps, normalised, weighted and added."""

    @staticmethod
    def forward(ctx, z, p, *ds):  # type: ignore[no-untyped-def]
        mean, v = covariance(ds, CovarianceConfig(16, 16, 1, 1, programs=4))
        statistics, weights, shift = product_weights(mean, v, p, z, EPS)
        ctx.save_for_backward(mean, v, p, z, statistics, *ds)
        none = shift.new_empty(3, 0, p.shape[1])
        config = ProductSumConfig(16, 16, 1, 1)
        return product_sum(ds, weights, shift, (), none, (), z[:0], config)

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        mean, v, p, z, statistics, *ds = ctx.saved_tensors
        g = g.contiguous(memory_format=torch.channels_last)
        sums, s0 = product_sums(g, ds, ProductSumsConfig(16, 16, 2, 1, 1, programs=2))
        positions = g.numel() // g.shape[1]
        dz, dp, *coefficients = product_coefficients(
            sums, s0, mean, v, p, statistics, z, positions, True
        )
        config = InputGradientsConfig(16, 16, 1, 1, programs=2)
        return dz, dp, *product_input_gradients(g, ds, *coefficients, config=config)


def random_node(
    dtype: torch.dtype, device: torch.device, mean: float = 0.0
) -> tuple[Tensor, Tensor, list[Tensor]]:
    torch.manual_seed(0)
    ds = [random_map((2, 5, 4, 7), torch.float64, device) + mean for _ in range(3)]
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    z, p = torch.rand(3).to(device, acc), torch.randn(3, 4, 5).to(device, dtype)
    return z, p, [d.to(dtype) for d in ds]


def reference(z: Tensor, p: Tensor, *ds: Tensor) -> Tensor:
    terms = [
        z[k] * F.batch_norm(F.conv2d(d, p[k][:, :, None, None]), None, None, training=True, eps=EPS)
        for k, d in enumerate(ds)
    ]
    return torch.stack(terms).sum(0)


@pytest.mark.skipif(CUDA, reason="float64 is for the interpreter")
def test_gradcheck(device):
    z, p, ds = random_node(torch.float64, device)
    leaves = [leaf.requires_grad_() for leaf in (z, p, *ds)]
    torch.testing.assert_close(_Node.apply(*leaves), reference(*leaves))
    assert torch.autograd.gradcheck(_Node.apply, leaves, fast_mode=True)


@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_node(mean, dtype, device):
    """Against batch norms in float64 of the same maps; errors relative to the largest values."""
    z, p, ds = random_node(dtype, device, mean)
    leaves = [leaf.detach().requires_grad_() for leaf in (z, p, *ds)]
    true_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    g = random_map((2, 4, 4, 7), dtype, device)
    outs = [_Node.apply(*leaves), reference(*true_leaves)]
    found, truth = (
        [out, *torch.autograd.grad(out, of, g.to(out.dtype))]
        for out, of in zip(outs, (leaves, true_leaves), strict=True)
    )
    # The rounded weights count, of maps about their means; a large mean costs float32 its digits.
    tolerance = 4 * torch.finfo(dtype).eps + 1e-6 * (1 + abs(mean))
    for a, b in zip(found, truth, strict=True):
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max()
