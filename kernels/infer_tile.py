"""One launch of an inference network: the sum of a node's edges, and 1x1 convolutions of it.

    y = bias + sum_t term_t(x_t)                     the terms of infer_terms.py
    z_j = bias_j + r(y) W_j + sum_i r(a_ij) W_ij     a_ij: other maps of the size of y

Node y stays in registers on its way to the products z_j: where nothing else reads it, it is never
stored. A node with its preprocessing of the following cells is so one launch, and so is the end of
a network with its classifier.

Least traffic: every x_t and a_ij once, y (if stored) and the z_j once, the weights once a program
(from the L2 cache). Arithmetic: 2 C N a tap or product and pixel, 18 C for a depthwise filter.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels import infer_terms
from lgcnet_fast.kernels.infer_terms import (
    CONVOLUTION,
    COPY,
    POOL,
    RESIZED,
    RESIZED_PRODUCT,
    SEPARABLE,
    TRANSPOSED,
    add_convolution,
    add_resized_product,
    add_separable,
    add_transposed,
    channels_below,
    copied,
    load_weights,
    multiply,
    pooled,
    rectified,
    resized,
)
from lgcnet_fast.kernels.infer_tile_config import TileConfig
from lgcnet_fast.kernels.launches import kernel

KINDS = {
    name.lower(): getattr(infer_terms, name).value
    for name in (
        "COPY", "POOL", "SEPARABLE", "CONVOLUTION", "INTERLEAVED", "TRANSPOSED", "RESIZED",
        "RESIZED_PRODUCT",
    )
}  # fmt: skip
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


@dataclass(frozen=True)
class MapView:
    """A map (N, height, width, channels) in memory, NHWC with `pitch` elements a pixel.

    `class_rows`: float32 rows (N, height, channels, pitch) instead, as the argmax reads them.
    """

    data: Tensor
    """One-dimensional, from the map's first element on."""
    height: int
    width: int
    channels: int
    pitch: int
    class_rows: bool = False


@dataclass(frozen=True)
class TileTerm:
    """weight: (taps * c_in, c_out) in the storage dtype; depthwise: (9, c_in) float32."""

    kind: str
    source: MapView
    weight: Tensor | None = None
    depthwise: Tensor | None = None
    stride: int = 1
    dilation: int = 1
    side: int = 1
    relu: bool = True


@dataclass(frozen=True)
class TileProduct:
    """weight: (c_node + sum of the parts' channels, c_out); bias: (c_out,) float32."""

    parts: tuple[MapView, ...]
    weight: Tensor
    bias: Tensor
    out: MapView


