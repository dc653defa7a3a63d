"""Operations of folded networks: convolutions that have swallowed their batch norm.

Every operation is called with its input maps and with the (height, width) of its output, which
only the resizing ones look at. Weights are in the layout of the convolution they came from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lgcnet_fast.ops import concat_upsample, upsample

Size = tuple[int, int]


class FoldedOperation(nn.Module):
    """`weights`: the tensors it holds by name, none of which needs a gradient."""

    def __init__(self, **weights: Tensor) -> None:
        super().__init__()
        for name, weight in weights.items():
            self.register_parameter(name, nn.Parameter(weight.contiguous(), requires_grad=False))

    def forward(self, inputs: Sequence[Tensor], size: Size) -> Tensor:
        raise NotImplementedError


class Convolution(FoldedOperation):
    """k x k convolution with bias and a ReLU in front of it, behind it, or neither.

    weight: (c_out, c_in, k, k); bias: (c_out,).
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        stride: int = 1,
        dilation: int = 1,
        relu_before: bool = False,
        relu_after: bool = False,
    ) -> None:
        super().__init__(weight=weight, bias=bias)
        self.stride, self.dilation = stride, dilation
        self.padding = dilation * (weight.shape[-1] // 2)
        self.relu_before, self.relu_after = relu_before, relu_after

    def forward(self, inputs: Sequence[Tensor], size: Size) -> Tensor:
        x = F.relu(inputs[0]) if self.relu_before else inputs[0]
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation)
        return F.relu(x) if self.relu_after else x


class DepthwiseSeparableConvolution(FoldedOperation):
    """ReLU, depthwise 3x3, pointwise 1x1 with bias.

    depthwise: (c_in, 1, 3, 3); pointwise: (c_out, c_in, 1, 1); bias: (c_out,).
    """

    depthwise: Tensor
    pointwise: Tensor
    bias: Tensor

    def __init__(
        self, depthwise: Tensor, pointwise: Tensor, bias: Tensor, stride: int, dilation: int
    ) -> None:
        super().__init__(depthwise=depthwise, pointwise=pointwise, bias=bias)
        self.stride, self.dilation = stride, dilation

    def forward(self, inputs: Sequence[Tensor], size: Size) -> Tensor:
        x, channels = F.relu(inputs[0]), len(self.depthwise)
        x = F.conv2d(x, self.depthwise, None, self.stride, self.dilation, self.dilation, channels)
        return F.conv2d(x, self.pointwise, self.bias)


class InterleavedConvolution(FoldedOperation):
    """ReLU, 1x1 convolutions of the even and of the odd pixels, concatenation: n -> ceil(n / 2).

    even, odd: (c_out / 2, c_in, 1, 1); bias: (c_out,). The odd pixel beyond an odd size is 0.
    """

    even: Tensor
    odd: Tensor
    bias: Tensor

    def __init__(self, even: Tensor, odd: Tensor, bias: Tensor) -> None:
        super().__init__(even=even, odd=odd, bias=bias)

    def forward(self, inputs: Sequence[Tensor], size: Size) -> Tensor:
        x = F.relu(inputs[0])
        even_bias, odd_bias = self.bias.split((len(self.even), len(self.odd)))
        shifted = F.pad(x, (-1, 1, -1, 1))
        return torch.cat(
            (
                F.conv2d(x, self.even, even_bias, stride=2),
                F.conv2d(shifted, self.odd, odd_bias, stride=2),
            ),
            dim=1,
        )


class PooledConvolution(FoldedOperation):
    """ReLU, average pooling to bins x bins, 1x1 convolution with bias, upsampling.

    The batch norm came after the upsampling. It folds into the convolution, bias included, because
    bilinear weights sum to 1. weight: (c_out, c_in, 1, 1); bias: (c_out,).
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, bins: int) -> None:
        super().__init__(weight=weight, bias=bias)
        self.bins = bins

    def forward(self, inputs: Sequence[Tensor], size: Size) -> Tensor:
        pooled = F.adaptive_avg_pool2d(F.relu(inputs[0]), self.bins)
        return upsample(F.conv2d(pooled, self.weight, self.bias), size)


class TransposedConvolution(FoldedOperation):
    """ReLU, transposed 3x3 convolution with bias: n -> 2n - 1 or 2n, as `size` says.

    weight: (c_in, c_out, 3, 3); bias: (c_out,).
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__(weight=weight, bias=bias)

    def forward(self, inputs: Sequence[Tensor], size: Size) -> Tensor:
        x = F.relu(inputs[0])
        beyond = tuple(size[axis] - (2 * x.shape[2 + axis] - 1) for axis in (0, 1))
        return F.conv_transpose2d(x, self.weight, self.bias, 2, padding=1, output_padding=beyond)


class Constant(FoldedOperation):
    """What a convolution makes of a map of zeros: its bias, at every pixel. bias: (c_out,)."""

    bias: Tensor

    def __init__(self, bias: Tensor) -> None:
        super().__init__(bias=bias)

    def forward(self, inputs: Sequence[Tensor], size: Size) -> Tensor:
        """inputs: any map, for the number of images."""
        return self.bias.view(1, -1, 1, 1).expand(len(inputs[0]), -1, *size)


class MaxPooling(FoldedOperation):
    """3x3, padded by 1."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, inputs: Sequence[Tensor], size: Size) -> Tensor:
        return F.max_pool2d(inputs[0], 3, self.stride, padding=1)


class Sum(FoldedOperation):
    """Of two or more maps of one shape."""

    def forward(self, inputs: Sequence[Tensor], size: Size) -> Tensor:
        total = inputs[0] + inputs[1]
        for term in inputs[2:]:
            total += term
        return total


class Concatenation(FoldedOperation):
    """Along channels."""

    def forward(self, inputs: Sequence[Tensor], size: Size) -> Tensor:
        return concat_upsample(inputs, size)


class Resizing(FoldedOperation):
    """Bilinear upsampling with aligned corners."""

    def forward(self, inputs: Sequence[Tensor], size: Size) -> Tensor:
        return upsample(inputs[0], size)
