"""Depthwise convolutions behind a batch norm and a ReLU against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lgcnet_fast.kernels.depthwise import ForwardConfig, depthwise_multi
from lgcnet_fast.kernels.depthwise_backward import normalised_depthwise_backward
from lgcnet_fast.kernels.depthwise_weight_grad import WeightGradConfig
from tests.kernels.test_depthwise import assert_close, random_map

SHAPES = [(1, 3, 1, 1), (2, 1, 3, 5), (1, 17, 9, 6), (2, 8, 12, 4)]
LARGE = [(2, 48, 49, 97), (2, 255, 49, 97), (16, 128, 16, 32)]
SHAPES += LARGE if torch.cuda.is_available() else []
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, mean: float = 0.5
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor]:
    """x, norm, weight, dy; about a quarter of the outputs of the ReLU is zero."""
    torch.manual_seed(0)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    means = mean + torch.randn(shape[1], device=device, dtype=exact)
    x = (random_map(shape, torch.float64, device) + 0.6 + means.double()[:, None, None]).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    r = 0.5 + torch.rand(shape[1], device=device, dtype=exact)
    weight = torch.randn(3, 3, shape[1], device=device, dtype=exact)
    return x, (means, r), weight, random_map(shape, dtype, device)


def normalised(x: Tensor, norm: tuple[Tensor, Tensor]) -> Tensor:
    mean, r = (values.double()[:, None, None] for values in norm)
    return (x.double() - mean) * r


def convolved(x: Tensor, weight: Tensor) -> Tensor:
    window = weight.double().permute(2, 0, 1)[:, None]
    return F.conv2d(x, window, padding=1, groups=len(window))


def forward(x: Tensor, norm: tuple[Tensor, Tensor], weight: Tensor) -> Tensor:
    return depthwise_multi(x, weight[None, None], (1,), relu=True, norm=norm)[0, 0]


@EVERY_DTYPE
@EVERY_SHAPE
def test_forward(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    guarded: None,
) -> None:
    x, norm, weight, _ = inputs(shape, dtype, device)
    y = forward(x, norm, weight)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    before = normalised(x, norm).relu()
    assert_close(y, convolved(before, weight), convolved(before, weight.abs()))


@pytest.mark.parametrize("stride", [1, 2])
def test_every_walk_normalises(stride: int, device: torch.device) -> None:
    x, norm, _, _ = inputs((1, 3, 9, 6), torch.float32, device)
    weights = torch.randn(2, 2, 3, 3, 3, device=device)
    found = depthwise_multi(x, weights, (1, 2), stride, relu=True, norm=norm)
    before = normalised(x, norm).relu().float().contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, depthwise_multi(before, weights, (1, 2), stride))


@EVERY_DTYPE
@EVERY_SHAPE
def test_gradients(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    guarded: None,
) -> None:
    x, norm, weight, dy = inputs(shape, dtype, device)
    dx, dw, sums = normalised_depthwise_backward(dy, x, weight, norm)
    assert dx.dtype == dtype and dw.dtype == sums.dtype == torch.float32

    def gradients(yhat: Tensor, weight: Tensor, dy: Tensor) -> list[Tensor]:
        leaves = (yhat.detach().requires_grad_(), weight.double().requires_grad_())
        through = convolved(leaves[0].relu(), leaves[1])
        d_yhat, dw = torch.autograd.grad(through, leaves, dy.double())
        rows = [value.sum((0, 2, 3)) for value in (d_yhat, d_yhat * leaves[0].detach())]
        return [d_yhat, dw, torch.stack(rows)]

    yhat = normalised(x, norm)
    truths = gradients(yhat, weight, dy)
    magnitudes = gradients(yhat.relu() + 1e-30, weight.abs(), dy.abs())
    for found, truth, magnitude in zip((dx, dw, sums), truths, magnitudes, strict=True):
        assert_close(found, truth, magnitude)


def test_a_large_mean_cancels(device: torch.device) -> None:
    x, norm, weight, dy = inputs((2, 4, 6, 5), torch.float32, device, mean=3000.0)
    before = normalised(x, norm).relu()
    assert_close(
        forward(x, norm, weight), convolved(before, weight), 8 * convolved(before, weight.abs())
    )
    _, dw, sums = normalised_depthwise_backward(dy, x, weight, norm)
    assert torch.isfinite(dw).all() and torch.isfinite(sums).all()


def test_tiles_of_other_sizes_agree(device: torch.device) -> None:
    x, norm, weight, dy = inputs((2, 20, 9, 7), torch.float32, device)
    usual = (forward(x, norm, weight), *normalised_depthwise_backward(dy, x, weight, norm))
    tile = ForwardConfig(rows=3, block_p=2, block_c=16, warps=1)
    other = depthwise_multi(x, weight[None, None], (1,), relu=True, norm=norm, config=tile)
    walks = WeightGradConfig(rows=2, block_p=4, block_c=16, warps=1, programs=3)
    others = (other[0, 0], *normalised_depthwise_backward(dy, x, weight, norm, walks))
    for first, second in zip(usual, others, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_same_inputs_same_bits(device: torch.device) -> None:
    x, norm, weight, dy = inputs(SHAPES[-1], torch.bfloat16, device)
    first, second = (
        (forward(x, norm, weight), *normalised_depthwise_backward(dy, x, weight, norm))
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


def test_nan_stays_in_its_window(device: torch.device) -> None:
    x, norm, weight, _ = inputs((1, 1, 5, 5), torch.float32, device)
    x[0, 0, 2, 2] = torch.nan
    expected = torch.zeros(5, 5, dtype=torch.bool, device=device)
    expected[1:4, 1:4] = True
    assert torch.equal(forward(x, norm, weight)[0, 0].isnan(), expected)


class _Normalised(torch.autograd.Function):
    @staticmethod
    def forward(ctx, yhat, weight):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(yhat, weight)
        return forward(yhat, _identity(yhat), weight)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        yhat, weight = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        return normalised_depthwise_backward(dy, yhat, weight, _identity(yhat))[:2]


def _identity(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])


def test_gradcheck(device: torch.device) -> None:
    x, _, weight, _ = inputs((1, 2, 3, 4), torch.float64, device)
    x = torch.where(x.abs() < 0.1, 0.5, x).contiguous(memory_format=torch.channels_last)
    leaves = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(_Normalised.apply, leaves, fast_mode=True)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("norm: only before a ReLU", {"relu": False}),
        (r"norm\[1\]", {"norm": (torch.zeros(3), torch.zeros(2))}),
    ],
)
def test_bad_arguments_are_named(
    message: str, change: dict[str, object], device: torch.device
) -> None:
    x, norm, weight, _ = inputs((1, 3, 4, 4), torch.float32, device)
    if "norm" in change:
        change = {"norm": tuple(values.to(device) for values in change["norm"])}  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=message):
        depthwise_multi(x, weight[None, None], (1,), **{"relu": True, "norm": norm} | change)  # type: ignore[arg-type]
