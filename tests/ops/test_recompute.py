"""Maps that are computed again in the backward pass instead of kept."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from lgcnet_fast.ops import Rectified, use_backend
from lgcnet_fast.ops.recompute import recomputed


def test_only_the_value_is_computed_again() -> None:
    x, w = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    calls = []
    value = x.exp()

    def again() -> Tensor:
        calls.append(torch.is_grad_enabled())
        return x.detach().exp()

    with recomputed((value, again)):
        out = value * w + w.square()
    assert not calls
    found = torch.autograd.grad(out.sum(), (x, w))
    assert calls == [False]
    wanted = torch.autograd.grad((x.exp() * w + w.square()).sum(), (x, w))
    torch.testing.assert_close(found, wanted)


def gradients(backend: str, x: Tensor, layers: list[nn.Conv2d]) -> list[Tensor]:
    with use_backend(backend):
        rectified = Rectified(x)
        out = sum(rectified(layer).square().sum() for layer in layers)
    parameters = [p for layer in layers for p in layer.parameters()]
    return [out, *torch.autograd.grad(out, [x, *parameters])]


@pytest.mark.parametrize("autocast", [False, True])
def test_convolutions_of_one_relu(autocast: bool, device: torch.device) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 3, 3).to(device), nn.Conv2d(4, 5, 1).to(device)]
    x = torch.randn(2, 4, 6, 5, device=device, requires_grad=True)
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        reference, fused = (gradients(name, x, layers) for name in ("reference", "triton"))
    for found, wanted in zip(fused, reference, strict=True):
        assert torch.equal(found, wanted)


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
                out = Rectified(x)(watched)
            gc.collect()
            assert (seen[0]() is not None) is kept
            out.sum().backward()


def test_the_reference_is_relu() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    assert torch.equal(Rectified(x)(torch.neg), -F.relu(x))
