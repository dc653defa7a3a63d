"""Resizing by kernels, registered with torch: `lgcnet_fast::concat_upsample`, `::sum_upsample`.

Both take the backend whose kernels run, so that shapes and gradients are stated once. Sizes of
several maps are one list, as torch's schemas have no list of pairs: height, width, height, ...
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from lgcnet_fast.ops.backend import Implementation
from lgcnet_fast.ops.maps import empty_nhwc, nhwc
from lgcnet_fast.ops.tuning import shape_key, tuned

Size = tuple[int, int]
Shape = Sequence[int]

_LARGEST = 32768
"""Side of a map beyond which the kernels' 32-bit products would overflow."""
_MOST_MAPS = 4
"""That one Triton launch takes."""


def resize_key(dtype: torch.dtype, maps: Sequence[Shape], size: Shape) -> str:
    """Of the launches here in tuning tables: shapes (N, C_i, h_i, w_i) of the maps, full size.

    The operations there are concat_upsample, sum_upsample and both with _backward; `upsample` is
    the concatenation of one map. The backward sum leaves out maps of the full size.
    """
    return shape_key(dtype, *maps, size)


# -- forward --------------------------------------------------------------------------------------


@custom_op(
    "lgcnet_fast::concat_upsample",
    mutates_args=(),
    schema="(Tensor[] maps, int[] size, str backend) -> Tensor",
)
def _concat(maps: Sequence[Tensor], size: Shape, backend: str) -> Tensor:
    maps = [nhwc(x) for x in maps]
    if backend == "cuda":
        from lgcnet_fast.native import upsample as native

        return native.concat_upsample_forward(maps, _pair(size))
    from lgcnet_fast.kernels.concat_upsample import FORWARD, concat_upsample_forward

    key = resize_key(maps[0].dtype, [x.shape for x in maps], size)
    config = tuned(FORWARD, "concat_upsample", key, maps[0].device)
    return concat_upsample_forward(maps, _pair(size), config=config)


@custom_op(
    "lgcnet_fast::sum_upsample",
    mutates_args=(),
    schema="(Tensor[] maps, int[] size, str backend) -> Tensor",
)
def _sum(maps: Sequence[Tensor], size: Shape, backend: str) -> Tensor:
    maps = [nhwc(x) for x in maps]
    if backend == "cuda":
        from lgcnet_fast.native import upsample as native

        return reduce(Tensor.add_, (native.upsample_forward(x, _pair(size)) for x in maps))
    from lgcnet_fast.kernels.concat_upsample import FORWARD, sum_upsample_forward

    key = resize_key(maps[0].dtype, [x.shape for x in maps], size)
    config = tuned(FORWARD, "sum_upsample", key, maps[0].device)
    return sum_upsample_forward(maps, _pair(size), config=config)


@_concat.register_fake
def _(maps: Sequence[Tensor], size: Shape, backend: str) -> Tensor:
    return empty_nhwc(maps[0], (len(maps[0]), sum(x.shape[1] for x in maps), *size))


@_sum.register_fake
def _(maps: Sequence[Tensor], size: Shape, backend: str) -> Tensor:
    return empty_nhwc(maps[0], (*maps[0].shape[:2], *size))


# -- backward -------------------------------------------------------------------------------------


@custom_op(
    "lgcnet_fast::concat_upsample_backward",
    mutates_args=(),
    schema="(Tensor grad, int[] channels, int[] sizes, str backend) -> Tensor[]",
)
def _concat_backward(grad: Tensor, channels: Shape, sizes: Shape, backend: str) -> list[Tensor]:
    grad, pairs = nhwc(grad), _pairs(sizes)
    if backend == "cuda":
        from lgcnet_fast.native import upsample as native

        return native.concat_upsample_backward(grad, channels, pairs)
    from lgcnet_fast.kernels.concat_upsample_backward import BACKWARD, concat_upsample_backward

    maps = [(len(grad), c, *size) for c, size in zip(channels, pairs, strict=True)]
    key = resize_key(grad.dtype, maps, grad.shape[2:])
    config = tuned(BACKWARD, "concat_upsample_backward", key, grad.device)
    return concat_upsample_backward(grad, channels, pairs, config=config)


