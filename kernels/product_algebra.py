"""A node as products of its maps: what is between the sums over positions and the maps.

For K products y_k = P_k d_k, never written, of maps with mean md_k and covariance V_k of their
channels (covariance.py), M positions and weights z_k:

    mean_k = P_k md_k,   var_k = diag(P_k V_k P_k^T),   r_k = 1 / sqrt(var_k + eps)
    sum_k z_k r_k (y_k - mean_k) = sum_k W_k d_k - b,   W_k = z_k r_k P_k,   b = sum_k W_k md_k

W_k is rounded to the storage dtype, and b is of the rounded one, so that a large mean cancels.
Backward, with S0 and T_k of product_gradients.py, and yhat_k = r_k (y_k - mean_k):

    S1_k = sum_m g yhat_k = r_k (rowsum(P_k * T_k) - mean_k S0),   dz_k = sum_o S1_k
    dP_k = z_k r_k (T_k - S0 md_k^T - S1_k r_k P_k V_k)
    dd_k = A_k g + B_k d_k + c_k,   A_k = P_k^T diag(z_k r_k)
    B_k = -P_k^T diag(z_k r_k^2 S1_k / M) P_k,   c_k = -A_k S0 / M - B_k md_k

where a vector over the output channels multiplies rows of a (C_out, C) matrix, and A_k and B_k are
rounded before c_k is taken. Given statistics, as in evaluation, do not depend on the maps: then
dP_k = z_k r_k T_k, B_k = 0 and c_k = 0.

All is small, some 100 KB a product, so that latencies count: a program takes a block of rows of one
product, of either B or dP, and forms the sums over all output channels itself. Matrix units
multiply float32 as three products of parts of it, which costs about two of its 24 bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.common import (
    STORAGE,
    accumulator,
    check_dense,
)
from lgcnet_fast.kernels.launches import kernel, wait_for_predecessor
from lgcnet_fast.kernels.product_sum import MAX_CHANNELS, block_of, check_sums

ROWS = 16
"""Of a program: the fewest that matrix units take."""


class ProductWeights(NamedTuple):
    """Of K products, for `product_sum`; statistics and shift in the accumulator's dtype."""

    statistics: Tensor
    """(3, K, C_out): mean, biased variance and inverse deviation of the products."""
    weights: Tensor
    """(K, C_out, C): W, of the maps' dtype."""
    shift: Tensor
    """(K, C_out): W md, which the node's b sums over the products."""


class ProductCoefficients(NamedTuple):
    """Of K products; all but A and B in the accumulator's dtype."""

    weight_gradients: Tensor
    """(K,): dz."""
    matrix_gradients: Tensor
    """(K, C_out, C): dP."""
    from_gradient: Tensor
    """(K, C, C_out): A, of the maps' dtype."""
    from_map: Tensor | None
    """(K, C, C): B, of the maps' dtype; None where it is zero."""
    shift: Tensor | None
    """(K, C): c; None where it is zero."""


@triton.jit
def _block(matrix_ptr, row, column, ROWS, COLUMNS, ACC: tl.constexpr):
    """Entries of a matrix, with zeros beside it; row: (rows, 1), column: (1, columns)."""
    mask = (row < ROWS) & (column < COLUMNS)
    return tl.load(matrix_ptr + row * COLUMNS + column, mask=mask, other=0.0).to(ACC)


