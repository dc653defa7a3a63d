"""Convolutions of concatenations by kernels: `lgcnet_fast::concat_upsample_pointwise`.

Kernels of the backend `cuda` multiply float32 maps from where they lie, after resizing those of
another size. Where neither these nor Triton's serve, the concatenation is written by the kernels of
`concat_upsample` and multiplied by a library, in the backward pass once more, so that it is not
kept.

Least traffic, in elements a position of the output, C channels in all, where all maps have the
output's size: forward C + C_out, backward of Triton's kernels 2 C + C_out.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from lgcnet_fast.ops.backend import Implementation
from lgcnet_fast.ops.fused_resize import refuse_resize
from lgcnet_fast.ops.maps import accumulator, computed_dtype, dtype_refusal, empty_nhwc, nhwc
from lgcnet_fast.ops.pointwise_kernels import (
    map_gradient_by_library,
    product_by_library,
    weight_gradient_by_library,
)
from lgcnet_fast.ops.tuning import shape_key, tuned

Shape = Sequence[int]
_MOST_POSITIONS = 2**31 - 1


def concat_pointwise_key(
    dtype: torch.dtype, maps: Sequence[Shape], size: Shape, out_channels: int
) -> str:
    """Of both launches in tuning tables: shapes (N, C_i, h_i, w_i) of the maps, output's size and
    channels. The operations there are concat_pointwise and concat_pointwise_backward."""
    return shape_key(dtype, *maps, (out_channels, *size))


@custom_op(
    "lgcnet_fast::concat_upsample_pointwise",
    mutates_args=(),
    schema="(Tensor[] maps, int[] size, Tensor weight, bool relu, str backend) -> Tensor",
)
def _forward(
    maps: Sequence[Tensor], size: Shape, weight: Tensor, relu: bool, backend: str
) -> Tensor:
    """maps: of one dtype; weight: of any, rounded to theirs."""
    maps = [nhwc(x) for x in maps]
    if by_cuda_kernel(backend, maps):
        from lgcnet_fast.native import concat_product as native

        return native.concat_product_forward(
            _resized(maps, size), _matrix(weight.to(torch.float32)), relu
        )
    if not _by_kernel(backend, maps[0], weight):
        x = _concatenation(maps, size, relu, backend)
        return product_by_library(x, _matrix(weight.to(x.dtype)))
    from lgcnet_fast.kernels import concat_pointwise as kernel

    channels, dtype = [x.shape[1] for x in maps], maps[0].dtype
    default = kernel.ProductConfig.default(
        channels, len(weight), kernel.resizes(maps, _pair(size)), dtype
    )
    key = concat_pointwise_key(dtype, [x.shape for x in maps], size, len(weight))
    config = tuned(default, "concat_pointwise", key, maps[0].device)
    return kernel.concat_pointwise(maps, _matrix(weight), _pair(size), relu, config)


@_forward.register_fake
def _(maps: Sequence[Tensor], size: Shape, weight: Tensor, relu: bool, backend: str) -> Tensor:
    return empty_nhwc(maps[0], (len(maps[0]), len(weight), *size))


@custom_op(
    "lgcnet_fast::concat_upsample_pointwise_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor[] maps, int[] size, Tensor weight, bool relu, str backend)"
        " -> Tensor[]"
    ),
)
def _backward(
    grad: Tensor, maps: Sequence[Tensor], size: Shape, weight: Tensor, relu: bool, backend: str
) -> list[Tensor]:
    """Of the maps, then of the weight, in the accumulator's dtype."""
    grad, maps = nhwc(grad), [nhwc(x) for x in maps]
    if by_cuda_kernel(backend, maps):
        return _gradients_by_cuda_kernel(grad, maps, size, weight, relu)
    if not _by_kernel(backend, grad, weight):
        return _gradients_by_library(grad, maps, size, weight, relu, backend)
    from lgcnet_fast.kernels import concat_pointwise_backward as kernel

    default = kernel.default_config(maps, len(weight), _pair(size))
    key = concat_pointwise_key(grad.dtype, [x.shape for x in maps], size, len(weight))
    config = tuned(default, "concat_pointwise_backward", key, grad.device)
    dxs, dw = kernel.concat_pointwise_backward(
        grad, maps, _matrix(weight), _pair(size), relu, config
    )
    return [*dxs, dw.view(weight.shape)]


@_backward.register_fake
def _(
    grad: Tensor, maps: Sequence[Tensor], size: Shape, weight: Tensor, relu: bool, backend: str
) -> list[Tensor]:
    dw = weight.new_empty(weight.shape, dtype=accumulator(grad.dtype))
    return [*(empty_nhwc(x, x.shape) for x in maps), dw]


