"""The stem: three 3x3 convolutions from the image to stride 4."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lgcnet_fast.ops import norm_sum

CHANNELS = 8
"""16 bytes of half precision, which the fast convolutions load at once."""


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
    assert isinstance(convolution, nn.Conv2d)
    raw = _of_image(convolution, x) if _is_slow(x) else convolution(x)
    y = norm_sum([raw], [norm])
    return relu[0](y) if relu else y


def _is_slow(x: Tensor) -> bool:
    """Whether tensor cores would compute on x if only it had more channels."""
    if not x.is_cuda or x.shape[1] >= CHANNELS or torch.compiler.is_compiling():
        return False
    return torch.is_autocast_enabled("cuda")


def _of_image(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """The convolution of an image, x and weight filled up with channels of zeros."""
    missing = CHANNELS - x.shape[1]
    dtype = torch.get_autocast_dtype(x.device.type)
    images, channels, height, width = x.shape
    filled = x.new_zeros((images, height, width, CHANNELS), dtype=dtype)
    filled[..., :channels] = x.movedim(1, -1)
    weight = F.pad(convolution.weight.to(dtype), (0, 0, 0, 0, 0, missing))
    weight = weight.contiguous(memory_format=torch.channels_last)
    return F.conv2d(filled.movedim(-1, 1), weight, None, convolution.stride, convolution.padding)
