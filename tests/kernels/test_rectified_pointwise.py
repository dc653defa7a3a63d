"""1x1 convolutions of a ReLU with bias, and their gradients, against PyTorch's in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lgcnet_fast.kernels.rectified_pointwise import (
    rectified_pointwise,
    rectified_pointwise_input_grad,
    rectified_pointwise_weight_grad,
)
from tests.kernels.products import CUDA, DTYPES, assert_close, random_map

# (N, C, H, W), channels of the output
SHAPES = [((1, 1, 1, 1), 1), ((2, 16, 5, 7), 3), ((2, 33, 9, 16), 19)]
if CUDA:
    SHAPES += [((16, 96, 64, 128), 19), ((3, 128, 61, 67), 32), ((2, 255, 33, 31), 11)]
STORAGE = DTYPES[1:] if CUDA else DTYPES


def operands(
    shape: tuple[int, ...], classes: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """x, weight, bias, dy."""
    torch.manual_seed(0)
    weight = torch.randn(classes, shape[1], dtype=torch.float64).to(device, dtype)
    bias = torch.randn(classes, dtype=torch.float64).to(device, dtype)
    dy = random_map((shape[0], classes, *shape[2:]), dtype, device)
    return [random_map(shape, dtype, device), weight, bias, dy]


def results(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> list[Tensor]:
    torch.use_deterministic_algorithms(True, warn_only=True)  # New memory is NaN.
    try:
        return [
            rectified_pointwise(x, weight, bias),
            rectified_pointwise_input_grad(dy, x, weight),
            rectified_pointwise_weight_grad(dy, x),
        ]
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize(("shape", "classes"), SHAPES, ids=str)
def test_against_float64(shape, classes, dtype, device):
    x, weight, bias, dy = given = operands(shape, classes, dtype, device)
    y, dx, sums = results(*given)
    assert y.dtype == dx.dtype == dtype and dx.stride() == x.stride()

    def truth(x, weight, bias, dy):
        rectified = F.relu(x)
        y = F.conv2d(rectified, weight[..., None, None], bias)
        dx = torch.einsum("nkhw,kc->nchw", dy, weight) * (x > 0)
        dw = torch.einsum("nkhw,nchw->kc", dy, rectified)
        return y, dx, torch.cat([dw, dy.sum((0, 2, 3))[:, None]], dim=1)

    doubles = [tensor.double() for tensor in given]
    expected = truth(*doubles)
    magnitudes = truth(*(tensor.abs() for tensor in doubles))
    for ours, wanted, magnitude in zip((y, dx, sums), expected, magnitudes, strict=True):
        assert_close(ours, wanted, magnitude)


def test_same_inputs_same_bits(device):
    given = operands((2, 33, 9, 16), 19, torch.bfloat16, device)
    for first, second in zip(results(*given), results(*given), strict=True):
        assert torch.equal(first, second)


def test_nan_passes_as_in_pytorch(device):
    x, weight, bias, dy = operands((1, 4, 2, 3), 3, STORAGE[0], device)
    x[0, 1, 1, 2] = float("nan")
    y, dx, _ = results(x, weight, bias, dy)
    nan = torch.zeros(2, 3, dtype=torch.bool, device=device)
    nan[1, 2] = True
    assert torch.equal(y.isnan(), nan.expand_as(y))
    leaf = x.double().requires_grad_()
    F.conv2d(F.relu(leaf), weight.double()[..., None, None]).backward(dy.double())
    assert torch.equal(dx == 0, leaf.grad == 0) and not dx.isnan().any()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x, w, b, dy: rectified_pointwise(x.contiguous(), w, b), "x: strides"),
        (lambda x, w, b, dy: rectified_pointwise(x, w[:, :3], b), r"weight: shape \(3, 3\)"),
        (lambda x, w, b, dy: rectified_pointwise(x, w, b[:2]), r"bias: shape \(2,\)"),
        (lambda x, w, b, dy: rectified_pointwise(x, w.repeat(11, 1), b.repeat(11)), "to 33 are"),
        (lambda x, w, b, dy: rectified_pointwise(x, w.t().contiguous().t(), b), "weight: strides"),
        (lambda x, w, b, dy: rectified_pointwise_input_grad(dy[:, :2], x, w), "dy: strides"),
        (lambda x, w, b, dy: rectified_pointwise_weight_grad(dy.double(), x), "dy: dtype"),
    ],
)
def test_unfit_arguments_are_refused(spoil, message, device):
    given = operands((2, 4, 2, 3), 3, STORAGE[0], device)
    with pytest.raises(ValueError, match=message):
        spoil(*given)
