"""Folded operations as calls of the CUDA kernels, cuDNN or cuBLAS that write into given maps.

A call writes its map or adds to it. Maps are NHWC (N, C, H, W), or slices of their channels, in the
storage dtype.
"""

from __future__ import annotations

from functools import partial, singledispatchmethod

import torch
from torch import Tensor
from torch.nn import functional as F

from lgcnet_fast.data.normalise import mean_colour
from lgcnet_fast.deploy.fused import Call
from lgcnet_fast.deploy.operations import (
    Constant,
    Convolution,
    DepthwiseSeparableConvolution,
    FoldedOperation,
    InterleavedConvolution,
    MaxPooling,
    PooledConvolution,
    Resizing,
    TransposedConvolution,
)
from lgcnet_fast.deploy.packing import Packing
from lgcnet_fast.errors import BackendError
from lgcnet_fast.native.max_pool import max_pool_forward
from lgcnet_fast.native.separable import pointwise_forward, separable_forward
from lgcnet_fast.native.upsample import upsample_forward

ALL = slice(0, None)


def can_accumulate(operation: FoldedOperation) -> bool:
    """Whether its kernel adds to a map, so that it needs no map of its own in a sum."""
    if isinstance(operation, Convolution):
        return _is_pointwise(operation)
    kinds = (DepthwiseSeparableConvolution, InterleavedConvolution, Constant)
    return isinstance(operation, kinds)


class NativeCalls:
    """Makes the calls; weights go to the device once for all sizes."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._dtype = dtype
        # cuDNN's Winograd and FFT algorithms, the fast ones of float32, want NCHW. ReLU in front
        # and bias behind pass over the maps anyway, and change the layout on the way.
        is_float32 = dtype == torch.float32
        self._layout = torch.contiguous_format if is_float32 else torch.channels_last
        self._float32 = Packing(device, torch.float32)
        """Of the package's kernels, whatever the storage dtype."""
        self._stored = Packing(device, dtype)

    def first_convolution(self, operation: Convolution, image: Tensor, out: Tensor) -> Call:
        """Of an image (N, H, W, 3) in 0..255, uint8 or float32."""
        filters = self._stored.image_filters(operation, self._layout)
        pixels, mean = image.permute(0, 3, 1, 2), mean_colour(image.device)

        def call() -> None:
            centred = torch.sub(pixels, mean, out=self._temporary(pixels))
            self._convolve(operation, filters, centred, out, accumulate=False)

        return call

    @singledispatchmethod
    def call(self, operation: FoldedOperation, x: Tensor, out: Tensor, accumulate: bool) -> Call:
        """Writes the operation of x to `out`, or adds it to what is there."""
        raise BackendError(f"backend 'cuda' has no {type(operation).__name__}")

    @call.register
    def _(
        self, operation: DepthwiseSeparableConvolution, x: Tensor, out: Tensor, accumulate: bool
    ) -> Call:
        weights = (
            self._float32.depthwise(operation, ALL).view(3, 3, -1),
            self._float32.pointwise(operation, ALL),
            self._bias(operation),
        )
        dilation, stride = operation.dilation, operation.stride
        options = {"dilation": dilation, "stride": stride, "relu": True, "accumulate": accumulate}
        return partial(separable_forward, x, *weights, **options, out=out)

    @call.register
    def _(self, operation: Convolution, x: Tensor, out: Tensor, accumulate: bool) -> Call:
        if _is_pointwise(operation):
            weight = self._float32.convolution(operation, ALL)
            seen = x[:, :, :: operation.stride, :: operation.stride]
            options = {"relu": operation.relu_before, "accumulate": accumulate}
            return partial(
                pointwise_forward, seen, weight, self._bias(operation), **options, out=out
            )
        filters = self._stored.filters(operation, self._layout)
        return lambda: self._convolve(operation, filters, x, out, accumulate)

    @call.register
    def _(
        self, operation: InterleavedConvolution, x: Tensor, out: Tensor, accumulate: bool
    ) -> Call:
        """The odd half has its bias also where an odd size ends with an even pixel."""
        even_weight, odd_weight = self._float32.even_and_odd(operation)
        channels = even_weight.shape[1]
        even_out, odd_out = out[:, :channels], out[:, channels:]
        even_bias, odd_bias = self._bias(operation).split((channels, out.shape[1] - channels))
        zero = self._float32.bias((), len(odd_bias))
        odd = x[:, :, 1::2, 1::2]
        reached = odd_out[:, :, : odd.shape[2], : odd.shape[3]]

        def call() -> None:
            pointwise_forward(
                x[:, :, ::2, ::2], even_weight, even_bias, relu=True, out=even_out,
                accumulate=accumulate,
            )  # fmt: skip
            _put(_on_map(odd_bias), odd_out, accumulate)
            if odd.numel():
                pointwise_forward(odd, odd_weight, zero, relu=True, out=reached, accumulate=True)

        return call

    @call.register
    def _(self, operation: MaxPooling, x: Tensor, out: Tensor, accumulate: bool) -> Call:
        if not accumulate:
            return partial(max_pool_forward, x, operation.stride, out=out)
        return lambda: out.add_(max_pool_forward(x, operation.stride))

    @call.register
    def _(self, operation: Resizing, x: Tensor, out: Tensor, accumulate: bool) -> Call:
        return partial(_resize, x, out, accumulate)

    @call.register
    def _(self, operation: PooledConvolution, x: Tensor, out: Tensor, accumulate: bool) -> Call:
        weight, bias = self._float32.pooled(operation), self._bias(operation)

        def call() -> None:
            pooled = F.adaptive_avg_pool2d(F.relu(x), operation.bins)
            pooled = pooled.contiguous(memory_format=torch.channels_last)
            _resize(pointwise_forward(pooled, weight, bias), out, accumulate)

        return call

    @call.register
    def _(self, operation: TransposedConvolution, x: Tensor, out: Tensor, accumulate: bool) -> Call:
        filters = self._stored.filters(operation, self._layout)
        bias = self._bias(operation)

        def call() -> None:
            height, width = (out.shape[axis] - (2 * x.shape[axis] - 1) for axis in (2, 3))
            y = _transposed_convolution(self._rectified(x), filters, (height, width))
            _put_with_bias(y, bias, out, accumulate)

        return call

    @call.register
    def _(self, operation: Constant, x: Tensor, out: Tensor, accumulate: bool) -> Call:
        return partial(_put, _on_map(self._bias(operation)), out, accumulate)

    def _convolve(
        self, operation: Convolution, filters: Tensor, x: Tensor, out: Tensor, accumulate: bool
    ) -> None:
        x = self._rectified(x) if operation.relu_before else self._relaid(x)
        y = _convolution(x, filters, operation.stride, operation.padding, operation.dilation)
        _put_with_bias(y, self._bias(operation), out, accumulate)
        if operation.relu_after:
            out.relu_()

    def _rectified(self, x: Tensor) -> Tensor:
        """relu(x) as cuDNN is to see it."""
        return torch.clamp_min(x, 0, out=self._temporary(x))

    def _relaid(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=self._layout)

    def _temporary(self, like: Tensor) -> Tensor:
        return torch.empty(
            like.shape, dtype=self._dtype, device=like.device, memory_format=self._layout
        )

    def _bias(self, operation: FoldedOperation) -> Tensor:
        bias = operation.get_parameter("bias")
        return self._float32.bias((bias,), len(bias))


