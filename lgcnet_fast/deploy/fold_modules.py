"""One module of a derived network as one folded operation.

Batch norm at inference is y = scale * x + shift per channel. The scale multiplies the output
channels of the convolution in front, the shift becomes its bias; both in float64, then rounded once
to the network's dtype. `kept` lists the input channels that the stored map has: the others are
zero, and their weights are left out.
"""

from __future__ import annotations

from functools import singledispatch

from torch import Tensor, nn

from lgcnet_fast.deploy.operations import (
    Convolution,
    DepthwiseSeparableConvolution,
    FoldedOperation,
    InterleavedConvolution,
    MaxPooling,
    PooledConvolution,
    Resizing,
    TransposedConvolution,
)
from lgcnet_fast.errors import ConfigError
from lgcnet_fast.nn.heads import Classifier
from lgcnet_fast.nn.primitives import (
    Deconvolution,
    DepthwiseSeparable,
    FactorizedReduce,
    GlobalPool,
    Interpolate,
    ReLUConvBN,
)


@singledispatch
def fold_module(module: nn.Module, kept: list[int]) -> FoldedOperation:
    """Raises `ConfigError` for modules that no derived network of this package has."""
    raise ConfigError(f"networks with a {type(module).__name__} cannot be folded for deployment")


def is_one_operation(module: nn.Module) -> bool:
    """Whether `fold_module` takes the module as a whole."""
    return fold_module.dispatch(type(module)) is not fold_module.dispatch(object)


@fold_module.register
def _(module: ReLUConvBN, kept: list[int]) -> FoldedOperation:
    convolution, norm = _convolution_and_norm(module)
    weight, bias = _folded(convolution.weight, norm)
    return Convolution(
        weight[:, kept],
        bias,
        convolution.stride[0],
        convolution.dilation[0],
        relu_before=True,
    )


@fold_module.register
def _(module: DepthwiseSeparable, kept: list[int]) -> FoldedOperation:
    pointwise, bias = _folded(module.pointwise.weight, module.norm)
    depthwise = module.depthwise
    return DepthwiseSeparableConvolution(
        depthwise.weight[kept], pointwise[:, kept], bias, depthwise.stride[0], depthwise.dilation[0]
    )


@fold_module.register
def _(module: FactorizedReduce, kept: list[int]) -> FoldedOperation:
    scale, shift = _scale_and_shift(module.norm)
    weights = (module.even.weight, module.odd.weight)
    even, odd = (
        _scaled(weight, part)[:, kept]
        for weight, part in zip(weights, scale.split([len(w) for w in weights]), strict=True)
    )
    return InterleavedConvolution(even, odd, shift.to(even.dtype))


@fold_module.register
def _(module: GlobalPool, kept: list[int]) -> FoldedOperation:
    weight, bias = _folded(module.conv.weight, module.norm)
    return PooledConvolution(weight[:, kept], bias, module.bins)


@fold_module.register
def _(module: Deconvolution, kept: list[int]) -> FoldedOperation:
    # Transposed convolutions have the output channels second.
    weight, bias = _folded(module.conv.weight.transpose(0, 1), module.norm)
    return TransposedConvolution(weight.transpose(0, 1)[kept], bias)


@fold_module.register
def _(module: Classifier, kept: list[int]) -> FoldedOperation:
    _, convolution = module
    assert isinstance(convolution, nn.Conv2d) and convolution.bias is not None
    weight, bias = convolution.weight.detach(), convolution.bias.detach()
    return Convolution(weight[:, kept], bias.clone(), relu_before=True)


@fold_module.register
def _(module: nn.MaxPool2d, kept: list[int]) -> FoldedOperation:
    assert isinstance(module.stride, int)
    return MaxPooling(module.stride)


@fold_module.register
def _(module: Interpolate, kept: list[int]) -> FoldedOperation:
    return Resizing()


def fold_stem_stage(stage: nn.Sequential) -> Convolution:
    """3x3 convolution, batch norm and, in all stages but the last, a ReLU."""
    convolution, norm = _convolution_and_norm(stage)
    weight, bias = _folded(convolution.weight, norm)
    relu_after = isinstance(stage[-1], nn.ReLU)
    return Convolution(weight, bias, convolution.stride[0], relu_after=relu_after)


def _convolution_and_norm(stage: nn.Sequential) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    convolution, norm = (layer for layer in stage if not isinstance(layer, nn.ReLU))
    assert isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
    return convolution, norm


def _folded(weight: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """weight: (c_out, ...) of a convolution without bias. Returns its weight and bias."""
    scale, shift = _scale_and_shift(norm)
    return _scaled(weight, scale), shift.to(weight.dtype)


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight.detach().double() * scale.view(-1, 1, 1, 1)).to(weight.dtype)


def _scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """float64 (channels,) each."""
    assert norm.running_mean is not None and norm.running_var is not None
    deviation = (norm.running_var.double() + norm.eps).sqrt()
    scale = norm.weight.detach().double() / deviation
    return scale, norm.bias.detach().double() - norm.running_mean.double() * scale
