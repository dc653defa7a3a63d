"""Depthwise branches against float64 convolutions, element by element."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lgcnet_fast.kernels.depthwise import ForwardConfig, depthwise, depthwise_multi
from lgcnet_fast.kernels.depthwise_backward import depthwise_backward
from lgcnet_fast.kernels.depthwise_input_grad import (
    InputGradConfig,
    depthwise_input_grad,
    depthwise_multi_input_grad,
)
from lgcnet_fast.kernels.depthwise_weight_grad import (
    WeightGradConfig,
    depthwise_multi_weight_grad,
    depthwise_weight_grad,
)
from tests.combinations import some_combinations


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]
    dilations: tuple[int, ...]
    stride: int = 1
    edges: int = 1
    relu: bool = True


SMALL = [
    Case((1, 3, 1, 1), (1, 12)),
    Case((2, 1, 3, 5), (1,), relu=False),
    Case((2, 3, 5, 3), (2,)),
    Case((1, 17, 9, 6), (1, 2, 4, 8), edges=2),
    Case((1, 3, 1, 1), (1, 2), stride=2),
    Case((2, 3, 3, 5), (1,), stride=2, relu=False),
    Case((1, 3, 7, 6), (2,), stride=2),
    Case((1, 5, 11, 8), (1,), stride=2),
    Case((2, 4, 6, 7), (1,), stride=2),
    Case((1, 3, 1, 1), (1,), stride=2),
    Case((1, 3, 7, 9), (3,), stride=2),
    Case((1, 5, 9, 6), (1, 2, 4, 3), stride=2, edges=2),
    Case((1, 4, 26, 3), (12,)),
    Case((1, 4, 13, 4), (8,), stride=2, edges=3),
]
LARGE = [
    Case((2, channels, 49, 97), (1, 2, 4, 8, 12), stride, edges)
    for channels in (1, 17, 48, 64, 255)
    for stride in (1, 2)
    for edges in (1, 2)
]
LARGE += [Case((2, c, 49, 97), (d,), s) for c in (17, 64) for d in (1, 2, 8) for s in (1, 2)]
LARGE += [Case((3, 64, 97, 193), (1, 2, 4, 8), stride) for stride in (1, 2)]
CASES = SMALL + (LARGE if torch.cuda.is_available() else [])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_map(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Maps (..., C, H, W) in NHWC memory."""
    *outer, channels, height, width = shape
    values = torch.randn(*outer, height, width, channels, dtype=torch.float64)
    return values.to(device, dtype).movedim(-1, -3)


