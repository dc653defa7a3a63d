"""The fused separable and pointwise kernels against float64, on every route of this machine."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lgcnet_fast.native.launcher import Launcher
from lgcnet_fast.native.operands import STORAGE
from lgcnet_fast.native.separable import pointwise_forward, separable_forward
from tests.native.truth import (
    assert_canaries_live,
    assert_close,
    nhwc,
    poisoned,
    poisoned_memory,
)

Shape = tuple[int, int, int, int]

# Shape of x, channels of y.
CASES = [
    ((1, 8, 9, 19), 12),
    ((2, 3, 5, 3), 5),
    ((1, 40, 1, 1), 70),
    ((1, 36, 6, 7), 33),
    ((1, 64, 3, 17), 64),
]
LARGE = [((1, 64, 97, 193), 64), ((2, 48, 193, 385), 48), ((1, 128, 49, 97), 128)]


@dataclass(frozen=True)
class Case:
    """Inputs on the CPU; weights are scaled so that results are of size 1."""

    x: Tensor
    depthwise: Tensor
    pointwise: Tensor
    bias: Tensor

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        weights = (self.depthwise, self.pointwise, self.bias)
        return nhwc(self.x, device), *(one.to(device) for one in weights)

    def separable(self, dilation: int, stride: int, relu: bool) -> Tensor:
        """In float64, as the two below."""
        x = self.x.double().relu() if relu else self.x.double()
        window = self.depthwise.double().permute(2, 0, 1).unsqueeze(1)
        y = F.conv2d(x, window, None, stride, dilation, dilation, groups=x.shape[1])
        return self._product(y)

    def product(self, relu: bool) -> Tensor:
        return self._product(self.x.double().relu() if relu else self.x.double())

    def _product(self, x: Tensor) -> Tensor:
        y = torch.einsum("nchw,cm->nmhw", x, self.pointwise.double())
        return y + self.bias.double()[:, None, None]


def make_case(shape: Shape, outputs: int, dtype: torch.dtype) -> Case:
    generator = torch.Generator().manual_seed(sum(shape) + outputs)
    channels = shape[1]

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    pointwise = random(channels, outputs) / channels**0.5
    return Case(random(*shape).to(dtype), random(3, 3, channels) / 3, pointwise, random(outputs))


def check(launcher: Launcher, case: Case, dilation: int, stride: int, relu: bool) -> None:
    device = torch.device(launcher.device_type)
    options = {"dilation": dilation, "stride": stride, "relu": relu}
    with poisoned_memory():
        y = separable_forward(*case.on(device), **options, launcher=launcher)
    exact = case.separable(**options).to(device)
    assert_close(y, exact, case.x.dtype, 9 * len(case.pointwise))


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("shape", "outputs"), CASES)
def test_separable(
    launcher: Launcher, shape: Shape, outputs: int, stride: int, dtype: torch.dtype
) -> None:
    case = make_case(shape, outputs, dtype)
    for dilation, relu in ((1, True), (2, False), (3, True), (8, True)):
        check(launcher, case, dilation, stride, relu)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 8])
@pytest.mark.parametrize(("shape", "outputs"), LARGE)
def test_large_maps(
    gpu_launcher: Launcher,
    shape: Shape,
    outputs: int,
    dilation: int,
    stride: int,
    dtype: torch.dtype,
) -> None:
    check(gpu_launcher, make_case(shape, outputs, dtype), dilation, stride, relu=True)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("shape", "outputs"), CASES)
def test_pointwise(
    launcher: Launcher,
    device: torch.device,
    shape: Shape,
    outputs: int,
    relu: bool,
    dtype: torch.dtype,
) -> None:
    case = make_case(shape, outputs, dtype)
    x, _, pointwise, bias = case.on(device)
    with poisoned_memory():
        y = pointwise_forward(x, pointwise, bias, relu=relu, launcher=launcher)
    assert_close(y, case.product(relu), dtype, shape[1])


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("stride", [1, 2])
def test_every_width_gives_the_same(
    launcher: Launcher, device: torch.device, stride: int, width: int, dtype: torch.dtype
) -> None:
    case = make_case((1, 36, 5, 18), 72, dtype)
    y = separable_forward(*case.on(device), stride=stride, width=width, launcher=launcher)
    assert_close(y, case.separable(1, stride, False), dtype, 9 * 36)
    x, _, pointwise, bias = case.on(device)
    y = pointwise_forward(x, pointwise, bias, width=width, launcher=launcher)
    assert_close(y, case.product(False), dtype, 36)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("channels", [5, 8])
def test_branches_accumulate_in_a_slice(
    launcher: Launcher, device: torch.device, channels: int, dtype: torch.dtype
) -> None:
    case = make_case((2, channels, 6, 7), channels, dtype)
    x, depthwise, pointwise, bias = case.on(device)
    source = poisoned(tuple(x.shape), dtype, device)
    source.copy_(x)
    out = poisoned(tuple(x.shape), dtype, device)
    first = case.separable(4, 1, True)
    y = separable_forward(
        source, depthwise, pointwise, bias, dilation=4, relu=True, out=out, launcher=launcher
    )
    assert y is out
    assert_close(out, first, dtype, 9 * channels)
    stored = out.double().cpu()
    pointwise_forward(source, pointwise, bias, out=out, accumulate=True, launcher=launcher)
    assert_close(out, stored + case.product(False), dtype, channels)
    assert_canaries_live(out)


def test_every_second_pixel_of_a_view(launcher: Launcher, device: torch.device) -> None:
    case = make_case((1, 8, 7, 6), 4, torch.float32)
    x, _, pointwise, bias = case.on(device)
    y = pointwise_forward(x[:, :, ::2, ::2], pointwise, bias, launcher=launcher)
    assert_close(y, case.product(False)[:, :, ::2, ::2], torch.float32, 8)


def test_no_bias_and_unaligned_weights(launcher: Launcher, device: torch.device) -> None:
    case = make_case((1, 8, 4, 5), 8, torch.float32)
    x, depthwise, pointwise, _ = case.on(device)
    moved = depthwise.new_empty(depthwise.numel() + 1)[1:].view(depthwise.shape)
    moved.copy_(depthwise)
    y = separable_forward(x, moved, pointwise, launcher=launcher)
    exact = case.separable(1, 1, False) - case.bias.double()[:, None, None]
    assert_close(y, exact, torch.float32, 72)


def test_relu_keeps_nan(launcher: Launcher, device: torch.device) -> None:
    x = nhwc(torch.tensor([float("nan"), -1.0, 2.0]).reshape(1, 1, 1, 3), device)
    y = pointwise_forward(x, torch.ones(1, 1, device=device), relu=True, launcher=launcher)
    values = y.flatten().tolist()
    assert values[0] != values[0] and values[1:] == [0.0, 2.0]


BAD = {
    "x: strides": {"x": torch.zeros(1, 4, 5, 6)},
    "depthwise: shape": {"depthwise": torch.zeros(4, 1, 3, 3)},
    "depthwise: dtype": {"depthwise": torch.zeros(3, 3, 4).half()},
    "pointwise: shape .* need": {"pointwise": torch.zeros(4, 8, 1, 1)},
    r"pointwise: shape \(3, 8\)": {"pointwise": torch.zeros(3, 8)},
    "pointwise: strides": {"pointwise": torch.zeros(8, 4).t()},
    "bias: shape": {"bias": torch.zeros(4)},
    "stride: 3": {"stride": 3},
    "dilation: 0": {"dilation": 0},
    "accumulate: there is no": {"accumulate": True},
    "out: shape": {"out": nhwc(torch.zeros(1, 4, 5, 6))},
    "width: 48 has no compiled": {"width": 48},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(emulated: Launcher, message: str) -> None:
    good = {
        "x": nhwc(torch.zeros(1, 4, 5, 6)),
        "depthwise": torch.zeros(3, 3, 4),
        "pointwise": torch.zeros(4, 8),
    }
    with pytest.raises(ValueError, match=message):
        separable_forward(**{**good, **BAD[message]}, launcher=emulated)
