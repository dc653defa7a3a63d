"""The concatenation of two maps: plain and fused form."""

from __future__ import annotations

import pytest
import torch

from lgcnet_fast.errors import BackendError, OperandError
from lgcnet_fast.ops import concat_pair, use_backend


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 1, 1, 1), (2, 8, 3, 1)])
@pytest.mark.parametrize("nhwc", [False, True])
def test_values_and_gradients(
    shape: tuple[int, ...], backend: str, nhwc: bool, device: torch.device
) -> None:
    order = torch.channels_last if nhwc else torch.contiguous_format
    maps = [
        torch.randn(shape, device=device).contiguous(memory_format=order).requires_grad_()
        for _ in range(2)
    ]
    with use_backend(backend):
        out = concat_pair(*maps)
    assert torch.equal(out, torch.cat(maps, dim=1))
    g = torch.randn(out.shape, device=device).contiguous(memory_format=order)
    gradients = torch.autograd.grad(out, maps, g)
    for found, wanted in zip(gradients, g.split(shape[1], dim=1), strict=True):
        assert torch.equal(found, wanted)
        if backend == "triton":
            assert found.is_contiguous(memory_format=torch.channels_last)


def test_bad_arguments_are_named(device: torch.device) -> None:
    x = torch.randn(1, 2, 3, 3, device=device)
    with pytest.raises(OperandError, match="second: shape"):
        concat_pair(x, x[:, :1])
    with use_backend("triton"), pytest.raises(BackendError, match="second is torch.bfloat16"):
        concat_pair(x, x.bfloat16())
