"""Depthwise 3x3 convolutions behind a batch norm and a ReLU, and their gradients: NHWC, stride 1.

Several edges, each with a map, a norm and a window of its own, take one launch. Of an edge, with
r_c the inverse deviation and M = N H W positions,

    yhat[m, c] = r_c (x[m, c] - mean_c)
    y[n, i, j, c] = sum_{u, v} w[u, v, c] relu(yhat[n, i + u, j + v, c])

with u, v in {-1, 0, 1}. Padding is zero behind the ReLU, so minus infinity is what lies outside x.
With g = dy, the gradient of yhat and that of the window are as in depthwise_backward.py, and the
sums that the norm's own gradient needs are made on the way:

    e = dyhat,   S0[c] = sum e,   S1[c] = sum e yhat
    dx = r_c (e - S0 / M - yhat S1 / M)

The kernels walk down a tile of columns as those of depthwise.py and depthwise_backward.py do.

Least traffic of an edge, in maps: forward 2, backward 3 and then 3 for the norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.common import (
    accumulator,
    accumulator_dtype,
    check_dense,
    empty_map,
    sum_rows,
)
from lgcnet_fast.kernels.depthwise import LARGE, ForwardConfig, default_block, load_weight_row
from lgcnet_fast.kernels.depthwise import _walk as _walk_forward
from lgcnet_fast.kernels.depthwise_backward import _walk as _walk_backward
from lgcnet_fast.kernels.depthwise_weight_grad import WeightGradConfig, _store_share
from lgcnet_fast.kernels.launches import kernel, wait_for_predecessor
from lgcnet_fast.kernels.mixed_sum import SMALL, TileConfig, check_maps, load_runs, tile_of
from lgcnet_fast.kernels.slabs import pointer_of

Norm = tuple[Tensor, Tensor]
"""Mean and inverse deviation of the channels of each edge, (E, C) in the accumulator's dtype."""


@triton.jit
def _load_norm(mean_ptr, r_ptr, offset, inside):
    mean = tl.load(mean_ptr + offset, mask=inside, other=0.0)
    return mean, tl.load(r_ptr + offset, mask=inside, other=1.0)


