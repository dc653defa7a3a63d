"""The terms of a tile: what one edge of a network adds to the pixels that a program computes.

A program owns P = BLOCK_H x BLOCK_W pixels of one image and keeps their sum over all terms in
registers. Of a node with a TRANSPOSED term it owns every second pixel of a row and of a column, all
of which the same taps reach. Every term reads a dense NHWC map of its own size (h, w) and pixel
pitch; zero padding is a masked load. Kinds, with r = ReLU or the identity and (i, j) an output
pixel:

    COPY         x[i, j]
    POOL         max of x[s i + u, s j + v], u, v in {-1, 0, 1}, within the map
    SEPARABLE    sum_c p[c, n] sum_{u, v} d[u, v, c] r(x[s i + u d, s j + v d, c])
    CONVOLUTION  sum_{u, v, c} w[u, v, c, n] r(x[s i + u d, s j + v d, c])
    INTERLEAVED  sum_{t, c} w[t, c, n] r(x[2 i + t, 2 j + t, c]), t in {0, 1}
    TRANSPOSED   sum_{u, v, c} w[u, v, c, n] r(x[(i + 1 - u) / 2, (j + 1 - v) / 2, c]), u, v in
                 {0, 1, 2}, where both quotients are whole
    RESIZED      x at (i, j), bilinear with aligned corners (see bilinear.py)
    RESIZED_PRODUCT  sum_c w[c, n] r(x at (i, j))

Sums are in float32. Matrix products take operands rounded to the storage dtype, `DOT` being that
dtype on a GPU and float32 in the interpreter, which has no bfloat16 products.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lgcnet_fast.kernels.bilinear import beyond, lower_input

COPY = tl.constexpr(0)
POOL = tl.constexpr(1)
SEPARABLE = tl.constexpr(2)
CONVOLUTION = tl.constexpr(3)
INTERLEAVED = tl.constexpr(4)
TRANSPOSED = tl.constexpr(5)
RESIZED = tl.constexpr(6)
RESIZED_PRODUCT = tl.constexpr(7)


@triton.jit
def rectified(x, RELU: tl.constexpr):
    """ReLU that keeps NaN, so that a read of unwritten memory shows."""
    if RELU:
        # A plain 0.0 would make float32 of x: twice the instructions for half precision.
        x = tl.maximum(x, tl.zeros_like(x), propagate_nan=tl.PropagateNan.ALL)
    return x


@triton.jit
def channels_below(channel, C: tl.constexpr, BLOCK: tl.constexpr):
    """(1, BLOCK) mask of the channels that exist, for one block or a multiple of it."""
    if C % BLOCK == 0:
        return tl.full((1, BLOCK), 1, tl.int1)
    else:
        return (channel < C)[None, :]


@triton.jit
def load_weights(
    w_ptr, k, n, K: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr
):
    """(BLOCK_K, BLOCK_N): rows k and columns n of a matrix (K, N), 0 beyond it."""
    mask = tl.trans(channels_below(k, K, BLOCK_K)) & channels_below(n, N, BLOCK_N)
    return tl.load(w_ptr + k[:, None] * N + n[None, :], mask=mask, other=0.0)


@triton.jit
def multiply(total, x, w, STORAGE: tl.constexpr, DOT: tl.constexpr):
    """total + x w, from operands in the storage dtype. Never in TF32."""
    return tl.dot(x.to(STORAGE).to(DOT), w.to(DOT), total, input_precision="ieee")


@triton.jit
def tap_pixel(
    row, column, u, v, KIND: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr,
    SIDE: tl.constexpr,
):  # fmt: skip
    """Row and column that tap (u, v) of a window reads; negative where it reads nothing."""
    if KIND == INTERLEAVED:
        return 2 * row + u, 2 * column + v
    else:
        start: tl.constexpr = (SIDE // 2) * DILATION
        return STRIDE * row + (u * DILATION - start), STRIDE * column + (v * DILATION - start)


@triton.jit
def pixel_offsets(image, row, column, inside, h, w, PITCH: tl.constexpr):
    """(P, 1) offsets of pixels in a map, and which of them lie in it."""
    valid = inside & (row >= 0) & (row < h) & (column >= 0) & (column < w)
    return (((image * h + row) * w + column) * PITCH)[:, None], valid[:, None]


@triton.jit
def copied(
    x_ptr, image, row, column, inside, channel, h, w, C: tl.constexpr, PITCH: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    offset, valid = pixel_offsets(image, row, column, inside, h, w, PITCH)
    mask = valid & channels_below(channel, C, BLOCK_N)
    return tl.load(x_ptr + (offset + channel[None, :]), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def pooled(
    x_ptr, image, row, column, inside, channel, h, w, C: tl.constexpr, PITCH: tl.constexpr,
    STRIDE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Pixels outside the image give minus infinity, which is not stored."""
    largest = tl.full((row.shape[0], BLOCK_N), float("-inf"), tl.float32)
    exists = channels_below(channel, C, BLOCK_N)
    for u in tl.range(3, num_stages=1):
        for v in tl.static_range(3):
            in_row, in_column = tap_pixel(row, column, u, v, POOL, STRIDE, 1, 3)
            offset, valid = pixel_offsets(image, in_row, in_column, inside, h, w, PITCH)
            x = tl.load(
                x_ptr + (offset + channel[None, :]), mask=valid & exists, other=float("-inf")
            ).to(tl.float32)
            largest = tl.maximum(largest, x, propagate_nan=tl.PropagateNan.ALL)
    return largest


