"""Average pooling: fused form against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from lgcnet_fast.errors import BackendError, OperandError
from lgcnet_fast.ops import average_pool, average_pools, use_backend
from lgcnet_fast.ops.average_pool import (
    ALIGNMENT,
    _average_pools,
    _average_pools_backward,
    _run_products,
    _windows,
)
from lgcnet_fast.ops.constants import separate_constants

SHAPES = [(2, 3, 8, 10), (1, 17, 7, 11), (2, 8, 5, 3), (1, 4, 1, 1), (3, 1, 1, 6)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def case(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(0)
    images, channels, height, width = shape
    values = torch.randn(images, height, width, channels, dtype=torch.float64).relu()
    return values.to(device, dtype).movedim(-1, 1).requires_grad_()


def signed_case(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """With zeros."""
    x = case(shape, device, torch.float64).detach()
    return (x - x.flatten().median()).requires_grad_()


def pooled(form: str, x: Tensor, bins: int) -> Tensor:
    """form: a backend, or `products`, those of the backend `cuda`, which need no GPU."""
    if form == "products":
        return _run_products(x, (bins,), False)[0]
    with use_backend(form):
        return average_pool(x, bins)


def outcome(form: str, x: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    y = pooled(form, x, bins)
    torch.manual_seed(1)
    g = torch.randn(y.shape, dtype=torch.float64).to(y)
    return y, *torch.autograd.grad(y, x, g)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", ["triton", "products"])
def test_fused_equals_float64(
    form: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    # Of shapes, dtypes and bins every two meet.
    bins = (1, 2, 5)[(SHAPES.index(shape) + DTYPES.index(dtype)) % 3]
    x = case(shape, device, dtype)
    found = outcome(form, x, bins)
    exact = outcome("reference", x.detach().double().requires_grad_(), bins)
    for value, wanted in zip(found, exact, strict=True):
        assert value.dtype == dtype and value.shape == wanted.shape
        assert value.is_contiguous(memory_format=torch.channels_last)
        # Values are rounded at most three times.
        error = (value.double() - wanted).abs().max()
        assert error <= 3 * torch.finfo(dtype).eps * wanted.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bins", [1, 2, 5])
@pytest.mark.parametrize("shape", [(4, 144, 64, 128), (2, 48, 193, 97)], ids=str)
@pytest.mark.parametrize("form", ["triton", "products"])
def test_sizes_of_the_fusion_cell(
    form: str, shape: tuple[int, ...], bins: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Sums of thousands, for which matrix products choose other kernels than for few."""
    x = case(shape, device, dtype)
    found = outcome(form, x, bins)
    exact = outcome("reference", x.detach().double().requires_grad_(), bins)
    limit = max(3 * torch.finfo(dtype).eps, 1e-5)
    for value, wanted in zip(found, exact, strict=True):
        assert (value.double() - wanted).abs().max() <= limit * wanted.abs().max()


@pytest.mark.parametrize("bins", [1, 2, 5])
@pytest.mark.parametrize("form", ["reference", "triton", "products"])
def test_gradients_by_finite_differences(form: str, bins: int, device: torch.device) -> None:
    x = case((2, 3, 4, 7), device, torch.float64)
    assert torch.autograd.gradcheck(lambda x: pooled(form, x, bins), x, fast_mode=True)


