"""Depthwise 3x3 convolution with dilation, NHWC: several branches of one input in one launch.

Branch b has dilation d_b, edge e its own weights; all of them read the same x:

    y[e, b, n, i, j, c] = sum_{u, v} w[e, b, u, v, c] r(x[n, s i + u d_b, s j + v d_b, c])

with u, v in {-1, 0, 1}, stride s, zero padding d_b, r = ReLU or the identity, and
ceil(H / s) x ceil(W / s) outputs.

How the kernel saves work: output rows that lie `step` apart (d / s, or d where s does not divide
d) share input rows. A program walks down such a chain, loads the three horizontal taps of each
input row once and adds them to the up to three outputs that need them. The chains of one
dilation start at the rows 0 to step - 1, the "phases".

Least traffic, in maps of y: s^2 + E B. Arithmetic: 9 E B multiply-adds an output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.common import accumulator, check_dense, check_like, check_map, empty_map

MAX_BRANCHES = 7
"""Dilations of one launch: they travel as bytes of one signed 64-bit argument."""


@dataclass(frozen=True)
class ForwardConfig:
    """Tile of one program: `block_p` chains of `rows` outputs, `block_c` channels."""

    rows: int
    block_p: int
    block_c: int
    warps: int

    @classmethod
    def default(
        cls, y_shape: tuple[int, ...], dilations: Sequence[int], stride: int
    ) -> ForwardConfig:
        """8 bytes of 16-bit storage a thread and load."""
        *_, channels, height, width = y_shape
        block_c = min(64, triton.next_power_of_2(channels))
        rows = default_rows(height, width, dilations, stride)
        return cls(rows, block_p=512 // block_c, block_c=block_c, warps=4)


def default_rows(height: int, width: int, dilations: Sequence[int], stride: int) -> int:
    """Long walks where the map is large enough to keep a GPU busy, none beyond the chains' end."""
    rows = 8 if height * width >= 4096 else 4
    longest_chain = max(triton.cdiv(height, _step(dilation, stride)) for dilation in dilations)
    return min(rows, triton.next_power_of_2(longest_chain))


@triton.jit
def rectify(x, RELU: tl.constexpr):
    """ReLU that keeps NaN, as PyTorch's does; the identity unless RELU."""
    if RELU:
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return x


@triton.jit
def dilation_of(packed, branch):
    """Byte `branch` of the packed dilations."""
    return ((packed >> (8 * branch)) & 255).to(tl.int32)