@triton.jit
def filtered(
    x_ptr, d_ptr, image, row, column, inside, k, h, w, C: tl.constexpr, PITCH: tl.constexpr,
    STRIDE: tl.constexpr, DILATION: tl.constexpr, BLOCK_K: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """(P, BLOCK_K): the depthwise 3x3 filter of the ReLU of channels k; d: (9, C) float32.

    TAPS: that are on their way at once. 3: into registers; 9: all of them, into shared memory.
    """
    total = tl.zeros((row.shape[0], BLOCK_K), tl.float32)
    # Unrolled rows would be computed in the layout of the product's operand: by all of its warps.
    for u in tl.range(3, num_stages=TAPS // 3):
        total = _add_filter_row(
            total, x_ptr, d_ptr, image, row, column, inside, k, h, w, u,
            C, PITCH, STRIDE, DILATION, BLOCK_K,
        )  # fmt: skip
    return total


@triton.jit
def _add_filter_row(
    total, x_ptr, d_ptr, image, row, column, inside, k, h, w, u,
    C: tl.constexpr, PITCH: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """total + row u of a depthwise filter."""
    exists = channels_below(k, C, BLOCK_K)
    for v in tl.static_range(3):
        in_row, in_column = tap_pixel(row, column, u, v, SEPARABLE, STRIDE, DILATION, 3)
        offset, valid = pixel_offsets(image, in_row, in_column, inside, h, w, PITCH)
        x = tl.load(x_ptr + (offset + k[None, :]), mask=valid & exists, other=0.0)
        weight = tl.load(d_ptr + ((3 * u + v) * C + k)[None, :], mask=exists, other=0.0)
        total += rectified(x, True).to(tl.float32) * weight
    return total


@triton.jit
def resized(
    x_ptr, image, row, column, inside, channel, h, w, height, width, C: tl.constexpr,
    PITCH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(P, BLOCK) of a map (h, w) resized to (height, width)."""
    mask = inside[:, None] & channels_below(channel, C, BLOCK)
    row = tl.minimum(row, height - 1)
    column = tl.minimum(column, width - 1)
    i = lower_input(row, h, height)
    j = lower_input(column, w, width)
    f = beyond(row, i, h, height, tl.float32)[:, None]
    g = beyond(column, j, w, width, tl.float32)[:, None]
    upper = x_ptr + (((image * h + i) * w + j) * PITCH)[:, None] + channel[None, :]
    lower = upper + ((tl.minimum(i + 1, h - 1) - i) * w * PITCH)[:, None]
    right = ((tl.minimum(j + 1, w - 1) - j) * PITCH)[:, None]
    upper_left = tl.load(upper, mask=mask, other=0.0).to(tl.float32)
    upper_right = tl.load(upper + right, mask=mask, other=0.0).to(tl.float32)
    lower_left = tl.load(lower, mask=mask, other=0.0).to(tl.float32)
    lower_right = tl.load(lower + right, mask=mask, other=0.0).to(tl.float32)
    above = upper_left + g * (upper_right - upper_left)
    below = lower_left + g * (lower_right - lower_left)
    return above + f * (below - above)


@triton.jit
def add_convolution(
    total, x_ptr, w_ptr, image, row, column, inside, n, h, w,
    KIND: tl.constexpr, C: tl.constexpr, PITCH: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, SIDE: tl.constexpr, RELU: tl.constexpr, N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, STORAGE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """total + the products of every tap and block of input channels: one loop, to be pipelined.

    SIDE: 1 or 3, of the window; the 2 taps of INTERLEAVED lie on the diagonal of a window of 2.
    """
    steps: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    taps: tl.constexpr = 2 if KIND == INTERLEAVED else SIDE * SIDE
    for step in range(taps * steps):
        tap = step // steps
        k = (step % steps) * BLOCK_K + tl.arange(0, BLOCK_K)
        if KIND == INTERLEAVED:
            in_row, in_column = tap_pixel(row, column, tap, tap, KIND, STRIDE, DILATION, SIDE)
        else:
            in_row, in_column = tap_pixel(
                row, column, tap // SIDE, tap % SIDE, KIND, STRIDE, DILATION, SIDE
            )
        offset, valid = pixel_offsets(image, in_row, in_column, inside, h, w, PITCH)
        mask = valid & channels_below(k, C, BLOCK_K)
        x = rectified(tl.load(x_ptr + (offset + k[None, :]), mask=mask, other=0.0), RELU)
        weight = load_weights(w_ptr + tap * (C * N), k, n, C, N, BLOCK_K, BLOCK_N)
        total = multiply(total, x, weight, STORAGE, DOT)
    return total


@triton.jit
def add_transposed(
    total, x_ptr, w_ptr, image, row, column, odd_row, odd_column, inside, n, h, w,
    C: tl.constexpr, PITCH: tl.constexpr, RELU: tl.constexpr, N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, STORAGE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """total + the products of the 1 to 4 taps that reach pixels whose rows and columns are all odd
    (1) or all even (0)."""
    steps: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    across = 1 + odd_column
    for step in range((1 + odd_row) * across * steps):
        tap = step // steps
        k = (step % steps) * BLOCK_K + tl.arange(0, BLOCK_K)
        # Odd positions take taps 0 and 2, even ones tap 1.
        u = 1 - odd_row + 2 * (tap // across)
        v = 1 - odd_column + 2 * (tap % across)
        in_row, in_column = (row + 1 - u) >> 1, (column + 1 - v) >> 1
        offset, valid = pixel_offsets(image, in_row, in_column, inside, h, w, PITCH)
        mask = valid & channels_below(k, C, BLOCK_K)
        x = rectified(tl.load(x_ptr + (offset + k[None, :]), mask=mask, other=0.0), RELU)
        weight = load_weights(w_ptr + (3 * u + v) * (C * N), k, n, C, N, BLOCK_K, BLOCK_N)
        total = multiply(total, x, weight, STORAGE, DOT)
    return total


@triton.jit
def add_separable(
    total, x_ptr, d_ptr, p_ptr, image, row, column, inside, n, h, w,
    C: tl.constexpr, PITCH: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr,
    N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, TAPS: tl.constexpr,
    STORAGE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """total + pointwise product of the ReLU and depthwise filter; p: (C, N)."""
    for first in tl.range(0, C, BLOCK_K, num_stages=1):
        k = first + tl.arange(0, BLOCK_K)
        # On their way while the filter waits for the map.
        weight = load_weights(p_ptr, k, n, C, N, BLOCK_K, BLOCK_N)
        x = filtered(
            x_ptr, d_ptr, image, row, column, inside, k, h, w, C, PITCH, STRIDE, DILATION,
            BLOCK_K, TAPS,
        )  # fmt: skip
        total = multiply(total, x, weight, STORAGE, DOT)
    return total


@triton.jit
def add_resized_product(
    total, x_ptr, w_ptr, image, row, column, inside, n, h, w, height, width,
    C: tl.constexpr, PITCH: tl.constexpr, RELU: tl.constexpr, N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, STORAGE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """total + the 1x1 convolution of a map that is resized on the way."""
    # Loads of a pipelined loop pass the L1 cache by, and all programs read the same few pixels of
    # a pooled map: up to 230 us more for 193x385 pixels on an H200.
    for first in tl.range(0, C, BLOCK_K, num_stages=1):
        k = first + tl.arange(0, BLOCK_K)
        x = resized(x_ptr, image, row, column, inside, k, h, w, height, width, C, PITCH, BLOCK_K)
        weight = load_weights(w_ptr, k, n, C, N, BLOCK_K, BLOCK_N)
        total = multiply(total, rectified(x, RELU), weight, STORAGE, DOT)
    return total