def output_shape(case: Case) -> tuple[int, ...]:
    images, channels, height, width = case.shape
    size = (-(-height // case.stride), -(-width // case.stride))
    return (case.edges, len(case.dilations), images, channels, *size)


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x, weights, dy."""
    torch.manual_seed(0)
    weights = torch.randn(case.edges, len(case.dilations), 3, 3, case.shape[1], device=device)
    x = random_map(case.shape, dtype, device)
    weights = weights.double() if dtype == torch.float64 else weights
    return x, weights, random_map(output_shape(case), dtype, device)


def reference(x: Tensor, weights: Tensor, case: Case) -> Tensor:
    """All branches by PyTorch's convolution, in float64."""
    x, weights = x.double(), weights.double()
    rows = []
    for edge in weights:
        for weight, dilation in zip(edge, case.dilations, strict=True):
            rows.append(
                F.conv2d(
                    x.relu() if case.relu else x,
                    weight.permute(2, 0, 1)[:, None],
                    stride=case.stride,
                    padding=dilation,
                    dilation=dilation,
                    groups=x.shape[1],
                )
            )
    return torch.stack(rows).view(output_shape(case))


def reference_gradients(x: Tensor, weights: Tensor, dy: Tensor, case: Case) -> list[Tensor]:
    """float64 gradients of x and the weights."""
    leaves = [x.double().requires_grad_(), weights.double().requires_grad_()]
    return list(torch.autograd.grad(reference(*leaves, case), leaves, dy.double()))


def assert_close(result: Tensor, truth: Tensor, magnitude: Tensor) -> None:
    """One rounding to the storage dtype, and float32 rounding of terms of summed `magnitude`."""
    bound = torch.finfo(result.dtype).eps * truth.abs() + 32 * 2**-24 * magnitude
    if result.dtype == torch.float16:
        bound = bound + 2**-24  # its subnormal spacing
    assert result.shape == truth.shape
    assert not ((result.double() - truth).abs() > bound).any() and not result.isnan().any()


@some_combinations("case, dtype", CASES, DTYPES)
def test_forward(case: Case, dtype: torch.dtype, device: torch.device, guarded: None) -> None:
    x, weights, _ = inputs(case, dtype, device)
    y = depthwise_multi(x, weights, case.dilations, case.stride, case.relu)
    assert y.dtype == dtype
    assert y[0, 0].is_contiguous(memory_format=torch.channels_last)
    magnitude = reference(x.abs(), weights.abs(), case)
    assert_close(y, reference(x, weights, case), magnitude)


@some_combinations("case, dtype", CASES, DTYPES)
def test_gradients(case: Case, dtype: torch.dtype, device: torch.device, guarded: None) -> None:
    x, weights, dy = inputs(case, dtype, device)
    truth = reference_gradients(x, weights, dy, case)
    magnitude = reference_gradients(x.abs(), weights.abs(), dy.abs(), case)
    dx = depthwise_multi_input_grad(dy, x, weights, case.dilations, case.stride, case.relu)
    dw = depthwise_multi_weight_grad(dy, x, weights, case.dilations, case.stride, case.relu)
    assert dx.dtype == dtype and dw.dtype == torch.float32
    assert dx.is_contiguous(memory_format=torch.channels_last)
    assert_close(dx, truth[0], magnitude[0])
    assert_close(dw, truth[1], magnitude[1])


@some_combinations("case, dtype", CASES, (torch.bfloat16, torch.float32))
def test_gradients_of_maps_apart(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """dy in parts, as several nodes give it, which the kernels read where they lie."""
    x, weights, dy = inputs(case, dtype, device)
    apart = [part.clone() for part in dy.flatten(0, 1)]
    arguments = (x, weights, case.dilations, case.stride, case.relu)
    for gradient in (depthwise_multi_input_grad, depthwise_multi_weight_grad):
        assert torch.equal(gradient(apart, *arguments), gradient(dy, *arguments))


@some_combinations("case, dtype", [c for c in CASES if len(c.dilations) == c.edges == 1], DTYPES)
def test_both_gradients_of_one_branch(
    case: Case, dtype: torch.dtype, device: torch.device, guarded: None
) -> None:
    x, weights, dy = inputs(case, dtype, device)
    truth = reference_gradients(x, weights, dy, case)
    magnitude = reference_gradients(x.abs(), weights.abs(), dy.abs(), case)
    dilation, stride = case.dilations[0], case.stride
    dx, dw = depthwise_backward(dy[0, 0], x, weights[0, 0], dilation, stride, case.relu)
    assert dx.dtype == dtype and dw.dtype == torch.float32
    assert_close(dx, truth[0], magnitude[0])
    assert_close(dw, truth[1][0, 0], magnitude[1][0, 0])


@pytest.mark.parametrize("stride", [1, 2])
def test_tiles_of_other_sizes_agree(stride: int, device: torch.device, guarded: None) -> None:
    case = Case((2, 5, 4, 3), (1, 2), stride)
    x, weights, dy = inputs(case, torch.float32, device)
    forward: tuple[Any, ...] = (x, weights, case.dilations, stride, True)
    single = (dy[0, 1], x, weights[0, 1], 2, stride, True)
    other = (dy[0, 0], x, weights[0, 0], 1, stride, True)
    plain = (
        depthwise_multi(*forward),
        depthwise_multi_input_grad(dy, *forward),
        depthwise_multi_weight_grad(dy, *forward),
        *depthwise_backward(*single),
        *depthwise_backward(*other),
    )
    for rows, block_p in ((1, 8), (3, 16)):
        tile = (rows, block_p, 4, 1)
        sums = WeightGradConfig(*tile, programs=3)
        tiled = (
            depthwise_multi(*forward, config=ForwardConfig(*tile)),
            depthwise_multi_input_grad(dy, *forward, config=InputGradConfig(*tile)),
            depthwise_multi_weight_grad(dy, *forward, config=sums),
            *depthwise_backward(*single, config=sums),
            *depthwise_backward(*other, config=sums),
        )
        torch.testing.assert_close(tiled, plain)


@some_combinations("rows, stride", (1, 4, 8), (1, 2))
def test_input_gradient_of_tiles_of_many_rows(
    rows: int, stride: int, device: torch.device, guarded: None
) -> None:
    """Windows that reach into the tile and past it, tiles that the map ends in."""
    case = Case((1, 3, 14, 9), (1, 2, 4, 8, 12, 3), stride)
    x, weights, dy = inputs(case, torch.bfloat16, device)
    truth = reference_gradients(x, weights, dy, case)[0]
    magnitude = reference_gradients(x.abs(), weights.abs(), dy.abs(), case)[0]
    config = InputGradConfig(rows, block_p=8, block_c=4, warps=1)
    arguments = (dy, x, weights, case.dilations, stride, True)
    assert_close(depthwise_multi_input_grad(*arguments, config=config), truth, magnitude)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("count", "channels", "rows"), [(1, 1, 8), (2, 40, 4), (3, 3, 3), (4, 17, 1), (5, 8, 8)]
)
def test_input_gradient_adds_others(
    count: int, channels: int, rows: int, stride: int, device: torch.device, guarded: None
) -> None:
    case = Case((2, channels, 7, 5), (1, 2), stride)
    x, weights, dy = inputs(case, torch.bfloat16, device)
    others = [random_map(case.shape, torch.bfloat16, device) for _ in range(count)]
    truth = reference_gradients(x, weights, dy, case)[0]
    magnitude = reference_gradients(x.abs(), weights.abs(), dy.abs(), case)[0]
    for other in others:
        truth = truth + other.double()
        magnitude = magnitude + other.double().abs()
    config = InputGradConfig(rows, block_p=8, block_c=16, warps=1)
    arguments = (dy, x, weights, case.dilations, stride, True)
    dx = depthwise_multi_input_grad(*arguments, config=config, others=others)
    assert_close(dx, truth, magnitude)


def test_others_pass_the_relu(device: torch.device) -> None:
    case = Case((1, 2, 3, 4), (1, 2))
    x, weights, dy = inputs(case, torch.float32, device)
    x = -x.abs()
    other = random_map(case.shape, torch.float32, device)
    other[0, 0, 1, 2] = torch.nan
    arguments = (dy, x, weights, case.dilations, 1, True)
    dx = depthwise_multi_input_grad(*arguments, others=[other, other])
    torch.testing.assert_close(dx, 2 * other, rtol=0, atol=0, equal_nan=True)


def test_input_gradient_tiles_grow_with_the_map() -> None:
    shapes = ((16, 48, 64, 128), (16, 64, 32, 64), (16, 128, 16, 32), (1, 5, 3, 2))
    tiles = [InputGradConfig.default((1, 4, *shape), 1) for shape in shapes]
    assert [(tile.rows, tile.block_c, tile.warps) for tile in tiles] == [
        (8, 16, 2), (8, 32, 2), (4, 32, 4), (2, 8, 4),
    ]  # fmt: skip
    assert InputGradConfig.default((1, 4, *shapes[1]), 2) == InputGradConfig(2, 16, 32, 4)


def test_one_branch(device: torch.device) -> None:
    case = Case((2, 3, 6, 5), (2,), stride=2)
    x, weights, dy = inputs(case, torch.float32, device)
    y = depthwise(x, weights[0, 0], 2, 2, relu=True)
    assert torch.equal(y, depthwise_multi(x, weights, (2,), 2, True)[0, 0])
    dx = depthwise_input_grad(dy[0, 0], x, weights[0, 0], 2, 2, relu=True)
    assert torch.equal(dx, depthwise_multi_input_grad(dy, x, weights, (2,), 2, True))
    dw = depthwise_weight_grad(dy[0, 0], x, weights[0, 0], 2, 2, relu=True)
    assert torch.equal(dw, depthwise_multi_weight_grad(dy, x, weights, (2,), 2, True)[0, 0])


def test_same_inputs_same_bits(device: torch.device) -> None:
    case = LARGE[-2] if torch.cuda.is_available() else Case((2, 3, 6, 5), (1, 2))
    x, weights, dy = inputs(case, torch.bfloat16, device)
    arguments = (case.dilations, case.stride, case.relu)
    # The interpreter runs programs one by one: only memory that nobody wrote can differ.
    for _ in range(3 if torch.cuda.is_available() else 1):
        runs = [
            (
                depthwise_multi(x, weights, *arguments),
                depthwise_multi_input_grad(dy, x, weights, *arguments),
                depthwise_multi_weight_grad(dy, x, weights, *arguments),
                *depthwise_backward(dy[0, 0], x, weights[0, 0], case.dilations[0], *arguments[1:]),
                *depthwise_backward(dy[0, 1], x, weights[0, 1], case.dilations[1], *arguments[1:]),
            )
            for _ in range(2)
        ]
        assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, dilations, stride):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weights)
        ctx.options = (dilations, stride, True)
        return depthwise_multi(x, weights, dilations, stride, True)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, weights = ctx.saved_tensors
        dy = dy.movedim(-3, -1).contiguous().movedim(-1, -3)
        dx = depthwise_multi_input_grad(dy, x, weights, *ctx.options)
        return dx, depthwise_multi_weight_grad(dy, x, weights, *ctx.options), None, None


