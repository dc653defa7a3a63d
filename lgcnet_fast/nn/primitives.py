"""Building blocks of the candidate operations and of the fixed parts of the network.

`affine` is False in the supernet, where the weights Z scale each candidate, and True afterwards.
Convolutions in front of batch norm have no bias.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lgcnet_fast.ops import relu_depthwise_separable, upsample


class ReLUConvBN(nn.Sequential):
    """ReLU, k x k convolution, batch norm: (N, c_in, H, W) -> (N, c_out, ceil(H / stride), ...)."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int = 1,
        stride: int = 1,
        dilation: int = 1,
        affine: bool = True,
    ) -> None:
        super().__init__(
            nn.ReLU(),
            nn.Conv2d(
                c_in,
                c_out,
                kernel,
                stride=stride,
                padding=dilation * (kernel // 2),
                dilation=dilation,
                bias=False,
            ),
            nn.BatchNorm2d(c_out, affine=affine),
        )


class DepthwiseSeparable(nn.Module):
    """ReLU, depthwise 3x3, pointwise 1x1, batch norm."""

    def __init__(
        self, c_in: int, c_out: int, stride: int = 1, dilation: int = 1, affine: bool = True
    ) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(
            c_in,
            c_in,
            3,
            stride=stride,
            padding=dilation,
            dilation=dilation,
            groups=c_in,
            bias=False,
        )
        self.pointwise = nn.Conv2d(c_in, c_out, 1, bias=False)
        self.norm = nn.BatchNorm2d(c_out, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        filtered = relu_depthwise_separable(
            x,
            self.depthwise.weight,
            self.pointwise.weight,
            self.depthwise.stride[0],
            self.depthwise.dilation[0],
        )
        return self.norm(filtered)


class FactorizedReduce(nn.Module):
    """ReLU, two 1x1 convolutions of stride 2 on interleaved pixels, concatenation, batch norm.

    The second convolution sees the input shifted by one pixel. A zero row and column are appended
    first, so that odd sizes give two maps of the same size: n -> ceil(n / 2).
    """

    def __init__(self, c_in: int, c_out: int, affine: bool = True) -> None:
        super().__init__()
        self.even = nn.Conv2d(c_in, c_out // 2, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(c_in, c_out - c_out // 2, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(c_out, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        shifted = F.pad(x, (-1, 1, -1, 1))
        return self.norm(torch.cat((self.even(x), self.odd(shifted)), dim=1))


class GlobalPool(nn.Module):
    """ReLU, average pooling to k x k, 1x1 convolution, upsampling back, batch norm.

    Batch norm follows the upsampling so that batch statistics exist for k = 1. At inference it
    still folds into the convolution exactly, because bilinear weights sum to 1.
    """

    def __init__(self, c_in: int, c_out: int, bins: int, affine: bool = True) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(bins)
        self.conv = nn.Conv2d(c_in, c_out, 1, bias=False)
        self.norm = nn.BatchNorm2d(c_out, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        pooled = self.conv(self.pool(F.relu(x)))
        return self.norm(upsample(pooled, (height, width)))


class Interpolate(nn.Module):
    """Bilinear upsampling with aligned corners to an explicit size."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return upsample(x, size)


class Deconvolution(nn.Module):
    """ReLU, transposed 3x3 convolution, batch norm: n -> 2n - 1 or 2n, as `size` says."""

    def __init__(self, channels: int, affine: bool = True) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(channels, channels, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels, affine=affine)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.norm(self.conv(F.relu(x), output_size=list(size)))