@pytest.mark.parametrize("used", [(0, 1, 2), (2,)])
def test_several_numbers_of_bins_together(used: tuple[int, ...], device: torch.device) -> None:
    """Also where some of the pooled maps get no gradient."""
    x, found = case((2, 3, 6, 7), device, torch.float64), []
    for backend in ("triton", "reference"):
        with use_backend(backend):
            maps = average_pools(x, (2, 1, 5))
        loss = sum(maps[index].square().sum() for index in used)
        found.append((*maps, *torch.autograd.grad(loss, x)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("form", ["triton", "products"])
def test_average_of_a_relu(form: str, device: torch.device) -> None:
    x = signed_case((2, 17, 7, 5), device)
    expected = [F.adaptive_avg_pool2d(x.relu(), bins) for bins in (1, 2, 5)]
    if form == "products":
        found = _run_products(x, (1, 2, 5), True)
    else:
        with use_backend("triton"):
            found = average_pools(x, (1, 2, 5), relu=True)
    torch.testing.assert_close(found, expected)
    gradients = [
        torch.autograd.grad(sum(y.square().sum() for y in ys), x) for ys in (found, expected)
    ]
    torch.testing.assert_close(*gradients)


def test_nan_passes_the_relu(device: torch.device) -> None:
    x = signed_case((1, 2, 3, 4), device).detach()
    x[0, 1, 1, 2] = float("nan")
    x.requires_grad_()
    with use_backend("triton"):
        (y,) = average_pools(x, (1,), relu=True)
    assert y.isnan().flatten().tolist() == [False, True]
    (dx,) = torch.autograd.grad(y.nansum() + 0 * y[0, 0].sum(), x)
    assert dx.isfinite().all()


def test_registration(device: torch.device) -> None:
    x = case((1, 3, 4, 5), device, torch.float32).detach()
    torch.library.opcheck(_average_pools, (x, [1, 2], True))
    means = _average_pools(x, [2], False)
    for rectified in (None, x):
        torch.library.opcheck(_average_pools_backward, (means, [1, 3, 4, 5], [2], rectified))


@pytest.mark.parametrize("bins", [1, 2])
def test_great_values_do_not_overflow(bins: int, device: torch.device) -> None:
    x = torch.full((1, 2, 30, 41), 60000.0, dtype=torch.float16, device=device)
    for form in ("triton", "products"):
        y = pooled(form, x, bins)
        torch.testing.assert_close(y, torch.full_like(y, 60000.0), rtol=2e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bins", [1, 2])
@pytest.mark.parametrize("backend", ["reference", "triton", "products"])
def test_autocast_keeps_the_dtype(
    backend: str, bins: int, dtype: torch.dtype, device: torch.device
) -> None:
    x = case((1, 3, 6, 7), device, dtype)
    with torch.autocast(device.type, torch.bfloat16):
        found = outcome(backend, x, bins)
    assert all(value.dtype == dtype for value in found)
    torch.testing.assert_close(found, outcome(backend, x, bins))


def test_other_layouts_and_expanded_gradients(device: torch.device) -> None:
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64, device=device)[:, :, ::2].requires_grad_()
    for bins in (1, 2):
        found, wanted = (
            torch.autograd.grad(pooled(backend, x, bins).sum(), x)
            for backend in ("triton", "reference")
        )
        torch.testing.assert_close(found, wanted)


def test_nothing_is_kept(device: torch.device) -> None:
    x = case((1, 3, 6, 7), device, torch.float32)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for form in ("triton", "products"):
            for bins in (1, 5):
                outcome(form, x, bins)
    assert not kept


def test_windows_are_those_of_adaptive_pooling(device: torch.device) -> None:
    windows = _windows(7, 11, 5, torch.float64, device)
    members, padding = windows.members[:25], windows.members[25:]
    assert len(windows.members) % ALIGNMENT == 0 and not padding.any()
    positions = torch.eye(77, dtype=torch.float64, device=device).view(77, 1, 7, 11)
    shares = F.adaptive_avg_pool2d(positions, 5).flatten(1).T
    torch.testing.assert_close(members * windows.scale, shares)


def test_without_data(device: torch.device) -> None:
    with FakeTensorMode(), separate_constants(), use_backend("triton"):
        for bins in (1, 2):
            x = torch.rand(2, 3, 5, 6, device=device, requires_grad=True)
            y = average_pool(x, bins)
            assert y.shape == (2, 3, bins, bins)
            assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_bad_arguments_are_named(backend: str) -> None:
    with use_backend(backend):
        for x, bins, message in (
            (torch.rand(3, 4, 5), 1, "x: shape"),
            (torch.rand(0, 3, 4, 5), 1, "x: empty"),
            (torch.ones(1, 3, 4, 5, dtype=torch.int64), 1, "x: dtype"),
            (torch.rand(1, 3, 4, 5), 0, "bins: 0"),
        ):
            with pytest.raises(OperandError, match=message):
                average_pool(x, bins)


def test_an_exotic_dtype_is_refused(device: torch.device) -> None:
    x = torch.rand(1, 2, 3, 3, device=device).to(torch.float8_e4m3fn)
    with use_backend("triton"), pytest.raises(BackendError, match="x is torch.float8_e4m3fn"):
        average_pool(x, 2)