@pytest.mark.parametrize("stride", [1, 2])
def test_gradcheck(stride: int, device: torch.device) -> None:
    case = Case((1, 1, 3, 4), (1, 2), stride)
    x, weights, _ = inputs(case, torch.float64, device)
    x = torch.where(x.abs() < 0.1, 0.5, x).contiguous(memory_format=torch.channels_last)
    leaves = (x.requires_grad_(), weights.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda x, w: _Depthwise.apply(x, w, case.dilations, stride), leaves, fast_mode=True
    )


def test_nan_passes_the_relu(device: torch.device) -> None:
    case = Case((1, 1, 5, 5), (1,))
    x, weights, dy = inputs(case, torch.float32, device)
    x[0, 0, 2, 2] = torch.nan
    y = depthwise_multi(x, weights, (1,), relu=True)[0, 0, 0, 0]
    near = torch.zeros(5, 5, dtype=torch.bool, device=device)
    near[1:4, 1:4] = True
    assert torch.equal(y.isnan(), near)
    dx = depthwise_multi_input_grad(dy, x, weights, (1,), relu=True)
    assert dx[0, 0, 2, 2] != 0
    for stride in (1, 2):
        gradient = dy[0, 0, ..., ::stride, ::stride].contiguous(memory_format=torch.channels_last)
        dx, _ = depthwise_backward(gradient, x, weights[0, 0], stride=stride, relu=True)
        assert dx[0, 0, 2, 2] != 0