def _is_pointwise(operation: Convolution) -> bool:
    return operation.weight.shape[-1] == 1 and not operation.relu_after


def _on_map(bias: Tensor) -> Tensor:
    return bias.view(1, -1, 1, 1)


def _put(y: Tensor, out: Tensor, accumulate: bool) -> None:
    if accumulate:
        out.add_(y)
    else:
        out.copy_(y)


def _put_with_bias(y: Tensor, bias: Tensor, out: Tensor, accumulate: bool) -> None:
    """y: fresh from its kernel, and overwritten."""
    if accumulate:
        out.add_(y.add_(_on_map(bias)))
    else:
        torch.add(y, _on_map(bias), out=out)


def _resize(x: Tensor, out: Tensor, accumulate: bool) -> None:
    size = (out.shape[2], out.shape[3])
    if not accumulate:
        upsample_forward(x, size, out=out)
    else:
        out.add_(x if x.shape[2:] == out.shape[2:] else upsample_forward(x, size))


def _convolution(x: Tensor, filters: Tensor, stride: int, padding: int, dilation: int) -> Tensor:
    """By cuDNN on a GPU: the fastest of its deterministic algorithms, none in TF32."""
    if x.device.type != "cuda":
        return F.conv2d(x, filters, None, stride, padding, dilation)
    pairs = ((number, number) for number in (padding, stride, dilation))
    return torch.cudnn_convolution(
        x, filters, *pairs, 1, benchmark=True, deterministic=True, allow_tf32=False
    )


def _transposed_convolution(x: Tensor, filters: Tensor, beyond: tuple[int, int]) -> Tensor:
    """3x3, stride 2; as `_convolution`."""
    if x.device.type != "cuda":
        return F.conv_transpose2d(x, filters, None, 2, padding=1, output_padding=beyond)
    return torch.cudnn_convolution_transpose(
        x, filters, (1, 1), beyond, (2, 2), (1, 1), 1,
        benchmark=True, deterministic=True, allow_tf32=False,
    )  # fmt: skip