@triton.jit
def _times_covariance(
    matrix_ptr, covariance_ptr, row, c, C, CO,
    ACC: tl.constexpr, ROWS: tl.constexpr, TERMS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Rows of P V: (ROWS, BLOCK_C)."""
    product = tl.zeros((ROWS, BLOCK_C), dtype=ACC)
    for first in range(0, C, TERMS):
        terms = first + tl.arange(0, TERMS)
        left = _block(matrix_ptr, row, terms[None, :], CO, C, ACC)
        right = _block(covariance_ptr, terms[:, None], c, C, C, ACC)
        product = tl.dot(left, right, product, input_precision="tf32x3", out_dtype=ACC)
    return product


@kernel
def _weights_kernel(
    mean_ptr, covariance_ptr, matrix_ptr, z_ptr, statistics_ptr, weighted_ptr, shift_ptr, C, CO,
    K: tl.constexpr, ACC: tl.constexpr, EPS: tl.constexpr,
    ROWS: tl.constexpr, TERMS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Statistics, W and W md of ROWS output channels of product k."""
    wait_for_predecessor()
    k = tl.program_id(1)
    o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK_C)[None, :]
    row = o[:, None]
    matrix_ptr += k * CO * C
    mean = tl.load(mean_ptr + k * C + c, mask=c < C, other=0.0)
    matrix = _block(matrix_ptr, row, c, CO, C, ACC)
    product = _times_covariance(
        matrix_ptr, covariance_ptr + k * C * C, row, c, C, CO, ACC, ROWS, TERMS, BLOCK_C
    )
    variance = tl.sum(product * matrix, axis=1)
    # Rounding may take it below zero; NaN stays.
    variance = tl.where(variance < 0, 0.0, variance)
    r = 1.0 / tl.sqrt(variance + EPS)
    scale = tl.load(z_ptr + k).to(ACC) * r
    weight = (scale[:, None] * matrix).to(weighted_ptr.dtype.element_ty)
    tl.store(weighted_ptr + k * CO * C + row * C + c, weight, mask=(row < CO) & (c < C))
    entry = k * CO + o
    tl.store(shift_ptr + entry, tl.sum(weight.to(ACC) * mean, axis=1), mask=o < CO)
    tl.store(statistics_ptr + entry, tl.sum(matrix * mean, axis=1), mask=o < CO)
    tl.store(statistics_ptr + K * CO + entry, variance, mask=o < CO)
    tl.store(statistics_ptr + 2 * K * CO + entry, r, mask=o < CO)


@triton.jit
def _normalised_sums(matrix, sums, statistics_ptr, s0_ptr, o, k, CO, K: tl.constexpr):
    """r and S1 of the output channels o, of which these are rows of P and T."""
    inside = o < CO
    mean = tl.load(statistics_ptr + k * CO + o, mask=inside, other=0.0)
    r = tl.load(statistics_ptr + 2 * K * CO + k * CO + o, mask=inside, other=0.0)
    s0 = tl.load(s0_ptr + o, mask=inside, other=0.0)
    return r, r * (tl.sum(matrix * sums, axis=1) - mean * s0)