BAD = {
    "x: need a map": lambda a: a | {"x": a["x"][0]},
    "x: empty map": lambda a: a | {"x": a["x"][:0]},
    "x: dtype": lambda a: a | {"x": a["x"].int()},
    r"x: strides .* not dense channels_last": lambda a: a | {"x": a["x"][:, :2]},
    "x: strides": lambda a: a | {"x": a["x"].contiguous()},
    "stride: 3": lambda a: a | {"stride": 3},
    "dilations: 0 of them": lambda a: a | {"dilations": ()},
    "dilations: 8 of them": lambda a: a | {"dilations": (1,) * 8},
    r"dilations: \(0,\)": lambda a: a | {"dilations": (0,)},
    "weights: shape .*, need": lambda a: a | {"weights": a["weights"][0]},
    r"weights: shape \(1, 1, 3, 3, 2\)": lambda a: a | {"weights": a["weights"][..., :2]},
    "weights: strides": lambda a: a | {"weights": a["weights"].expand(2, -1, -1, -1, -1)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message: str, device: torch.device) -> None:
    x, weights, _ = inputs(Case((2, 3, 4, 5), (1,)), torch.float32, device)
    arguments = {"x": x, "weights": weights, "dilations": (1,), "stride": 1}
    with pytest.raises(ValueError, match=message):
        depthwise_multi(**BAD[message](arguments))


def test_bad_gradients_are_named(device: torch.device) -> None:
    x, weights, dy = inputs(Case((2, 3, 4, 5), (1,)), torch.float32, device)
    for gradient in (depthwise_multi_input_grad, depthwise_multi_weight_grad):
        with pytest.raises(ValueError, match="dy: shape"):
            gradient(dy[0], x, weights, (1,))
        with pytest.raises(ValueError, match="dy: dtype"):
            gradient(dy.half(), x, weights, (1,))
        with pytest.raises(ValueError, match="dy: strides"):
            gradient(dy.contiguous(), x, weights, (1,))
        with pytest.raises(ValueError, match="dy: 2 maps, need 1"):
            gradient([dy[0, 0]] * 2, x, weights, (1,))
    for other, message in (
        (x.half(), r"others\[1\]: dtype"),
        (x[:1], r"others\[1\]: shape"),
        (x.contiguous(), r"others\[1\]: strides"),
    ):
        with pytest.raises(ValueError, match=message):
            depthwise_multi_input_grad(dy, x, weights, (1,), others=[x, other])


@pytest.mark.gpu
def test_more_than_2_31_elements(device: torch.device) -> None:
    shape = (3, 64, 4096, 2816)
    x = torch.randn(3, 4096, 2816, 64, device=device, dtype=torch.bfloat16).movedim(-1, 1)
    assert x.numel() > 2**31
    weight = torch.randn(3, 3, 64, device=device)
    y = depthwise(x, weight, 4, relu=True)
    last = x[2:, :, -32:]
    case = Case((1, *shape[1:2], 32, shape[3]), (4,))
    truth = reference(last, weight[None, None], case)[0, 0, :, :, 4:]
    assert_close(y[2:, :, -28:], truth, truth.abs() + 10)
    dx, dw = depthwise_backward(x, x, weight, 4)
    torch.testing.assert_close(dx, depthwise_input_grad(x, x, weight, 4), rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(dw, depthwise_weight_grad(x, x, weight, 4), rtol=1e-3, atol=10.0)
    flipped = reference(last, weight.flip(0, 1)[None, None], Case(case.shape, (4,), relu=False))
    assert_close(dx[2:, :, -28:], flipped[0, 0, :, :, 4:], truth.abs() + 10)
    assert dw[1, 1].sum().item() == pytest.approx(x.numel(), rel=1e-3)
