"""`separable_branches` by kernels, registered with torch: `lgcnet_fast::separable_branches`.

It takes the backend of the depthwise kernels (see depthwise_kernels.py). The pointwise products are
one batched matrix product a stack: in NHWC memory a depthwise map is a (positions, C) matrix. The
backward pass computes the depthwise maps again, multiplies for the pointwise gradients and for
those of the depthwise maps, and ends in the gradients of x and of the depthwise weights.

Traffic in maps of the output's size, with B branches, C_out = C and stride 1: forward reads
B + 1 and writes 2 B, backward reads 5 B + 3 and writes 2 B + 1. B depthwise maps are in memory
until the end of each pass, none between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from lgcnet_fast.ops.backend import Implementation
from lgcnet_fast.ops.depthwise_kernels import depthwise_gradients, filtered_maps
from lgcnet_fast.ops.maps import dtype_refusal, empty_nhwc, nhwc


def refuse(
    backend: str,
    x: Tensor,
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    dilations: Sequence[int],
    stride: int,
    stacks: Sequence[int],
) -> str | None:
    """Why the kernels of `backend` cannot serve these arguments of `separable_branches`."""
    if backend == "cuda" and x.dtype == torch.float64:
        return "its kernels have no float64"
    return dtype_refusal("x", x)


def run(
    backend: str,
    x: Tensor,
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    dilations: Sequence[int],
    stride: int,
    stacks: Sequence[int],
) -> list[list[Tensor]]:
    """`separable_branches`, see there: one stack of maps in each list."""
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    maps: list[Tensor] = _separable_branches(
        nhwc(x.to(dtype)),
        _stacked(depthwise),
        _stacked(pointwise).flatten(2),
        list(dilations),
        stride,
        list(stacks),
        backend,
    )
    return [[stack] for stack in maps]


def _stacked(weights: Sequence[Tensor]) -> Tensor:
    return weights[0][None] if len(weights) == 1 else torch.stack(list(weights))


def _windows(depthwise: Tensor, branches: int) -> Tensor:
    """Weights (B, C, 1, 3, 3) as the kernels take them: (edges, branches an edge, 3, 3, C)."""
    windows = depthwise.flatten(2).transpose(1, 2).contiguous()
    return windows.view(-1, branches, 3, 3, windows.shape[-1])


def _matrices(stack: Tensor) -> Tensor:
    """NHWC maps (..., N, C, H, W), the outer dimensions as one: (B, N H W, C), a view."""
    images, channels, height, width = stack.shape[-4:]
    return stack.movedim(-3, -1).reshape(-1, images * height * width, channels)


def _output_shape(x: Tensor, pointwise: Tensor, stride: int) -> tuple[int, int, int, int]:
    images, _, height, width = x.shape
    return images, pointwise.shape[1], -(-height // stride), -(-width // stride)


@custom_op(
    "lgcnet_fast::separable_branches",
    mutates_args=(),
    schema="(Tensor x, Tensor depthwise, Tensor pointwise, int[] dilations, int stride, "
    "int[] stacks, str backend) -> Tensor[]",
)
def _separable_branches(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    dilations: Sequence[int],
    stride: int,
    stacks: Sequence[int],
    backend: str,
) -> list[Tensor]:
    """depthwise: (B, C, 1, 3, 3), pointwise: (B, C_out, C); a stack (b, N, C_out, H', W') each."""
    windows = _windows(depthwise, len(dilations))
    filtered = _matrices(filtered_maps(backend, x, windows, dilations, stride))
    shape = _output_shape(x, pointwise, stride)
    products = pointwise.to(x.dtype).split(stacks)
    outputs = []
    for matrices, weights in zip(filtered.split(stacks), products, strict=True):
        out = empty_nhwc(x, (len(weights), *shape))
        torch.bmm(matrices, weights.transpose(1, 2), out=_matrices(out))
        outputs.append(out)
    return outputs


@_separable_branches.register_fake
def _(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    dilations: Sequence[int],
    stride: int,
    stacks: Sequence[int],
    backend: str,
) -> list[Tensor]:
    shape = _output_shape(x, pointwise, stride)
    return [empty_nhwc(x, (count, *shape)) for count in stacks]


@custom_op(
    "lgcnet_fast::separable_branches_backward",
    mutates_args=(),
    schema="(Tensor[] gradients, Tensor x, Tensor depthwise, Tensor pointwise, int[] dilations, "
    "int stride, str backend) -> (Tensor, Tensor, Tensor)",
)
def _separable_branches_backward(
    gradients: list[Tensor],
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    dilations: Sequence[int],
    stride: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, depthwise and pointwise from those of the stacks."""
    windows = _windows(depthwise, len(dilations))
    stacks = [len(g) for g in gradients]
    filtered = filtered_maps(backend, x, windows, dilations, stride)
    d_pointwise = torch.empty_like(pointwise, dtype=_accumulator(x.dtype))
    for g, maps, out in zip(
        gradients, filtered.flatten(0, 1).split(stacks), d_pointwise.split(stacks), strict=True
    ):
        _product_gradient(g, maps, out)
    # The gradients of the depthwise maps take the place of the maps, now that these have served.
    d_filtered = filtered
    products = pointwise.to(x.dtype).split(stacks)
    for g, weights, out in zip(
        gradients, products, _matrices(d_filtered).split(stacks), strict=True
    ):
        torch.bmm(_matrices(g), weights, out=out)
    dx, d_windows = depthwise_gradients(backend, d_filtered, x, windows, dilations, stride)
    d_depthwise = d_windows.flatten(0, 1).flatten(1, 2).transpose(1, 2).contiguous()
    d_depthwise = d_depthwise.view_as(depthwise).to(depthwise.dtype)
    return dx, d_depthwise, d_pointwise.to(pointwise.dtype)


