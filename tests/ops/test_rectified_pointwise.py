"""The classifier's convolution against the reference, which makes the ReLU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lgcnet_fast.errors import OperandError
from lgcnet_fast.ops import rectified_pointwise, use_backend

SHAPES = [(1, 1, 1, 1), (2, 17, 3, 5)]


def operands(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """A map, a weight in NHWC memory and a bias for 5 channels."""
    torch.manual_seed(0)
    shapes = [shape, (5, shape[1], 1, 1)]
    maps = [torch.randn(shape, dtype=torch.float64).to(device, dtype) for shape in shapes]
    bias = torch.randn(5, dtype=torch.float64).to(device, dtype)
    maps = [t.contiguous(memory_format=torch.channels_last) for t in maps]
    return [t.requires_grad_() for t in (*maps, bias)]


def outcome(leaves: list[Tensor], backend: str, autocast: bool = False) -> list[Tensor]:
    device = leaves[0].device.type
    with use_backend(backend), torch.autocast(device, torch.bfloat16, enabled=autocast):
        y = rectified_pointwise(*leaves)
    torch.manual_seed(1)
    g = torch.randn(y.shape, dtype=torch.float64).bfloat16().to(y)
    return [y, *torch.autograd.grad(y, leaves, g)]


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_and_gradients(shape, backend, device):
    """Against float64, of the same values."""
    leaves = operands(shape, device, torch.bfloat16)
    found = outcome(leaves, backend)
    truth = outcome([leaf.detach().double().requires_grad_() for leaf in leaves], "reference")
    for ours, wanted, leaf in zip(found, truth, [None, *leaves], strict=True):
        assert ours.dtype == torch.bfloat16
        if backend == "triton" and leaf is not None:
            assert ours.stride() == leaf.stride()
        scale = wanted.abs().max().item() + 1e-3
        torch.testing.assert_close(ours.double(), wanted, rtol=2**-7, atol=2**-8 * scale)


def test_under_autocast(device):
    leaves = operands(SHAPES[1], device, torch.float32)
    found, wanted = (outcome(leaves, backend, True) for backend in ("triton", "reference"))
    assert [t.dtype for t in found] == [t.dtype for t in wanted]
    for ours, other in zip(found, wanted, strict=True):
        scale = other.abs().max().item()
        torch.testing.assert_close(ours, other, rtol=2**-6, atol=2**-7 * scale)


def test_a_map_without_gradient(device):
    x, weight, bias = operands(SHAPES[1], device, torch.bfloat16)
    with use_backend("triton"):
        y = rectified_pointwise(x.detach(), weight, bias)
    y.sum().backward()
    assert x.grad is None and weight.grad is not None and bias.grad is not None


def test_gradcheck(device):
    if device.type == "cuda":
        pytest.skip("float64 is for the interpreter")
    torch.manual_seed(0)
    shapes = ((1, 2, 1, 2), (3, 2, 1, 1), (3,))
    leaves = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    with use_backend("triton"):
        assert torch.autograd.gradcheck(rectified_pointwise, leaves, fast_mode=True)


def test_more_channels_than_the_kernels_take(device):
    x = torch.randn(1, 3, 2, 2, device=device)
    weight, bias = torch.randn(40, 3, 1, 1, device=device), torch.randn(40, device=device)
    with use_backend("triton"):
        y = rectified_pointwise(x, weight, bias)
    torch.testing.assert_close(y, F.conv2d(F.relu(x), weight, bias))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3, 4), (5, 3, 1, 1), (5,)), "x: shape"),
        (((1, 3, 2, 2), (5, 4, 1, 1), (5,)), "weight: shape"),
        (((1, 3, 2, 2), (5, 3, 1, 1), (4,)), "bias: shape"),
    ],
)
def test_unfit_operands_are_refused(shapes, message, device):
    with pytest.raises(OperandError, match=message):
        rectified_pointwise(*(torch.zeros(shape, device=device) for shape in shapes))
