"""Convolutions of images that need no gradient, among others, against one after the other."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lgcnet_fast.ops import use_backend
from lgcnet_fast.ops.convolutions import Geometry, convolutions
from lgcnet_fast.ops.image_convolution import _forward, _weight_gradient, suits

GEOMETRIES = [Geometry(2, 1), Geometry(1, 1), Geometry(1, 1)]
SHAPES = [((2, 3, 7, 6), (8, 3, 3, 3)), ((1, 5, 3, 4), (2, 5, 3, 3)), ((1, 4, 3, 5), (3, 4, 3, 3))]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the operations that run here."""
    module, names = sys.modules["lgcnet_fast.ops.image_convolution"], []

    def noted(name: str, operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*arguments: Any) -> Tensor:
            names.append(name)
            return operation(*arguments)

        return run

    for name in ("_forward", "_weight_gradient"):
        monkeypatch.setattr(module, name, noted(name, getattr(module, name)))
    return names


def operands(device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Two images beside a map of more channels, of values that bfloat16 can hold, and weights."""
    torch.manual_seed(0)
    shapes = [*(x for x, _ in SHAPES), *(weight for _, weight in SHAPES)]
    tensors = [torch.randn(shape).bfloat16().to(device, dtype) for shape in shapes]
    return [t.requires_grad_(index >= len(SHAPES)) for index, t in enumerate(tensors)]


def outcome(
    tensors: Sequence[Tensor], leaves: Sequence[Tensor], backend: str, autocast: bool = False
) -> list[Tensor]:
    """The maps, and the gradients of the leaves."""
    count, device = len(SHAPES), tensors[0].device.type
    with use_backend(backend), torch.autocast(device, torch.bfloat16, enabled=autocast):
        maps = convolutions(tensors[:count], tensors[count:], GEOMETRIES)
    torch.manual_seed(1)
    g = [torch.randn(y.shape).to(y) for y in maps]
    return [*maps, *torch.autograd.grad(maps, leaves, g)]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("planes", [False, True])
def test_images_beside_other_maps(
    planes: bool, autocast: bool, device: torch.device, launches: list[str]
) -> None:
    tensors = operands(device)
    if not planes:
        form = torch.channels_last
        tensors = [t.detach().contiguous(memory_format=form) for t in tensors]
        tensors = [t.requires_grad_(index >= len(SHAPES)) for index, t in enumerate(tensors)]
    leaves = tensors[len(SHAPES) :]
    fused = outcome(tensors, leaves, "triton", autocast)
    assert sorted(launches) == ["_forward"] * 2 + ["_weight_gradient"] * 2
    reference = outcome(tensors, leaves, "reference", autocast)
    for found, wanted in zip(fused, reference, strict=True):
        assert found.dtype == wanted.dtype
        # Both round to bfloat16, and may round a sum to different sides.
        step = 2**-6 if autocast else 1e-5
        torch.testing.assert_close(found, wanted, rtol=step, atol=step)
    gradients = fused[len(SHAPES) :]
    assert [g.stride() for g in gradients] == [weight.stride() for weight in leaves]


def test_an_image_with_a_gradient(device: torch.device, launches: list[str]) -> None:
    tensors = operands(device)
    tensors[0].requires_grad_()
    leaves = [tensors[0], *tensors[len(SHAPES) :]]
    found, wanted = (outcome(tensors, leaves, name) for name in ("triton", "reference"))
    assert sorted(launches) == ["_forward", "_weight_gradient"]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_without_gradients(device: torch.device, launches: list[str]) -> None:
    x, weight = (t.bfloat16().detach() for t in operands(device)[::3])
    with torch.no_grad():
        found = {}
        for backend in ("triton", "reference"):
            with use_backend(backend):
                (found[backend],) = convolutions([x], [weight], GEOMETRIES[:1])
    assert launches == ["_forward"] and found["triton"].dtype == torch.bfloat16
    torch.testing.assert_close(found["triton"], found["reference"], rtol=2**-6, atol=2**-6)


def test_weight_gradient_comes_later(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[tuple[int, int]] = []

    def side_by_side(device: torch.device, now: Any, later: Any) -> list[Tensor]:
        jobs.append((len(now), len(later)))
        return [job() for job in (*now, *later)]

    module = sys.modules["lgcnet_fast.ops.image_convolution"]
    monkeypatch.setattr(module, "side_by_side", side_by_side)
    tensors = operands(device)
    with use_backend("triton"):
        (y,) = convolutions(tensors[:1], tensors[3:4], GEOMETRIES[:1])
    y.sum().backward()
    assert jobs == [(0, 1)]


@pytest.mark.usefixtures("repeatable_convolutions")
def test_gradients_by_finite_differences(device: torch.device) -> None:
    tensors = operands(device, torch.float64)

    def joined(*weights: Tensor) -> Tensor:
        maps = convolutions(tensors[: len(SHAPES)], weights, GEOMETRIES)
        return torch.cat([y.flatten() for y in maps])

    with use_backend("triton"):
        assert torch.autograd.gradcheck(joined, tensors[len(SHAPES) :], fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_operations_are_registered(
    form: torch.memory_format, dtype: torch.dtype, device: torch.device
) -> None:
    x, weight = (t.detach().contiguous(memory_format=form) for t in operands(device)[::3])
    weight = weight.to(dtype)
    torch.library.opcheck(_forward, (x, weight, 2))
    g = torch.randn(2, 4, 3, 8, device=device).to(dtype).movedim(-1, 1)
    torch.library.opcheck(_weight_gradient, (g, x, weight, 2))


@pytest.mark.parametrize(
    ("shape", "weight_shape", "geometry"),
    [
        ((1, 5, 4, 4), (2, 5, 3, 3), Geometry(1, 1)),
        ((1, 3, 4, 4), (2, 3, 1, 1), Geometry(1, 0)),
        ((1, 3, 4, 4), (2, 3, 3, 3), Geometry(1, 0)),
        ((1, 3, 6, 6), (2, 3, 3, 3), Geometry(1, 2, 2)),
        ((1, 3, 6, 6), (2, 3, 3, 3), Geometry(3, 1)),
    ],
    ids=str,
)
def test_other_convolutions_do_not_suit(
    shape: tuple[int, ...], weight_shape: tuple[int, ...], geometry: Geometry
) -> None:
    assert not suits(torch.zeros(shape), torch.zeros(weight_shape), geometry)
    assert suits(torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 3, 3), Geometry(2, 1))