def run_tile(
    terms: Sequence[TileTerm],
    bias: Tensor,
    out: MapView | None,
    products: Sequence[TileProduct],
    size: tuple[int, int],
    batch: int,
    dtype: torch.dtype,
    config: TileConfig,
    relu_out: bool = False,
) -> None:
    """Writes `out` (if given) and the outputs of the products, all (batch, *size).

    bias: (channels of the node,) float32; dtype: of the maps and weights; relu_out: y is stored as
    its ReLU. Views are trusted.
    """
    height, width = size
    channels = len(bias)
    parts = [part for product in products for part in product.parts]
    step = 2 if any(term.kind == "transposed" for term in terms) else 1
    across = triton.cdiv(width, step * config.columns)
    grid = (step * step * across * triton.cdiv(height, step * config.rows), batch)
    _tile_kernel[grid](
        tuple(term.source.data for term in terms) or (bias,),
        tuple(bias if term.weight is None else term.weight for term in terms) or (bias,),
        tuple(bias if term.depthwise is None else term.depthwise for term in terms) or (bias,),
        tuple(n for term in terms for n in (term.source.height, term.source.width)) or (0,),
        bias, out.data if out is not None else bias,
        tuple(part.data for part in parts) or (bias,),
        tuple(product.weight for product in products) or (bias,),
        tuple(product.bias for product in products) or (bias,),
        tuple(product.out.data for product in products) or (bias,),
        height, width, across,
        TERMS=_packed([_constants(term, config) for term in terms]), TERM_COUNT=len(terms),
        PARTS=_packed([(x.channels, x.pitch, _block(x.channels, config)) for x in parts]),
        PRODUCTS=_packed(_product_constants(products)), PRODUCT_COUNT=len(products),
        N=channels, BLOCK_N=_block(channels), PITCH=out.pitch if out is not None else 0,
        CLASS_ROWS=out is not None and out.class_rows,
        STORE=out is not None, RELU_OUT=relu_out,
        ROWS=config.rows, COLUMNS=config.columns, STEP=step, TAPS=config.taps,
        STORAGE=TRITON_DTYPES[dtype],
        DOT=tl.float32 if INTERPRETED else TRITON_DTYPES[dtype],
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def _block(channels: int, config: TileConfig | None = None) -> int:
    """Channels of one block: matrix units take 16 or more."""
    block = max(16, triton.next_power_of_2(channels))
    return block if config is None else min(block, config.block_k)


def _constants(term: TileTerm, config: TileConfig) -> tuple[int, ...]:
    source = term.source
    return (
        KINDS[term.kind], source.channels, source.pitch, term.stride, term.dilation, term.side,
        int(term.relu), _block(source.channels, config),
    )  # fmt: skip


def _packed(rows: Sequence[Sequence[int]]) -> int:
    """Rows of up to 8 numbers below 2^16 as one integer: older Tritons take no tuples of constants.

    Number f of row r is `packed >> (128 r + 16 f) & 0xFFFF`.
    """
    packed = 0
    for r, row in enumerate(rows):
        for f, number in enumerate(row):
            if not 0 <= number < 2**16:
                raise ValueError(f"{number} in {tuple(row)}: need 0 to {2**16 - 1}")
            packed |= number << (128 * r + 16 * f)
    return packed


def _product_constants(products: Sequence[TileProduct]) -> list[tuple[int, ...]]:
    """(channels, block of channels, first part, part behind the last, pitch, class_rows) each."""
    constants, first = [], 0
    for product in products:
        end = first + len(product.parts)
        channels = product.out.channels
        out = product.out
        constants.append((channels, _block(channels), first, end, out.pitch, int(out.class_rows)))
        first = end
    return constants


@triton.jit
def _term(
    total, x_ptr, w_ptr, d_ptr, image, row, column, odd_row, odd_column, inside, n, h, w, height,
    width, TERMS: tl.constexpr, t: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr,
    TAPS: tl.constexpr, STORAGE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """total + term t; TERMS: packed rows of what `_constants` gives."""
    TERM: tl.constexpr = TERMS >> (128 * t)
    KIND: tl.constexpr = TERM & 0xFFFF
    C: tl.constexpr = (TERM >> 16) & 0xFFFF
    PITCH: tl.constexpr = (TERM >> 32) & 0xFFFF
    STRIDE: tl.constexpr = (TERM >> 48) & 0xFFFF
    DILATION: tl.constexpr = (TERM >> 64) & 0xFFFF
    SIDE: tl.constexpr = (TERM >> 80) & 0xFFFF
    RELU: tl.constexpr = (TERM >> 96) & 0xFFFF
    BLOCK_K: tl.constexpr = (TERM >> 112) & 0xFFFF
    if KIND == COPY:
        total += copied(x_ptr, image, row, column, inside, n, h, w, C, PITCH, BLOCK_N)
    elif KIND == POOL:
        total += pooled(x_ptr, image, row, column, inside, n, h, w, C, PITCH, STRIDE, BLOCK_N)
    elif KIND == RESIZED:
        total += resized(
            x_ptr, image, row, column, inside, n, h, w, height, width, C, PITCH, BLOCK_N
        )
    elif KIND == SEPARABLE:
        total = add_separable(
            total, x_ptr, d_ptr, w_ptr, image, row, column, inside, n, h, w,
            C, PITCH, STRIDE, DILATION, N, BLOCK_K, BLOCK_N, TAPS, STORAGE, DOT,
        )  # fmt: skip
    elif KIND == RESIZED_PRODUCT:
        total = add_resized_product(
            total, x_ptr, w_ptr, image, row, column, inside, n, h, w, height, width,
            C, PITCH, RELU, N, BLOCK_K, BLOCK_N, STORAGE, DOT,
        )  # fmt: skip
    elif KIND == TRANSPOSED:
        total = add_transposed(
            total, x_ptr, w_ptr, image, row, column, odd_row, odd_column, inside, n, h, w,
            C, PITCH, RELU, N, BLOCK_K, BLOCK_N, STORAGE, DOT,
        )  # fmt: skip
    else:
        total = add_convolution(
            total, x_ptr, w_ptr, image, row, column, inside, n, h, w,
            KIND, C, PITCH, STRIDE, DILATION, SIDE, RELU, N, BLOCK_K, BLOCK_N, STORAGE, DOT,
        )  # fmt: skip
    return total


@triton.jit
def _store(
    y_ptr, y, image, row, column, inside, n, height, width, N: tl.constexpr,
    PITCH: tl.constexpr, CLASS_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    mask = inside[:, None] & channels_below(n, N, BLOCK_N)
    if CLASS_ROWS:
        first = ((image * height + row) * N)[:, None] + n[None, :]
        offset = first * PITCH + column[:, None]
    else:
        offset = (((image * height + row) * width + column) * PITCH)[:, None] + n[None, :]
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


@kernel(programmatic=False, do_not_specialize=["sizes", "height", "width", "across"])
def _tile_kernel(
    x_ptrs, w_ptrs, d_ptrs, sizes, bias_ptr, y_ptr,
    part_ptrs, product_w_ptrs, product_bias_ptrs, product_ptrs,
    height, width, across,
    TERMS: tl.constexpr, TERM_COUNT: tl.constexpr, PARTS: tl.constexpr,
    PRODUCTS: tl.constexpr, PRODUCT_COUNT: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr,
    PITCH: tl.constexpr, CLASS_ROWS: tl.constexpr, STORE: tl.constexpr, RELU_OUT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, TAPS: tl.constexpr,
    STORAGE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of ROWS x COLUMNS pixels, images); `across`: tiles in a row of tiles.

    Pixels of a tile are STEP apart, so STEP^2 tiles one after another fill an area without gaps.
    """
    image = tl.program_id(1)
    first = tl.program_id(0) % (STEP * STEP)
    tile = tl.program_id(0) // (STEP * STEP)
    first_row, first_column = first // STEP, first % STEP
    pixel = tl.arange(0, ROWS * COLUMNS)
    row = (tile // across * ROWS + pixel // COLUMNS) * STEP + first_row
    column = (tile % across * COLUMNS + pixel % COLUMNS) * STEP + first_column
    inside = (row < height) & (column < width)
    n = tl.arange(0, BLOCK_N)

    bias = tl.load(bias_ptr + n[None, :], mask=channels_below(n, N, BLOCK_N), other=0.0)
    total = tl.zeros((ROWS * COLUMNS, BLOCK_N), tl.float32) + bias
    for t in tl.static_range(TERM_COUNT):
        total = _term(
            total, x_ptrs[t], w_ptrs[t], d_ptrs[t], image, row, column, first_row, first_column,
            inside, n, sizes[2 * t], sizes[2 * t + 1], height, width, TERMS, t, N, BLOCK_N, TAPS,
            STORAGE, DOT,
        )  # fmt: skip
    if STORE:
        y = rectified(total, RELU_OUT)
        _store(
            y_ptr, y, image, row, column, inside, n, height, width, N, PITCH, CLASS_ROWS, BLOCK_N
        )

    if PRODUCT_COUNT > 0:
        # As a reader of the stored map would see it.
        node = rectified(total, True)
        for j in tl.static_range(PRODUCT_COUNT):
            _product(
                node, product_w_ptrs[j], product_bias_ptrs[j], product_ptrs[j], part_ptrs, image,
                row, column, inside, n, height, width, N, BLOCK_N, PRODUCTS, j, PARTS, STORAGE, DOT,
            )  # fmt: skip


@triton.jit
def _product(
    node, w_ptr, bias_ptr, z_ptr, part_ptrs, image, row, column, inside, n, height, width,
    N: tl.constexpr, BLOCK_N: tl.constexpr, PRODUCTS: tl.constexpr, j: tl.constexpr,
    PARTS: tl.constexpr, STORAGE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Writes bias + node W + the other parts' products; rows of W: the node's channels first."""
    PRODUCT: tl.constexpr = PRODUCTS >> (128 * j)
    M: tl.constexpr = PRODUCT & 0xFFFF
    BLOCK_M: tl.constexpr = (PRODUCT >> 16) & 0xFFFF
    FIRST: tl.constexpr = (PRODUCT >> 32) & 0xFFFF
    END: tl.constexpr = (PRODUCT >> 48) & 0xFFFF
    PITCH: tl.constexpr = (PRODUCT >> 64) & 0xFFFF
    CLASS_ROWS: tl.constexpr = (PRODUCT >> 80) & 0xFFFF
    m = tl.arange(0, BLOCK_M)
    bias = tl.load(bias_ptr + m[None, :], mask=channels_below(m, M, BLOCK_M), other=0.0)
    total = tl.zeros((node.shape[0], BLOCK_M), tl.float32) + bias
    weight = load_weights(w_ptr, n, m, N, M, BLOCK_N, BLOCK_M)
    total = multiply(total, node, weight, STORAGE, DOT)
    part_w_ptr = w_ptr + N * M
    for i in tl.static_range(FIRST, END):
        total = _part(
            total, part_ptrs[i], part_w_ptr, image, row, column, inside, m, height, width,
            PARTS, i, M, BLOCK_M, STORAGE, DOT,
        )  # fmt: skip
        part_w_ptr += ((PARTS >> (128 * i)) & 0xFFFF) * M
    _store(
        z_ptr, total, image, row, column, inside, m, height, width, M, PITCH, CLASS_ROWS, BLOCK_M
    )


@triton.jit
def _part(
    total, x_ptr, w_ptr, image, row, column, inside, m, height, width,
    PARTS: tl.constexpr, i: tl.constexpr, M: tl.constexpr, BLOCK_M: tl.constexpr,
    STORAGE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """total + the product of part i, by its rows of W."""
    PART: tl.constexpr = PARTS >> (128 * i)
    C: tl.constexpr = PART & 0xFFFF
    PITCH: tl.constexpr = (PART >> 16) & 0xFFFF
    BLOCK_K: tl.constexpr = (PART >> 32) & 0xFFFF
    return add_convolution(
        total, x_ptr, w_ptr, image, row, column, inside, m, height, width,
        CONVOLUTION, C, PITCH, 1, 1, 1, True, M, BLOCK_K, BLOCK_M, STORAGE, DOT,
    )  # fmt: skip