def _gradients_by_cuda_kernel(
    grad: Tensor, maps: Sequence[Tensor], size: Shape, weight: Tensor, relu: bool
) -> list[Tensor]:
    from lgcnet_fast.native import concat_product, upsample

    matrix = _matrix(weight.to(torch.float32))
    gradients, dw = concat_product.concat_product_backward(grad, _resized(maps, size), matrix, relu)
    dxs = [
        dx if x.shape == dx.shape else upsample.upsample_backward(dx, _pair(x.shape[2:]))
        for x, dx in zip(maps, gradients, strict=True)
    ]
    return [*dxs, dw.view(weight.shape)]


def _resized(maps: Sequence[Tensor], size: Shape) -> list[Tensor]:
    """By the backend `cuda`, where they have another size."""
    from lgcnet_fast.native import upsample

    size = _pair(size)
    return [x if _pair(x.shape[2:]) == size else upsample.upsample_forward(x, size) for x in maps]


def _gradients_by_library(
    grad: Tensor, maps: Sequence[Tensor], size: Shape, weight: Tensor, relu: bool, backend: str
) -> list[Tensor]:
    x = _concatenation(maps, size, relu, backend)
    dx = map_gradient_by_library(grad, _matrix(weight.to(x.dtype)))
    dw = weight_gradient_by_library(grad, x)
    if relu:
        torch.ops.aten.threshold_backward.grad_input(dx, x, 0, grad_input=dx)
    channels = [part.shape[1] for part in maps]
    sizes = [length for part in maps for length in part.shape[2:]]
    dxs = torch.ops.lgcnet_fast.concat_upsample_backward(dx, channels, sizes, backend)
    return [*dxs, dw.view(weight.shape)]


def _concatenation(maps: Sequence[Tensor], size: Shape, relu: bool, backend: str) -> Tensor:
    x: Tensor = torch.ops.lgcnet_fast.concat_upsample(maps, size, backend)
    return torch.relu_(x) if relu else x


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    maps, ctx.size, weight, ctx.relu, ctx.backend = inputs
    ctx.save_for_backward(*maps, weight)


def _gradients(ctx: Any, grad: Tensor) -> tuple[list[Tensor], None, Tensor, None, None]:
    *maps, weight = ctx.saved_tensors
    *dxs, dw = _backward(grad, maps, ctx.size, weight, ctx.relu, ctx.backend)
    return dxs, None, dw.to(weight.dtype), None, None


_forward.register_autograd(_gradients, setup_context=_remember)


def _run(backend: str, maps: Sequence[Tensor], size: Shape, weight: Tensor, relu: bool) -> Tensor:
    widest = reduce(torch.promote_types, (computed_dtype(x) for x in maps))
    return _forward([x.to(widest) for x in maps], size, weight, relu, backend)


def _refuse(
    backend: str, maps: Sequence[Tensor], size: Shape, weight: Tensor, relu: bool
) -> str | None:
    positions = len(maps[0]) * size[0] * size[1]
    if positions > _MOST_POSITIONS:
        return f"{positions} positions, at most {_MOST_POSITIONS} fit"
    for index, x in enumerate(maps):
        refusal = dtype_refusal(f"maps[{index}]", x)
        if refusal is not None:
            return refusal
    return refuse_resize(backend, maps, size)


def _by_kernel(backend: str, x: Tensor, weight: Tensor) -> bool:
    if backend != "triton":
        return False
    from lgcnet_fast.kernels.concat_pointwise import serves

    return serves(x, len(weight))


def by_cuda_kernel(backend: str, maps: Sequence[Tensor]) -> bool:
    """Whether kernels multiply maps that are not written side by side; resized ones are written.

    In half precision a library's products have tensor cores, on GPUs that have some.
    """
    if backend != "cuda":
        return False
    from lgcnet_fast.native.mixed_sum import MAX_MAPS

    return maps[0].dtype == torch.float32 and len(maps) <= MAX_MAPS


def _matrix(weight: Tensor) -> Tensor:
    """(C_out, C) of a convolution's weight."""
    return weight.flatten(1).contiguous()


def _pair(size: Shape) -> tuple[int, int]:
    height, width = size
    return height, width


CONCAT_UPSAMPLE_POINTWISE = {
    backend: Implementation(partial(_run, backend), partial(_refuse, backend))
    for backend in ("triton", "cuda")
}
