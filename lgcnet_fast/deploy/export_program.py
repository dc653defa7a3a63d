"""What is exported: a folded network with its normalisation, in operations that every format has.

The program takes images as they are, RGB uint8 (1, H, W, 3), and returns float32 logits
(1, classes, H / output_stride, W / output_stride), rounded up, or uint8 labels (1, H, W).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lgcnet_fast.data.normalise import DEVIATION, MEAN
from lgcnet_fast.deploy.operations import (
    Concatenation,
    FoldedOperation,
    MaxPooling,
    PooledConvolution,
    Resizing,
    Size,
    TransposedConvolution,
)
from lgcnet_fast.deploy.program import FoldedNetwork

INPUT = "image"


class ExportProgram(nn.Module):
    """`labels`: end with upsampling to the image's size and argmax instead of with logits."""

    mean: Tensor
    scale: Tensor

    def __init__(self, network: FoldedNetwork, labels: bool, dynamic: bool) -> None:
        super().__init__()
        self.network = exportable(network, dynamic)
        self.labels = labels
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1) * 255)
        self.register_buffer("scale", 1 / (torch.tensor(DEVIATION).view(1, 3, 1, 1) * 255))

    @property
    def output(self) -> str:
        """Name of the result."""
        return "labels" if self.labels else "logits"

    def forward(self, image: Tensor) -> Tensor:
        # Cast first: TensorRT takes uint8 inputs, but computes nothing on them.
        # Contiguous, because torch.export cannot reason about strides of channels-last maps.
        pixels = image.float().permute(0, 3, 1, 2).contiguous()
        logits = self.network((pixels - self.mean) * self.scale)
        if not self.labels:
            return logits
        return _resize(logits, (image.shape[1], image.shape[2])).argmax(dim=1).to(torch.uint8)


def exportable(network: FoldedNetwork, dynamic: bool) -> FoldedNetwork:
    """The same function with the same weights.

    Pooling to a number of bins that does not divide the size has no standard operation. With
    `dynamic`, operations that decide by the size of a map, which is not known then, are replaced.
    """
    forms = _FORMS | _DYNAMIC_FORMS if dynamic else _FORMS
    return FoldedNetwork(
        [
            replace(step, operation=forms.get(type(step.operation), _same)(step.operation))
            for step in network.steps
        ]
    )


class _BinnedConvolution(FoldedOperation):
    """`PooledConvolution` with its pooling as two matrix products."""

    weight: Tensor
    bias: Tensor

    def __init__(self, pooled: PooledConvolution) -> None:
        super().__init__(weight=pooled.weight, bias=pooled.bias)
        self.bins = pooled.bins

    def forward(self, inputs: Sequence[Tensor], size: Size) -> Tensor:
        pooled = _binned_mean(F.relu(inputs[0]), self.bins)
        return _resize(F.conv2d(pooled, self.weight, self.bias), size)


class _CroppedDeconvolution(FoldedOperation):
    """`TransposedConvolution` whose result is always 2n long, and then cut to its size."""

    weight: Tensor
    bias: Tensor

    def __init__(self, transposed: TransposedConvolution) -> None:
        super().__init__(weight=transposed.weight, bias=transposed.bias)

    def forward(self, inputs: Sequence[Tensor], size: Size) -> Tensor:
        y = F.conv_transpose2d(
            F.relu(inputs[0]), self.weight, self.bias, 2, padding=1, output_padding=1
        )
        return _first(y, size)


class _ThinnedPooling(FoldedOperation):
    """`MaxPooling` of stride 2, thinned afterwards: torch 2.7 traces its strides for even or odd
    sizes only."""

    def forward(self, inputs: Sequence[Tensor], size: Size) -> Tensor:
        return _first(F.max_pool2d(inputs[0], 3, 1, padding=1), size, step=2)


class _PlainConcatenation(FoldedOperation):
    def forward(self, inputs: Sequence[Tensor], size: Size) -> Tensor:
        return torch.cat(list(inputs), dim=1)


class _PlainResizing(FoldedOperation):
    def forward(self, inputs: Sequence[Tensor], size: Size) -> Tensor:
        return _resize(inputs[0], size)


def _same(operation: FoldedOperation) -> FoldedOperation:
    return operation


def _pooling(operation: MaxPooling) -> FoldedOperation:
    return _ThinnedPooling() if operation.stride == 2 else operation


_FORMS: dict[type, Callable[..., FoldedOperation]] = {PooledConvolution: _BinnedConvolution}
_DYNAMIC_FORMS: dict[type, Callable[..., FoldedOperation]] = {
    TransposedConvolution: _CroppedDeconvolution,
    MaxPooling: _pooling,
    Concatenation: lambda _: _PlainConcatenation(),
    Resizing: lambda _: _PlainResizing(),
}


def _binned_mean(x: Tensor, bins: int) -> Tensor:
    """(1, C, H, W) -> (1, C, bins, bins), as `F.adaptive_avg_pool2d`."""
    if bins == 1:
        return x.mean(dim=(2, 3), keepdim=True)
    rows, columns = (_bin_shares(x, axis, bins) for axis in (2, 3))
    # One product for each channel, since folding the channels into the rows ties a traced program
    # to strides. Programs take one image, so that dropping the batch is no reshape either.
    channels = x.shape[1]
    narrow = torch.bmm(x[0], columns.T.expand(channels, -1, -1))
    return torch.bmm(rows.expand(channels, -1, -1), narrow)[None]


def _bin_shares(x: Tensor, axis: int, bins: int) -> Tensor:
    """float32 (bins, length of the axis): how much a position adds to the mean of each bin.

    Bin i covers the positions from floor(i * length / bins) up to ceil((i + 1) * length / bins).
    """
    length = x.shape[axis]
    index = _positions(x, bins)[:, None]
    first = index * length // bins
    end = ((index + 1) * length + bins - 1) // bins
    position = _positions(x, length)
    inside = (position >= first) & (position < end)
    return inside.float() / (end - first).float()


def _first(x: Tensor, size: Size, step: int = 1) -> Tensor:
    """The first `size` rows and columns of x, or of every `step`-th.

    By index, because slices compare sizes, which torch.export cannot decide for every image.
    """
    rows, columns = (_positions(x, length) * step for length in size)
    return x.index_select(2, rows).index_select(3, columns)


def _positions(x: Tensor, length: int) -> Tensor:
    """int64 (length,): 0, 1, 2, ..., on x's device."""
    if torch.jit.is_tracing():
        # TorchScript would keep the device of an `arange` when its file is loaded onto another.
        return x.new_ones((length,), dtype=torch.int64).cumsum(0) - 1
    return torch.arange(length, device=x.device)


def _resize(x: Tensor, size: Size) -> Tensor:
    """`ops.upsample` without its comparison of sizes."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)