@custom_op(
    "lgcnet_fast::sum_upsample_backward",
    mutates_args=(),
    schema="(Tensor grad, int[] sizes, str backend) -> Tensor[]",
)
def _sum_backward(grad: Tensor, sizes: Shape, backend: str) -> list[Tensor]:
    grad, pairs = nhwc(grad), _pairs(sizes)
    if backend == "cuda":
        from lgcnet_fast.native import upsample as native

        return [native.upsample_backward(grad, size) for size in pairs]
    from lgcnet_fast.kernels.concat_upsample_backward import BACKWARD, sum_upsample_backward

    maps = [(*grad.shape[:2], *size) for size in pairs]
    key = resize_key(grad.dtype, maps, grad.shape[2:])
    config = tuned(BACKWARD, "sum_upsample_backward", key, grad.device)
    return sum_upsample_backward(grad, pairs, config=config)


@_concat_backward.register_fake
def _(grad: Tensor, channels: Shape, sizes: Shape, backend: str) -> list[Tensor]:
    return [
        empty_nhwc(grad, (len(grad), c, *size))
        for c, size in zip(channels, _pairs(sizes), strict=True)
    ]


@_sum_backward.register_fake
def _(grad: Tensor, sizes: Shape, backend: str) -> list[Tensor]:
    return [empty_nhwc(grad, (*grad.shape[:2], *size)) for size in _pairs(sizes)]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    maps, _, ctx.backend = inputs
    ctx.channels = [x.shape[1] for x in maps]
    ctx.sizes = [_pair(x.shape[2:]) for x in maps]


def _concat_gradients(ctx: Any, grad: Tensor) -> tuple[list[Tensor], None, None]:
    flat = [length for size in ctx.sizes for length in size]
    return _concat_backward(grad, ctx.channels, flat, ctx.backend), None, None


def _sum_gradients(ctx: Any, grad: Tensor) -> tuple[list[Tensor], None, None]:
    grad, full = nhwc(grad), _pair(grad.shape[2:])
    resized = [size for size in ctx.sizes if size != full]
    flat = [length for size in resized for length in size]
    gradients = iter(_sum_backward(grad, flat, ctx.backend) if resized else ())
    return [grad if size == full else next(gradients) for size in ctx.sizes], None, None


_concat.register_autograd(_concat_gradients, setup_context=_remember)
_sum.register_autograd(_sum_gradients, setup_context=_remember)


# -- implementations ------------------------------------------------------------------------------


def refuse_resize(backend: str, maps: Tensor | Sequence[Tensor], size: Shape) -> str | None:
    """Why the kernels of `backend` cannot resize these maps."""
    maps = [maps] if isinstance(maps, Tensor) else maps
    longest = max(*size, *(length for x in maps for length in x.shape[2:]))
    if longest > _LARGEST:
        return f"a side of {longest} pixels, at most {_LARGEST} fit"
    if backend == "triton" and len(maps) > _MOST_MAPS:
        return f"{len(maps)} maps, a launch takes {_MOST_MAPS}"
    if backend == "cuda" and torch.float64 in (x.dtype for x in maps):
        return "its kernels have no float64"
    return None


def _upsampled(backend: str, x: Tensor, size: Shape) -> Tensor:
    return _concat([x], size, backend)


def _concatenated(backend: str, maps: Sequence[Tensor], size: Shape) -> Tensor:
    return _concat(_of_one_dtype(maps), size, backend)


def _summed(backend: str, maps: Sequence[Tensor], size: Shape) -> Tensor:
    return _sum(_of_one_dtype(maps), size, backend)


def _forms(run: Callable[..., Tensor]) -> dict[str, Implementation]:
    return {
        backend: Implementation(partial(run, backend), partial(refuse_resize, backend))
        for backend in ("triton", "cuda")
    }


UPSAMPLE = _forms(_upsampled)
CONCAT_UPSAMPLE = _forms(_concatenated)
SUM_UPSAMPLE = _forms(_summed)


def _of_one_dtype(maps: Sequence[Tensor]) -> list[Tensor]:
    widest = reduce(torch.promote_types, (x.dtype for x in maps))
    return [x.to(widest) for x in maps]


def _pair(size: Shape) -> Size:
    height, width = size
    return height, width


def _pairs(sizes: Shape) -> list[Size]:
    return list(zip(sizes[::2], sizes[1::2], strict=True))
