"""Max pooling: fused form against the reference."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from lgcnet_fast.errors import BackendError, OperandError
from lgcnet_fast.ops import max_pool, use_backend
from lgcnet_fast.ops.max_pool import (
    _max_pool,
    _max_pool_backward,
    _max_pool_winners,
    max_pools,
)

fused = importlib.import_module("lgcnet_fast.ops.max_pool")
SHAPES = [(2, 3, 5, 7), (1, 17, 6, 4), (1, 1, 1, 1), (2, 4, 2, 1)]


def case(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Small whole numbers, so that windows have several maxima; NHWC memory."""
    torch.manual_seed(0)
    images, channels, height, width = shape
    values = torch.randint(-2, 3, (images, height, width, channels))
    return values.to(device, dtype).movedim(-1, 1).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fused_equals_reference(
    shape: tuple[int, ...], stride: int, dtype: torch.dtype, device: torch.device
) -> None:
    x = case(shape, device, dtype)
    found = []
    for backend in ("reference", "triton"):
        with use_backend(backend):
            y = max_pool(x, stride)
        # Whole numbers: their sums are exact in every dtype.
        g = torch.arange(y.numel(), device=device).remainder(5).view_as(y).to(dtype)
        found.append((y, *torch.autograd.grad(y, x, g)))
    for wanted, value in zip(*found, strict=True):
        assert torch.equal(value, wanted) and value.dtype == dtype


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_by_finite_differences(stride: int, backend: str, device: torch.device) -> None:
    torch.manual_seed(0)
    # Distances above the step of the finite differences.
    x = torch.randperm(2 * 3 * 5 * 4, device=device).view(2, 3, 5, 4).double().requires_grad_()
    with use_backend(backend):
        assert torch.autograd.gradcheck(lambda x: max_pool(x, stride), x, fast_mode=True)


@pytest.mark.parametrize("stride", [1, 2])
def test_registration(stride: int, device: torch.device) -> None:
    x = case((1, 2, 3, 4), device, torch.float32).detach()
    torch.library.opcheck(_max_pool, (x, stride, "triton"))
    torch.library.opcheck(_max_pool_winners, (x, stride))
    y, winners = _max_pool_winners(x, stride)
    torch.library.opcheck(_max_pool_backward, (winners, [y, y], 3, 4, stride, "triton"))


def test_nothing_is_computed_again(device: torch.device) -> None:
    """Triton's form keeps the map of its readers."""
    x = case((2, 3, 5, 7), device, torch.float32)
    with use_backend("triton"):
        maps, again = max_pools(x)
    assert again is None
    assert len({y.untyped_storage().data_ptr() for y in maps}) == 1


@pytest.mark.parametrize("used", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_several_readers(
    stride: int, used: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One launch takes them all; a reader may have none."""
    x, found, launched = case((2, 3, 5, 7), device, torch.float64), [], []

    def counted(kept: Tensor, gradients: list[Tensor], *rest: Any) -> Tensor:
        launched.append(len(gradients))
        return _max_pool_backward(kept, gradients, *rest)

    monkeypatch.setattr(fused, "_max_pool_backward", counted)
    for backend in ("reference", "triton"):
        with use_backend(backend):
            maps, _ = max_pools(x, stride)
        total = sum((k + 1) * maps[k].square().sum() for k in range(used))
        assert all(torch.equal(pooled, maps[0]) for pooled in maps)
        found.append(torch.autograd.grad(total, x))
    torch.testing.assert_close(*found)
    assert launched == [used]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_bad_arguments_are_named(backend: str) -> None:
    with use_backend(backend):
        for x, stride, message in (
            (torch.rand(3, 4, 5), 1, "x: shape"),
            (torch.rand(0, 3, 4, 5), 1, "x: empty"),
            (torch.ones(1, 3, 4, 5, dtype=torch.int64), 1, "x: dtype"),
            (torch.rand(1, 3, 4, 5), 3, "stride: 3"),
        ):
            with pytest.raises(OperandError, match=message):
                max_pool(x, stride)


def test_an_exotic_dtype_is_refused(device: torch.device) -> None:
    x = torch.rand(1, 2, 3, 3, device=device).to(torch.float8_e4m3fn)
    with use_backend("triton"), pytest.raises(BackendError, match="x is torch.float8_e4m3fn"):
        max_pool(x)