@_separable_branches_backward.register_fake
def _(
    gradients: list[Tensor],
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    dilations: Sequence[int],
    stride: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = empty_nhwc(x, x.shape)
    return dx, torch.empty_like(depthwise), torch.empty_like(pointwise)


def _product_gradient(g: Tensor, maps: Tensor, out: Tensor) -> None:
    """out (b, C_out, C): sum over the positions of g times the depthwise maps, both stacks of b.

    The positions far outnumber the entries of the result, so they are cut into parts, whose
    products run side by side and are added in the accumulator's dtype.
    """
    images, _, height, width = g.shape[-4:]
    parts = images * _row_groups(height, width)
    products = torch.bmm(
        _matrices(g).unflatten(1, (parts, -1)).flatten(0, 1).transpose(1, 2),
        _matrices(maps).unflatten(1, (parts, -1)).flatten(0, 1),
    )
    torch.sum(products.unflatten(0, (-1, parts)), 1, dtype=out.dtype, out=out)


def _row_groups(height: int, width: int) -> int:
    """Equal groups of rows of a map, as many as leave each at least POSITIONS_A_PART positions."""
    most = max(1, height * width // POSITIONS_A_PART)
    return max(groups for groups in range(1, most + 1) if height % groups == 0)


POSITIONS_A_PART = 1024
"""Long enough for a matrix product to run at speed."""


def _accumulator(storage: torch.dtype) -> torch.dtype:
    return torch.float64 if storage == torch.float64 else torch.float32


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, depthwise, pointwise, ctx.dilations, ctx.stride, _, ctx.backend = inputs
    ctx.save_for_backward(x, depthwise, pointwise)


def _backward(ctx: Any, gradients: list[Tensor]) -> tuple[Any, ...]:
    gradients = [nhwc(g) for g in gradients]
    settings = (ctx.dilations, ctx.stride, ctx.backend)
    found = _separable_branches_backward(gradients, *ctx.saved_tensors, *settings)
    return *found, None, None, None, None


_separable_branches.register_autograd(_backward, setup_context=_keep)
FORMS = {
    backend: Implementation(partial(run, backend), partial(refuse, backend))
    for backend in ("triton", "cuda")
}