@kernel(do_not_specialize=["N", "segments"])
def _normalised_forward_kernel(
    x_ptrs, mean_ptr, r_ptr, w_ptr, y_ptr, N, H, W, C, segments,
    EDGES: tl.constexpr, ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: a segment of an image's rows, BLOCK_P columns, BLOCK_C channels."""
    wait_for_predecessor()
    channel_blocks = tl.cdiv(C, BLOCK_C)
    channel = (tl.program_id(0) % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    rest = tl.program_id(0) // channel_blocks
    column_blocks = tl.cdiv(W, BLOCK_P)
    column = (rest % column_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    rest = rest // column_blocks
    image = (rest // segments).to(tl.int64)  # of those of all edges
    edge = rest // segments // N
    rows = tl.cdiv(H, segments)
    norm = _load_norm(mean_ptr, r_ptr, edge * C + channel, channel < C)
    dilation = tl.full((), 1, tl.int32)  # As a tensor: of a constant and W = 1 comes no int64.
    _walk_forward(
        pointer_of(x_ptrs, edge, EDGES) + image % N * H * W * C, norm, w_ptr + edge * 9 * C,
        y_ptr + image * H * W * C, column, channel, rest % segments * rows, rows, dilation, 0, 0,
        H, W, H, W, C, 1, 1, 1, True, True, ACC,
    )  # fmt: skip


@kernel(do_not_specialize=["N", "programs"])
def _normalised_backward_kernel(
    dy_ptrs, x_ptrs, mean_ptr, r_ptr, w_ptr, e_ptr, share_ptr, sums_ptr, N, H, W, C, programs,
    EDGES: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: every `programs`-th walk of an edge, ROWS by BLOCK_P; BLOCK_C channels."""
    wait_for_predecessor()
    channel_blocks = tl.cdiv(C, BLOCK_C)
    channel = (tl.program_id(0) % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    program = tl.program_id(0) // channel_blocks % programs
    edge = tl.program_id(0) // channel_blocks // programs
    inside = channel < C
    w_ptr += edge * 9 * C + channel
    w_top = load_weight_row(w_ptr, 0, inside, C, ACC)
    w_centre = load_weight_row(w_ptr, 1, inside, C, ACC)
    w_bottom = load_weight_row(w_ptr, 2, inside, C, ACC)
    norm = _load_norm(mean_ptr, r_ptr, edge * C + channel, inside)

    dy_ptr, x_ptr = pointer_of(dy_ptrs, edge, EDGES), pointer_of(x_ptrs, edge, EDGES)
    e_ptr += edge.to(tl.int64) * N * H * W * C
    zero = tl.zeros((BLOCK_P, BLOCK_C), dtype=ACC)
    top, centre, bottom = (zero, zero, zero), (zero, zero, zero), (zero, zero, zero)
    sums = (zero, zero)
    reach = tl.full((), 1, tl.int32)  # As in the forward kernel.
    column_blocks = tl.cdiv(W, BLOCK_P)
    pieces = tl.cdiv(H, ROWS)
    for walk in range(program, N * pieces * column_blocks, programs):
        column = walk % column_blocks * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
        row = walk // column_blocks % pieces * ROWS
        start = (walk // column_blocks // pieces).to(tl.int64) * H * W * C
        top, centre, bottom, sums = _walk_backward(
            top, centre, bottom, sums, w_top, w_centre, w_bottom, norm,
            dy_ptr + start, x_ptr + start, e_ptr + start, (column < W) & inside, column, channel,
            row, reach, H, W, H, W, C, 1, ROWS, True, True, ACC,
        )  # fmt: skip

    number = program.to(tl.int64) * EDGES + edge
    _store_share(share_ptr + number * 9 * C + channel, top, centre, bottom, inside, C)
    share = sums_ptr + number * 2 * C + channel
    tl.store(share, tl.sum(sums[0], axis=0)[None, :], mask=inside)
    tl.store(share + C, tl.sum(sums[1], axis=0)[None, :], mask=inside)


@kernel(do_not_specialize=["vectors", "count"])
def _norm_gradients_kernel(
    e_ptr, x_ptrs, mean_ptr, r_ptr, sums_ptr, count, vectors, per_pixel, period,
    EDGES: tl.constexpr, ACC: tl.constexpr,
    LOADS: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """dx in the place of e, on one tile of an edge."""
    wait_for_predecessor()
    first, channel, offsets, masks = tile_of(vectors, per_pixel, period, LOADS, GROUPS, VECTOR)
    edge = tl.program_id(1)
    C = per_pixel * VECTOR
    e_ptr += edge.to(tl.int64) * vectors * VECTOR
    es = load_runs(e_ptr, first, offsets, masks)
    xs = load_runs(pointer_of(x_ptrs, edge, EDGES), first, offsets, masks)
    mean, r = tl.load(mean_ptr + edge * C + channel), tl.load(r_ptr + edge * C + channel)
    share = 1.0 / count.to(ACC)
    shift = tl.load(sums_ptr + 2 * edge * C + channel) * share
    slope = r * tl.load(sums_ptr + (2 * edge + 1) * C + channel) * share
    for load in tl.static_range(LOADS):
        value = r * (es[load].to(ACC) - shift - slope * (xs[load].to(ACC) - mean))
        tl.store(e_ptr + first + offsets[load], value, mask=masks[load])


def normalised_depthwise(
    xs: Sequence[Tensor], weights: Tensor, norm: Norm, config: ForwardConfig | None = None
) -> Tensor:
    """The depthwise convolutions of relu(norm(x)) of E edges: (E, N, C, H, W).

    xs: (N, C, H, W), channels_last; weights: (E, 3, 3, C), contiguous, any float dtype. Every y[e]
    is a dense channels_last map of their dtype. Raises `ValueError` naming the argument at fault.
    """
    _check_arguments(xs, weights, norm)
    edges, (images, channels, height, width) = len(xs), xs[0].shape
    y = empty_map((edges, *xs[0].shape), xs[0])
    config = config or default_forward(xs)
    segments = triton.cdiv(height, config.rows)
    tiles = triton.cdiv(width, config.block_p) * triton.cdiv(channels, config.block_c)
    _normalised_forward_kernel[(edges * images * segments * tiles,)](
        tuple(xs), *norm, weights, y, images, height, width, channels, segments,
        EDGES=edges, ACC=accumulator(y.dtype), BLOCK_P=config.block_p, BLOCK_C=config.block_c,
        num_warps=config.warps,
    )  # fmt: skip
    return y


def default_forward(xs: Sequence[Tensor]) -> ForwardConfig:
    """As of one map with the images of all edges, but for large ones: with the rows that a program
    reads beside its own, 16 are a whole number of AT_ONCE. Measured on an H200."""
    _, channels, height, width = xs[0].shape
    if len(xs) * xs[0].numel() < LARGE:
        return ForwardConfig.default(_one_map(xs), (1,), 1)
    block_p, block_c = default_block(width, channels, spare=1 / 8)
    return ForwardConfig(min(16, height), block_p, block_c, warps=4)


def normalised_depthwise_backward(
    dys: Sequence[Tensor],
    xs: Sequence[Tensor],
    weights: Tensor,
    norm: Norm,
    config: WeightGradConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of yhat, as `normalised_depthwise` gives its maps, and of the weights; S0 and S1.

    dys: a map for each of xs, like it; S0 and S1: (E, 2, C), as the gradient of the weights in the
    accumulator's dtype. config: its programs are those of one edge. Other arguments as in
    `normalised_depthwise`. Raises `ValueError` naming the one at fault.
    """
    _check_arguments(xs, weights, norm)
    _check_each("dys", dys, xs)
    edges, (images, channels, height, width) = len(xs), xs[0].shape
    e = empty_map((edges, *xs[0].shape), xs[0])
    config = config or default_backward(xs)
    shares = e.new_empty(config.programs, *weights.shape, dtype=accumulator_dtype(e.dtype))
    sums = shares.new_empty(config.programs, edges, 2, channels)
    grid = (edges * config.programs * triton.cdiv(channels, config.block_c),)
    _normalised_backward_kernel[grid](
        tuple(dys), tuple(xs), *norm, weights, e, shares, sums, images, height, width, channels,
        config.programs, EDGES=edges, ACC=accumulator(e.dtype), ROWS=config.rows,
        BLOCK_P=config.block_p, BLOCK_C=config.block_c, num_warps=config.warps,
    )  # fmt: skip
    return e, sum_rows(shares), sum_rows(sums, at_once=True)


def default_backward(xs: Sequence[Tensor]) -> WeightGradConfig:
    """As of one map with the images of all edges, which share its programs."""
    default = WeightGradConfig.default(_one_map(xs), (1,), 1)
    return replace(default, programs=triton.cdiv(default.programs, len(xs)))


def norm_gradients(
    e: Tensor, xs: Sequence[Tensor], norm: Norm, sums: Tensor, config: TileConfig | None = None
) -> None:
    """Writes the gradients of xs over e, which `normalised_depthwise_backward` gives.

    sums: S0 and S1, from there. Raises `ValueError` naming the argument at fault.
    """
    check_maps("xs", xs, xs[0] if len(xs) else None)
    _check_each("e", e, xs)
    check_dense("e", e.movedim(2, -1), tuple(e.movedim(2, -1).shape), e)
    _check_norm(norm, xs)
    check_dense("sums", sums, (len(xs), 2, xs[0].shape[1]), e)
    config = config or default_gradients(xs)
    programs, tile = config.launch(xs[0], 1)
    del tile["AHEAD"]
    count = xs[0].numel() // xs[0].shape[1]
    _norm_gradients_kernel[(programs, len(xs))](
        e, tuple(xs), *norm, sums, count, EDGES=len(xs), ACC=accumulator(e.dtype), **tile
    )


def default_gradients(xs: Sequence[Tensor]) -> TileConfig:
    """Measured on an H200."""
    return TileConfig(1 if len(xs) * xs[0].numel() < SMALL else 2, ahead=1, warps=4)


def _one_map(xs: Sequence[Tensor]) -> tuple[int, ...]:
    images, *size = xs[0].shape
    return 1, 1, len(xs) * images, *size


def _check_arguments(xs: Sequence[Tensor], weights: Tensor, norm: Norm) -> None:
    check_maps("xs", xs, xs[0] if len(xs) else None)
    check_dense("weights", weights, (len(xs), 3, 3, xs[0].shape[1]), xs[0])
    _check_norm(norm, xs)


def _check_norm(norm: Norm, xs: Sequence[Tensor]) -> None:
    for name, values in zip(("norm[0]", "norm[1]"), norm, strict=True):
        check_dense(name, values, (len(xs), xs[0].shape[1]), xs[0])


def _check_each(name: str, maps: Sequence[Tensor], xs: Sequence[Tensor]) -> None:
    """Raises `ValueError` unless there is a map like each of xs."""
    if len(maps) != len(xs):
        raise ValueError(f"{name}: {len(maps)} maps, need {len(xs)}")
    check_maps(name, list(maps), xs[0])
