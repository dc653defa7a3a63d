"""3x3 convolutions of stride 2 and deconvolutions of a map that others read too, in 16 bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lgcnet_fast.nn.primitives import Deconvolution, ReLUConvBN, Source
from lgcnet_fast.ops import use_backend

Raw = Callable[[Source], list[Tensor]]


@pytest.fixture(params=["convolutions", "deconvolution"])
def case(request: pytest.FixtureRequest, device: torch.device) -> tuple[Raw, list[Tensor], str]:
    """What a source gives, the weights, and the operation that gives it under Triton."""
    torch.manual_seed(0)
    if request.param == "deconvolution":
        up = Deconvolution(8).to(device, memory_format=torch.channels_last)
        return lambda source: [up.raw(source, (7, 10))], list(up.conv.parameters()), "_Rectified"
    layers = [ReLUConvBN(8, 16, 3, 2).layer for _ in range(2)]
    for layer in layers:
        layer.to(device, memory_format=torch.channels_last)
    return (
        lambda source: source.convolved(layers),
        [one.weight for one in layers],
        "_ConvolutionsOfAMap",
    )


def test_as_the_reference(case: tuple[Raw, list[Tensor], str], device: torch.device) -> None:
    raw, weights, operation = case
    x = torch.randn(2, 4, 5, 8, device=device).bfloat16().movedim(-1, 1).requires_grad_()
    outcomes = []
    for backend in ("reference", "triton"):
        with use_backend(backend), torch.autocast(device.type, torch.bfloat16):
            source = Source(x)
            maps = [*raw(source), source.plain()]
        torch.manual_seed(1)
        gs = [torch.randn(y.shape).to(y) for y in maps]
        if backend == "triton":
            assert all(y.grad_fn.name().startswith(operation) for y in maps[:-1])
        outcomes.append([*maps, *torch.autograd.grad(maps, [x, *weights], gs)])
    for found, wanted in zip(*reversed(outcomes), strict=True):
        assert found.dtype == wanted.dtype and found.shape == wanted.shape
        torch.testing.assert_close(found, wanted, rtol=2**-6, atol=2**-4)
