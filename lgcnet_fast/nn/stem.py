"""The stem: three 3x3 convolutions from the image to stride 4."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from lgcnet_fast.nn.primitives import convolved
from lgcnet_fast.ops import norm_sum


class Stem(nn.Module):
    """Returns the outputs of the second and of the third convolution, the inputs of cell 0.

    x: (N, 3, H, W). The third convolution has no ReLU behind it, because cells start with one.
    """

    def __init__(self, widths: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        first, second, third = widths
        self.conv1 = _conv_bn(3, first, strides[0], relu=True)
        self.conv2 = _conv_bn(first, second, strides[1], relu=True)
        self.conv3 = _conv_bn(second, third, strides[2], relu=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s0 = _applied(self.conv2, _applied(self.conv1, x))
        return s0, _applied(self.conv3, s0)


def _conv_bn(c_in: int, c_out: int, stride: int, relu: bool) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(c_out),
    ]
    if relu:
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def _applied(stage: nn.Sequential, x: Tensor) -> Tensor:
    convolution, norm, *relu = stage
    y = norm_sum(convolved([cast(nn.Conv2d, convolution)], [x]), [norm])
    return relu[0](y) if relu else y
