"""Classifier, and the fixed heads that the paper compares the fusion cell with (Table X)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lgcnet_fast.nn.primitives import GlobalPool, ReLUConvBN
from lgcnet_fast.ops import rectified_pointwise

ASPP_WIDTH = 128
ASPP_RATES = (6, 12, 18)
PPM_BINS = (1, 2, 3, 6)
PPM_BRANCH_WIDTH = 64
PPM_WIDTH = 128


class Classifier(nn.Sequential):
    """ReLU, 1x1 convolution with bias: (N, c_in, h, w) -> logits (N, classes, h, w)."""

    def __init__(self, c_in: int, num_classes: int) -> None:
        super().__init__(nn.ReLU(), nn.Conv2d(c_in, num_classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        _, convolution = self
        assert isinstance(convolution, nn.Conv2d) and convolution.bias is not None
        return rectified_pointwise(x, convolution.weight, convolution.bias)


class ASPP(nn.Module):
    """Atrous pyramid: 1x1, three dilated 3x3 and image pooling, 128 channels each, then 1x1.

    (N, c_in, H, W) -> (N, 128, H, W).
    """

    def __init__(self, c_in: int, affine: bool = True) -> None:
        super().__init__()
        dilated = [
            ReLUConvBN(c_in, ASPP_WIDTH, kernel=3, dilation=rate, affine=affine)
            for rate in ASPP_RATES
        ]
        self.branches = nn.ModuleList(
            [
                ReLUConvBN(c_in, ASPP_WIDTH, affine=affine),
                *dilated,
                GlobalPool(c_in, ASPP_WIDTH, bins=1, affine=affine),
            ]
        )
        self.project = ReLUConvBN(ASPP_WIDTH * len(self.branches), ASPP_WIDTH, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(torch.cat([branch(x) for branch in self.branches], dim=1))


class PPM(nn.Module):
    """Pyramid pooling: bins 1, 2, 3, 6 of 64 channels beside the input, then 3x3 to 128.

    (N, c_in, H, W) -> (N, 128, H, W).
    """

    def __init__(self, c_in: int, affine: bool = True) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            GlobalPool(c_in, PPM_BRANCH_WIDTH, bins, affine) for bins in PPM_BINS
        )
        joined = c_in + PPM_BRANCH_WIDTH * len(PPM_BINS)
        self.project = ReLUConvBN(joined, PPM_WIDTH, kernel=3, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(torch.cat([x, *(branch(x) for branch in self.branches)], dim=1))