@triton.jit
def step_of(dilation, STRIDE: tl.constexpr):
    """Distance of the output rows that share input rows."""
    if STRIDE == 1:
        step = dilation
    else:
        step = tl.where(dilation % STRIDE == 0, dilation // STRIDE, dilation)
    return step


@triton.jit
def pieces_of(dilation, HO, STRIDE: tl.constexpr, ROWS: tl.constexpr):
    """Pieces of ROWS outputs that the chains of one output column fall into."""
    step = step_of(dilation, STRIDE)
    return tl.minimum(step, HO) * tl.cdiv(tl.cdiv(HO, step), ROWS)


@triton.jit
def locate_chains(position, dilation, HO, WO, STRIDE: tl.constexpr, ROWS: tl.constexpr):
    """Chain `position` of a branch: (step, image, first output row, output column).

    Chains are numbered by column first, then phase, then piece of ROWS outputs, then image, so
    that neighbours in memory are neighbours in a tile.
    """
    step = step_of(dilation, STRIDE)
    phases = tl.minimum(step, HO)
    pieces = pieces_of(dilation, HO, STRIDE, ROWS)
    piece = position // WO % pieces
    image = (position // WO // pieces).to(tl.int64)
    row = piece % phases + piece // phases * (step * ROWS)
    return step, image, row, position % WO


@triton.jit
def load_weight_row(w, row: tl.constexpr, mask, C, ACC: tl.constexpr):
    """Window row `row` of the weights: (left, middle, right), each of the shape of `w`."""
    left = tl.load(w + 3 * row * C, mask=mask, other=0.0).to(ACC)
    middle = tl.load(w + (3 * row + 1) * C, mask=mask, other=0.0).to(ACC)
    right = tl.load(w + (3 * row + 2) * C, mask=mask, other=0.0).to(ACC)
    return left, middle, right


@triton.jit
def load_taps(x, tap, left, middle, right, RELU: tl.constexpr, ACC: tl.constexpr):
    """The three horizontal taps around `x`, `tap` elements apart; the others are masks."""
    x_left = rectify(tl.load(x - tap, mask=left, other=0.0).to(ACC), RELU)
    x_middle = rectify(tl.load(x, mask=middle, other=0.0).to(ACC), RELU)
    x_right = rectify(tl.load(x + tap, mask=right, other=0.0).to(ACC), RELU)
    return x_left, x_middle, x_right


@triton.jit
def window_row(w, x, total):
    """total + the three products of one window row, as multiply-adds."""
    return total + w[0] * x[0] + w[1] * x[1] + w[2] * x[2]


@triton.jit
def _load_window_rows(
    w, row: tl.constexpr, edge_pitch, mask, C, EDGES: tl.constexpr, ACC: tl.constexpr
):
    """Window row `row` of every edge."""
    rows = ()
    for edge in tl.static_range(EDGES):
        rows = rows + (load_weight_row(w + edge * edge_pitch, row, mask, C, ACC),)
    return rows


@triton.jit
def _window_rows(w, x, totals, EDGES: tl.constexpr):
    """`window_row` for every edge."""
    rows = ()
    for edge in tl.static_range(EDGES):
        rows = rows + (window_row(w[edge], x, totals[edge]),)
    return rows


@triton.jit
def _walk_chains(
    x, w, y, mask, channel_mask, in_row, in_column, out_row, dilation, step, w_edge, y_edge,
    H, W, HO, WO, C,
    HOP: tl.constexpr, EDGES: tl.constexpr, ROWS: tl.constexpr, RELU: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of every chain of a tile (positions, channels), for all edges.

    x, w, y point at the first input row (which may lie outside), the weights and the first
    output row, of the first edge; w_edge and y_edge lead to the next one. Neighbouring outputs
    lie HOP input rows of the chain apart: with HOP = 1 an input row serves three outputs, with
    HOP = 2 (stride 2, odd dilation) every other one serves two.
    """
    w_top = _load_window_rows(w, 0, w_edge, channel_mask, C, EDGES, ACC)
    w_centre = _load_window_rows(w, 1, w_edge, channel_mask, C, EDGES, ACC)
    w_bottom = _load_window_rows(w, 2, w_edge, channel_mask, C, EDGES, ACC)
    tap = dilation * C
    x_pitch = (dilation * W).to(tl.int64) * C
    y_pitch = (step * WO).to(tl.int64) * C
    left = in_column >= dilation
    right = in_column + dilation < W
    nothing = ()
    for _ in tl.static_range(EDGES):
        nothing = nothing + (0.0,)
    one_row, two_rows = nothing, nothing
    # Input row u of the chain is the bottom row of output (u - 2) / HOP, the centre row of
    # (u - 1) / HOP and the top row of u / HOP, where these are whole and among the ROWS outputs.
    last_top: tl.constexpr = HOP * (ROWS - 1)
    for u in tl.static_range(last_top + 3):
        inside = mask & (in_row >= 0) & (in_row < H)
        taps = load_taps(x, tap, inside & left, inside, inside & right, RELU, ACC)
        if u >= 2 and u % HOP == 0:
            three_rows = _window_rows(w_bottom, taps, two_rows, EDGES)
            for edge in tl.static_range(EDGES):
                tl.store(y + edge * y_edge, three_rows[edge], mask=mask & (out_row < HO))
            y += y_pitch
            out_row += step
        if u % HOP == 1 % HOP and (u >= 1 and u <= last_top + 1):
            two_rows = _window_rows(w_centre, taps, one_row, EDGES)
        if u % HOP == 0 and u <= last_top:
            one_row = _window_rows(w_top, taps, nothing, EDGES)
        x += x_pitch
        in_row += dilation


@triton.jit(do_not_specialize=["packed_dilations", "N", "branches"])
def _forward_kernel(
    x_ptr, w_ptr, y_ptr, packed_dilations, N, H, W, HO, WO, C, branches,
    STRIDE: tl.constexpr, RELU: tl.constexpr, ACC: tl.constexpr,
    EDGES: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_P chains, BLOCK_C channels, one branch, all edges.

    Branches are neighbours in launch order, so that they find x in the L2 cache.
    """
    branch = tl.program_id(0) % branches
    rest = tl.program_id(0) // branches
    channel_blocks = tl.cdiv(C, BLOCK_C)
    channel = (rest % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    position = (rest // channel_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]

    dilation = dilation_of(packed_dilations, branch)
    step, image, out_row, out_column = locate_chains(position, dilation, HO, WO, STRIDE, ROWS)
    in_row = STRIDE * out_row - dilation
    in_column = STRIDE * out_column
    mask = (image < N) & (channel < C)

    x = x_ptr + ((image * H + in_row) * W + in_column) * C + channel
    w = w_ptr + branch * 9 * C + channel
    y_map = branch.to(tl.int64) * N + image
    y = y_ptr + ((y_map * HO + out_row) * WO + out_column) * C + channel
    w_edge = branches * 9 * C
    y_edge = branches.to(tl.int64) * N * HO * WO * C
    if STRIDE == 1 or dilation % STRIDE == 0:
        _walk_chains(
            x, w, y, mask, channel < C, in_row, in_column, out_row, dilation, step, w_edge, y_edge,
            H, W, HO, WO, C, 1, EDGES, ROWS, RELU, ACC,
        )  # fmt: skip
    else:
        _walk_chains(
            x, w, y, mask, channel < C, in_row, in_column, out_row, dilation, step, w_edge, y_edge,
            H, W, HO, WO, C, 2, EDGES, ROWS, RELU, ACC,
        )  # fmt: skip


def depthwise_multi(
    x: Tensor,
    weights: Tensor,
    dilations: Sequence[int],
    stride: int = 1,
    relu: bool = False,
    config: ForwardConfig | None = None,
) -> Tensor:
    """Depthwise convolutions of x: (edges, branches, N, C, ceil(H / stride), ceil(W / stride)).

    x: (N, C, H, W), channels_last; weights: (edges, branches, 3, 3, C), contiguous, any float
    dtype; dilations: one a branch, 1 to 255. Every y[e, b] is a dense channels_last map of x's
    dtype. Raises `ValueError` naming the argument at fault.
    """
    edges, branches, channels = check_arguments(x, weights, dilations, stride)
    images, _, height, width = x.shape
    out_height, out_width = -(-height // stride), -(-width // stride)
    y = empty_map((edges, branches, images, channels, out_height, out_width), x)
    config = config or ForwardConfig.default(tuple(y.shape), dilations, stride)
    columns = max(
        images * out_width * _pieces(out_height, d, stride, config.rows) for d in dilations
    )
    blocks = triton.cdiv(columns, config.block_p) * triton.cdiv(channels, config.block_c)
    _forward_kernel[(blocks * branches,)](
        x, weights, y, pack(dilations), images, height, width, out_height, out_width, channels,
        branches,
        STRIDE=stride, RELU=relu, ACC=accumulator(x.dtype),
        EDGES=edges, ROWS=config.rows,
        BLOCK_P=config.block_p, BLOCK_C=config.block_c, num_warps=config.warps,
    )  # fmt: skip
    return y


def depthwise(
    x: Tensor, weight: Tensor, dilation: int = 1, stride: int = 1, relu: bool = False
) -> Tensor:
    """One branch: (N, C, H, W), weight (3, 3, C) -> (N, C, ceil(H / stride), ceil(W / stride))."""
    return depthwise_multi(x, weight[None, None], (dilation,), stride, relu)[0, 0]


def pack(dilations: Sequence[int]) -> int:
    """The dilations as the bytes of one integer."""
    return sum(dilation << (8 * branch) for branch, dilation in enumerate(dilations))


def _step(dilation: int, stride: int) -> int:
    """Distance of the output rows that share input rows."""
    return dilation // stride if dilation % stride == 0 else dilation


def _pieces(out_height: int, dilation: int, stride: int, rows: int) -> int:
    """Pieces of `rows` outputs in all chains of one image column."""
    step = _step(dilation, stride)
    return min(step, out_height) * triton.cdiv(triton.cdiv(out_height, step), rows)


def check_arguments(
    x: Tensor, weights: Tensor, dilations: Sequence[int], stride: int
) -> tuple[int, int, int]:
    """(edges, branches, channels); raises `ValueError` naming the argument at fault."""
    check_map("x", x)
    if stride not in (1, 2):
        raise ValueError(f"stride: {stride}, need 1 or 2")
    if not 1 <= len(dilations) <= MAX_BRANCHES:
        raise ValueError(f"dilations: {len(dilations)} of them, need 1 to {MAX_BRANCHES}")
    if any(not 1 <= dilation <= 255 for dilation in dilations):
        raise ValueError(f"dilations: {tuple(dilations)}, each must be 1 to 255")
    if weights.ndim != 5:
        raise ValueError(
            f"weights: shape {tuple(weights.shape)}, need (edges, branches, 3, 3, channels)"
        )
    edges, branches, channels = weights.shape[0], len(dilations), x.shape[1]
    check_dense("weights", weights, (edges, branches, 3, 3, channels), x)
    return edges, branches, channels


def check_dy(dy: Tensor, x: Tensor, weights: Tensor, stride: int) -> tuple[int, int]:
    """Output (height, width); raises `ValueError` unless dy is like the output for x."""
    edges, branches = weights.shape[:2]
    images, channels, height, width = x.shape
    size = (-(-height // stride), -(-width // stride))
    shape = (edges, branches, images, channels, *size)
    check_like("dy", dy, shape, x)
    if dy.dtype != x.dtype:
        raise ValueError(f"dy: dtype {dy.dtype}, but x has {x.dtype}")
    if not dy.movedim(-3, -1).is_contiguous():
        raise ValueError(f"dy: strides {dy.stride()} of shape {shape} are not dense NHWC maps")
    return size
