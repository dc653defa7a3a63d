"""ReLU, depthwise 3x3 and pointwise 1x1 convolution: the body of `sep3` and `dil3_*`."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def relu_depthwise_separable(
    x: Tensor, depthwise: Tensor, pointwise: Tensor, stride: int = 1, dilation: int = 1
) -> Tensor:
    """`pointwise * (depthwise * relu(x))` without biases, padded by `dilation`.

    x: (N, C, H, W); depthwise: (C, 1, 3, 3); pointwise: (C_out, C, 1, 1).
    Returns (N, C_out, ceil(H / stride), ceil(W / stride)) in x's dtype (autocast applies).
    """
    filtered = F.conv2d(
        F.relu(x),
        depthwise,
        stride=stride,
        padding=dilation,
        dilation=dilation,
        groups=depthwise.shape[0],
    )
    return F.conv2d(filtered, pointwise)