@triton.jit
def _map_coefficients(
    sums_ptr, s0_ptr, mean_ptr, matrix_ptr, statistics_ptr, z, share,
    dz_ptr, from_gradient_ptr, from_map_ptr, shift_ptr, first_row, k, C, CO,
    K: tl.constexpr, TRAINING: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, TERMS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """ROWS rows n of A, B and c of product k, and dz of it by its first program."""
    n = (first_row + tl.arange(0, ROWS))[None, :]
    c = tl.arange(0, BLOCK_C)[None, :]
    dz = tl.zeros((TERMS,), dtype=ACC)
    shift = tl.zeros((ROWS,), dtype=ACC)
    from_map = tl.zeros((ROWS, BLOCK_C), dtype=ACC)
    for first in range(0, CO, TERMS):
        o = first + tl.arange(0, TERMS)
        row = o[:, None]
        matrix = _block(matrix_ptr, row, c, CO, C, ACC)
        sums = _block(sums_ptr, row, c, CO, C, ACC)
        columns = _block(matrix_ptr, row, n, CO, C, ACC)
        r, s1 = _normalised_sums(matrix, sums, statistics_ptr, s0_ptr, o, k, CO, K)
        dz += s1
        from_gradient = (z * r[:, None] * columns).to(from_gradient_ptr.dtype.element_ty)
        entry = from_gradient_ptr + k * C * CO + n * CO + row
        tl.store(entry, from_gradient, mask=(row < CO) & (n < C))
        if TRAINING:
            s0 = tl.load(s0_ptr + o, mask=o < CO, other=0.0)
            shift -= tl.sum(from_gradient.to(ACC) * (s0 * share)[:, None], axis=0)
            left = tl.trans(columns * (z * r * r * s1 * share)[:, None])
            from_map = tl.dot(left, matrix, from_map, input_precision="tf32x3", out_dtype=ACC)
    tl.store(dz_ptr + k, tl.sum(dz, axis=0), mask=first_row == 0)
    if TRAINING:
        n = first_row + tl.arange(0, ROWS)
        mean = tl.load(mean_ptr + k * C + c, mask=c < C, other=0.0)
        rounded = (-from_map).to(from_map_ptr.dtype.element_ty)
        entry = from_map_ptr + k * C * C + n[:, None] * C + c
        tl.store(entry, rounded, mask=(n < C)[:, None] & (c < C))
        shift -= tl.sum(rounded.to(ACC) * mean, axis=1)
        tl.store(shift_ptr + k * C + n, shift, mask=n < C)


@triton.jit
def _matrix_gradients(
    sums_ptr, s0_ptr, mean_ptr, covariance_ptr, matrix_ptr, statistics_ptr, z,
    matrix_gradient_ptr, first_row, k, C, CO,
    K: tl.constexpr, TRAINING: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, TERMS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """ROWS rows of dP of product k."""
    o = first_row + tl.arange(0, ROWS)
    row = o[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    matrix = _block(matrix_ptr, row, c, CO, C, ACC)
    gradient = _block(sums_ptr, row, c, CO, C, ACC)
    r, s1 = _normalised_sums(matrix, gradient, statistics_ptr, s0_ptr, o, k, CO, K)
    if TRAINING:
        mean = tl.load(mean_ptr + k * C + c, mask=c < C, other=0.0)
        s0 = tl.load(s0_ptr + o, mask=o < CO, other=0.0)
        product = _times_covariance(
            matrix_ptr, covariance_ptr + k * C * C, row, c, C, CO, ACC, ROWS, TERMS, BLOCK_C
        )
        gradient -= s0[:, None] * mean + (s1 * r)[:, None] * product
    gradient *= (z * r)[:, None]
    entry = matrix_gradient_ptr + k * CO * C + row * C + c
    tl.store(entry, gradient, mask=(row < CO) & (c < C))


@kernel(do_not_specialize=["M"])
def _coefficients_kernel(
    sums_ptr, s0_ptr, mean_ptr, covariance_ptr, matrix_ptr, statistics_ptr, z_ptr,
    dz_ptr, matrix_gradient_ptr, from_gradient_ptr, from_map_ptr, shift_ptr, M, C, CO,
    K: tl.constexpr, TRAINING: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, TERMS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """ROWS rows of A, B and c of product k, or of dP; dz of it by its first program."""
    wait_for_predecessor()
    k = tl.program_id(1)
    matrix_ptr += k * CO * C
    sums_ptr += k * CO * C
    z = tl.load(z_ptr + k).to(ACC)
    blocks = tl.cdiv(C, ROWS)
    block = tl.program_id(0)
    if block < blocks:
        _map_coefficients(
            sums_ptr, s0_ptr, mean_ptr, matrix_ptr, statistics_ptr, z, 1 / M.to(ACC),
            dz_ptr, from_gradient_ptr, from_map_ptr, shift_ptr, block * ROWS, k, C, CO,
            K, TRAINING, ACC, ROWS, TERMS, BLOCK_C,
        )  # fmt: skip
    else:
        _matrix_gradients(
            sums_ptr, s0_ptr, mean_ptr, covariance_ptr, matrix_ptr, statistics_ptr, z,
            matrix_gradient_ptr, (block - blocks) * ROWS, k, C, CO,
            K, TRAINING, ACC, ROWS, TERMS, BLOCK_C,
        )  # fmt: skip


def product_weights(
    mean: Tensor, covariance: Tensor, matrices: Tensor, z: Tensor, eps: float
) -> ProductWeights:
    """What normalises K products, from the statistics of their maps.

    mean (K, C), covariance (K, C, C): accumulator dtype; matrices: (K, C_out, C), of the maps'
    dtype, up to 256 rows and columns; z: (K,), of any float dtype; all contiguous. Raises
    `ValueError` naming the argument at fault.
    """
    products, out_channels, channels = _check_matrices(matrices)
    check_sums("mean", mean, (products, channels), matrices)
    check_sums("covariance", covariance, (products, channels, channels), matrices)
    check_dense("z", z, (products,), matrices)
    statistics = mean.new_empty(3, products, out_channels)
    weights = matrices.new_empty(products, out_channels, channels)
    shift = mean.new_empty(products, out_channels)
    _weights_kernel[(triton.cdiv(out_channels, ROWS), products)](
        mean, covariance, matrices, z, statistics, weights, shift, channels, out_channels,
        K=products, ACC=accumulator(matrices.dtype), EPS=eps,
        ROWS=ROWS, TERMS=terms(channels, out_channels), BLOCK_C=block_of(channels),
        num_warps=_warps(channels),
    )  # fmt: skip
    return ProductWeights(statistics, weights, shift)


def product_coefficients(
    sums: Tensor,
    s0: Tensor,
    mean: Tensor | None,
    covariance: Tensor | None,
    matrices: Tensor,
    statistics: Tensor,
    z: Tensor,
    positions: int,
    training: bool = True,
    dz: Tensor | None = None,
) -> ProductCoefficients:
    """Gradients of z and the matrices, and what makes those of the maps, of K products.

    sums (K, C_out, C), s0 (C_out,): of `product_sums`; mean, covariance, matrices and z as in
    `product_weights`, of which the first two count in training only; statistics: (3, K, C_out),
    accumulator dtype; positions: M; dz: (K,), for the gradient of z; all contiguous. Raises
    `ValueError` naming the argument at fault.
    """
    products, out_channels, channels = _check_matrices(matrices)
    check_sums("sums", sums, (products, out_channels, channels), matrices)
    check_sums("s0", s0, (out_channels,), matrices)
    check_sums("statistics", statistics, (3, products, out_channels), matrices)
    check_dense("z", z, (products,), matrices)
    if training:
        for name, tensor, shape in (
            ("mean", mean, (products, channels)),
            ("covariance", covariance, (products, channels, channels)),
        ):
            if tensor is None:
                raise ValueError(f"{name}: need it in training")
            check_sums(name, tensor, shape, matrices)
    dz = sums.new_empty(products) if dz is None else dz
    check_sums("dz", dz, (products,), matrices)
    matrix_gradients = sums.new_empty(sums.shape)
    from_gradient = matrices.new_empty(products, channels, out_channels)
    from_map = matrices.new_empty(products, channels, channels) if training else None
    shift = sums.new_empty(products, channels) if training else None
    blocks = triton.cdiv(channels, ROWS) + triton.cdiv(out_channels, ROWS)
    _coefficients_kernel[(blocks, products)](
        sums, s0, mean, covariance, matrices, statistics, z,
        dz, matrix_gradients, from_gradient, from_map, shift, positions, channels, out_channels,
        K=products, TRAINING=training, ACC=accumulator(matrices.dtype),
        ROWS=ROWS, TERMS=terms(channels, out_channels), BLOCK_C=block_of(channels),
        num_warps=_warps(channels),
    )  # fmt: skip
    return ProductCoefficients(dz, matrix_gradients, from_gradient, from_map, shift)


def terms(channels: int, out_channels: int) -> int:
    """Of a product of matrices that a program holds at once: all of them in a single round, or so
    few that two programs share a core."""
    widest = max(channels, out_channels)
    return block_of(widest) if widest <= 64 else 32


def _warps(channels: int) -> int:
    """So that none spills: each program holds whole rows."""
    return 4 if channels <= 64 else 8


def _check_matrices(matrices: Tensor) -> tuple[int, int, int]:
    """Products, output channels and channels; raises `ValueError`."""
    shape = tuple(matrices.shape)
    if len(shape) != 3 or not matrices.numel():
        raise ValueError(f"matrices: shape {shape}, need (K, C_out, C)")
    if max(shape[1:]) > MAX_CHANNELS:
        raise ValueError(f"matrices: shape {shape}, need up to {MAX_CHANNELS} channels")
    if matrices.dtype not in STORAGE or matrices.dtype == torch.float64 and matrices.is_cuda:
        raise ValueError(f"matrices: dtype {matrices.dtype}")
    check_dense("matrices", matrices, shape, matrices)
    return shape[0], shape[1], shape[2]
