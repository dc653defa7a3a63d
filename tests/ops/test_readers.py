"""Maps that several operations read: gradients as by autograd, relu(x) not kept."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from lgcnet_fast.ops import readers, use_backend
from lgcnet_fast.ops.fan_out import AT_ONCE, gradient_sum


def random_map(device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    values = torch.randn(2, 4, 5, 3, dtype=dtype, device=device).movedim(-1, 1)
    return values.requires_grad_()


def outcome(backend: str, x: Tensor, plain: int, rectified: int, weights: Tensor) -> list[Tensor]:
    with use_backend(backend):
        source = readers(x)
        terms = [weight * source.plain().square() for weight in weights[:plain]]
        terms += [source.rectified(weight.mul) for weight in weights[plain : plain + rectified]]
        out = torch.stack(terms).sum(0)
    return [out, *torch.autograd.grad(out.square().sum(), (x, weights))]


@pytest.mark.parametrize("plain, rectified", [(1, 0), (0, 1), (3, 0), (0, 4), (2, 3)])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_gradients_are_those_of_autograd(
    backend: str, plain: int, rectified: int, device: torch.device
) -> None:
    torch.manual_seed(0)
    x = random_map(device)
    weights = torch.randn(8, dtype=torch.float64, device=device, requires_grad=True)
    found = outcome(backend, x, plain, rectified, weights)
    terms = [weight * x.square() for weight in weights[:plain]]
    terms += [weight * F.relu(x) for weight in weights[plain : plain + rectified]]
    out = torch.stack(terms).sum(0)
    wanted = [out, *torch.autograd.grad(out.square().sum(), (x, weights))]
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("count", [1, 3, AT_ONCE + 1])
def test_a_map_that_is_only_rectified(count: int, device: torch.device) -> None:
    """Its ReLU is kept in its place."""
    torch.manual_seed(0)
    x = random_map(device)
    copy = x.clone()
    storage = weakref.ref(copy.untyped_storage())
    with use_backend("triton"):
        source = readers(copy, only_rectified=True)
    out = sum(source.rectified(torch.square) for _ in range(count))
    del source, copy
    gc.collect()
    assert storage() is None
    (found,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(found, 2 * count * F.relu(x))


def test_more_readers_than_one_sum_takes(device: torch.device) -> None:
    x = random_map(device)
    with use_backend("triton"):
        source = readers(x)
        terms = [source.plain() for _ in range(AT_ONCE + 3)]
        terms += [source.rectified(torch.clone) for _ in range(AT_ONCE + 3)]
    (found,) = torch.autograd.grad(sum(terms).sum(), x)
    torch.testing.assert_close(found, (AT_ONCE + 3) * (1 + (x > 0).double()))


@pytest.mark.parametrize("relu", [False, True])
def test_sum_is_rounded_once(relu: bool, device: torch.device) -> None:
    torch.manual_seed(0)
    x, *gradients = (random_map(device, torch.float16).detach() for _ in range(5))
    x[0, 0, 0, :3] = torch.tensor([0.0, -0.0, float("nan")])
    found = gradient_sum(gradients, x, relu, "triton")
    wanted = torch.stack(gradients).float().sum(0)
    if relu:
        wanted = torch.ops.aten.threshold_backward(wanted, x.float(), 0)
    torch.testing.assert_close(found, wanted.half(), atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_registration(count: int, relu: bool, device: torch.device) -> None:
    x, *gradients = (random_map(device).detach() for _ in range(1 + count))
    torch.library.opcheck(gradient_sum, (gradients, x, relu, "triton"))


@pytest.mark.parametrize("autocast", [False, True])
def test_convolutions_of_one_relu(autocast: bool, device: torch.device) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 3, 3).to(device), nn.Conv2d(4, 5, 1).to(device)]
    x = torch.randn(2, 4, 6, 5, device=device, requires_grad=True)
    parameters = [p for layer in layers for p in layer.parameters()]
    found = []
    for backend in ("reference", "triton"):
        with use_backend(backend), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            source = readers(x)
            out = sum(source.rectified(layer).square().sum() for layer in layers)
        found.append([out, *torch.autograd.grad(out, [x, *parameters])])
    for wanted, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, wanted)


@pytest.mark.parametrize("fake", [False, True])
def test_relu_is_not_kept(fake: bool, device: torch.device) -> None:
    with FakeTensorMode() if fake else torch.enable_grad():
        layer = nn.Conv2d(4, 3, 1, device=device)
        x = torch.randn(2, 4, 6, 5, device=device, requires_grad=True)
        for backend, kept in (("reference", True), ("triton", False)):
            seen = []

            def watched(
                rectified: Tensor, layer: nn.Conv2d = layer, seen: list[object] = seen
            ) -> Tensor:
                seen.append(weakref.ref(rectified.untyped_storage()))
                return layer(rectified)

            with use_backend(backend):
                out = readers(x).rectified(watched)
            gc.collect()
            assert (seen[0]() is not None) is kept
            out.sum().backward()


def test_relu_is_computed_again_once(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all convolutions together, and not held when the last has had it."""
    layers = [nn.Conv2d(4, 3, 1).to(device) for _ in range(3)]
    x = torch.randn(2, 4, 6, 5, device=device, requires_grad=True)
    made: list[weakref.ref[torch.UntypedStorage]] = []

    def watched(x: Tensor, relu: Callable[[Tensor], Tensor] = F.relu) -> Tensor:
        y = relu(x)
        made.append(weakref.ref(y.untyped_storage()))
        return y

    monkeypatch.setattr(F, "relu", watched)
    with use_backend("triton"):
        source = readers(x)
        out = sum(source.rectified(layer).square().sum() for layer in layers)
        del source
    out.backward()
    assert len(made) == 2 and not any(storage() for storage in made)
