"""Depthwise 3x3 convolution with dilation, NHWC: several branches of one input in one launch.

Branch b has dilation d_b, edge e its own weights; all of them read the same x:

    y[e, b, n, i, j, c] = sum_{u, v} w[e, b, u, v, c] r(x[n, s i + u d_b, s j + v d_b, c])

with u, v in {-1, 0, 1}, stride s, zero padding d_b, r = ReLU or the identity, and
ceil(H / s) x ceil(W / s) outputs.

How the kernel saves work: output rows that lie `step` apart (d / s, or d where s does not divide
d) share input rows. A program walks down such a chain, loads the three horizontal taps of each
input row once and adds them to the up to three outputs that need them. The chains of one
dilation start at the rows 0 to step - 1, the "phases". Neighbouring chains of a program start in
the same row, so that whatever depends on rows alone is computed once for all of them.

Least traffic, in maps of y: s^2 + E B. Arithmetic: 9 E B multiply-adds an output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.common import (
    INTERPRETED,
    accumulator,
    check_dense,
    check_like,
    check_map,
    empty_map,
)

MAX_BRANCHES = 7
"""Dilations of one launch: they travel as bytes of one signed 64-bit argument."""

MAX_IMAGES = 65535
"""Of a launch whose grid has one axis for the images alone."""

AHEAD = tl.constexpr(2)
"""Rows of a walk whose loads are under way while another one is being multiplied."""

_INTERPRETED = tl.constexpr(INTERPRETED)


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
        block_p, block_c = default_block(512, width, channels)
        rows = default_rows(height, width, dilations, stride)
        return cls(rows, block_p, block_c, warps=4)


def default_block(elements: int, width: int, channels: int) -> tuple[int, int]:
    """(columns, channels) of a tile of up to so many elements: few of them outside the map."""
    block_c = 64
    while block_c > 16 and channels % block_c:
        block_c //= 2
    block_c = min(block_c, triton.next_power_of_2(channels))
    return min(elements // block_c, triton.next_power_of_2(width)), block_c


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
def locate_chains(piece, dilation, HO, STRIDE: tl.constexpr, ROWS: tl.constexpr):
    """Piece `piece` of a branch's chains: (step, first output row), both scalars.

    Pieces are numbered by phase first. A piece that the branch does not have starts below the map.
    """
    step = step_of(dilation, STRIDE)
    phases = tl.minimum(step, HO)
    return step, piece % phases + piece // phases * (step * ROWS)


@triton.jit
def load_weight_row(w, row: tl.constexpr, mask, C, ACC: tl.constexpr):
    """Window row `row` of the weights: (left, middle, right), each of the shape of `w`."""
    left = tl.load(w + 3 * row * C, mask=mask, other=0.0).to(ACC)
    middle = tl.load(w + (3 * row + 1) * C, mask=mask, other=0.0).to(ACC)
    right = tl.load(w + (3 * row + 2) * C, mask=mask, other=0.0).to(ACC)
    return left, middle, right


@triton.jit
def widen(x, ACC: tl.constexpr):
    """x in the accumulator's dtype.

    The compiler takes three instructions for the two bfloat16 of a register, and two suffice:
    a float32's upper half is the bfloat16.
    """
    if x.dtype == tl.bfloat16 and not _INTERPRETED:
        x = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=r,=r,r",
            [x],
            dtype=tl.int32,
            is_pure=True,
            pack=2,
        ).to(tl.float32, bitcast=True)
    return x.to(ACC)


@triton.jit
def load_taps(x, u: tl.constexpr, offset, row, column, dilation, mask, H, W, C):
    """The three horizontal taps of row u of a walk, as they are stored.

    x: row `row` of the map, where the walk begins, which may lie outside; offset: of (column,
    channel) in a row.
    """
    x += u * (dilation * W).to(tl.int64) * C
    inside = (row + u * dilation >= 0) & (row + u * dilation < H)
    left = mask & (column >= dilation)
    right = mask & (column + dilation < W)
    return (
        tl.load(x - dilation * C + offset, mask=inside & left, other=0.0),
        tl.load(x + offset, mask=inside & mask, other=0.0),
        tl.load(x + dilation * C + offset, mask=inside & right, other=0.0),
    )


@triton.jit
def ready(taps, RELU: tl.constexpr, ACC: tl.constexpr):
    """Taps of `load_taps` as the numbers to multiply."""
    return (
        rectify(widen(taps[0], ACC), RELU),
        rectify(widen(taps[1], ACC), RELU),
        rectify(widen(taps[2], ACC), RELU),
    )


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
    x, w, y, mask, channel, in_row, in_column, out_row, out_column, dilation, step,
    w_edge, y_edge, H, W, HO, WO, C,
    HOP: tl.constexpr, EDGES: tl.constexpr, ROWS: tl.constexpr, RELU: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of every chain of a tile (columns, channels), for all edges.

    x, w, y point at the first input row (which may lie outside), the weights and the first
    output row, of the first edge; w_edge and y_edge lead to the next one. Neighbouring outputs
    lie HOP input rows of the chain apart: with HOP = 1 an input row serves three outputs, with
    HOP = 2 (stride 2, odd dilation) every other one serves two.
    """
    x_offset = in_column * C + channel
    # Input row u of the chain is the bottom row of output (u - 2) / HOP, the centre row of
    # (u - 1) / HOP and the top row of u / HOP, where these are whole and among the ROWS outputs.
    last_top: tl.constexpr = HOP * (ROWS - 1)
    rows = ()
    for u in tl.static_range(AHEAD):
        rows = rows + (load_taps(x, u, x_offset, in_row, in_column, dilation, mask, H, W, C),)
    w_top = _load_window_rows(w + channel, 0, w_edge, channel < C, C, EDGES, ACC)
    w_centre = _load_window_rows(w + channel, 1, w_edge, channel < C, C, EDGES, ACC)
    w_bottom = _load_window_rows(w + channel, 2, w_edge, channel < C, C, EDGES, ACC)
    y_pitch = (step * WO).to(tl.int64) * C
    y_offset = out_column * C + channel
    nothing = ()
    for _ in tl.static_range(EDGES):
        nothing = nothing + (0.0,)
    one_row, two_rows = nothing, nothing
    for u in tl.static_range(last_top + 3):
        if u + AHEAD < last_top + 3:
            rows = rows + (
                load_taps(x, u + AHEAD, x_offset, in_row, in_column, dilation, mask, H, W, C),
            )
        taps = ready(rows[u], RELU, ACC)
        if u >= 2 and u % HOP == 0:
            three_rows = _window_rows(w_bottom, taps, two_rows, EDGES)
            for edge in tl.static_range(EDGES):
                tl.store(y + edge * y_edge + y_offset, three_rows[edge], mask=mask & (out_row < HO))
            y += y_pitch
            out_row += step
        if u % HOP == 1 % HOP and (u >= 1 and u <= last_top + 1):
            two_rows = _window_rows(w_centre, taps, one_row, EDGES)
        if u % HOP == 0 and u <= last_top:
            one_row = _window_rows(w_top, taps, nothing, EDGES)


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
    channel_blocks = tl.cdiv(C, BLOCK_C)
    column_block = tl.program_id(1) // channel_blocks
    channel = (tl.program_id(1) % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    out_column = column_block * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    image = tl.program_id(2).to(tl.int64)
    dilation = dilation_of(packed_dilations, branch)
    step, out_row = locate_chains(tl.program_id(0) // branches, dilation, HO, STRIDE, ROWS)
    if out_row < HO:
        in_row = STRIDE * out_row - dilation
        in_column = STRIDE * out_column
        mask = (out_column < WO) & (channel < C)
        x = x_ptr + (image * H + in_row) * W * C
        w = w_ptr + branch * 9 * C
        y_map = branch.to(tl.int64) * N + image
        y = y_ptr + (y_map * HO + out_row) * WO * C
        w_edge = branches * 9 * C
        y_edge = branches.to(tl.int64) * N * HO * WO * C
        if STRIDE == 1 or dilation % STRIDE == 0:
            _walk_chains(
                x, w, y, mask, channel, in_row, in_column, out_row, out_column, dilation, step,
                w_edge, y_edge, H, W, HO, WO, C, 1, EDGES, ROWS, RELU, ACC,
            )  # fmt: skip
        else:
            _walk_chains(
                x, w, y, mask, channel, in_row, in_column, out_row, out_column, dilation, step,
                w_edge, y_edge, H, W, HO, WO, C, 2, EDGES, ROWS, RELU, ACC,
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
    pieces = max(_pieces(out_height, d, stride, config.rows) for d in dilations)
    blocks = triton.cdiv(out_width, config.block_p) * triton.cdiv(channels, config.block_c)
    _forward_kernel[(pieces * branches, blocks, images)](
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
    """Pieces of `rows` outputs that the chains of one output column fall into."""
    step = _step(dilation, stride)
    return min(step, out_height) * triton.cdiv(triton.cdiv(out_height, step), rows)


def check_arguments(
    x: Tensor, weights: Tensor, dilations: Sequence[int], stride: int
) -> tuple[int, int, int]:
    """(edges, branches, channels); raises `ValueError` naming the argument at fault."""
    check_map("x", x)
    if x.shape[0] > MAX_IMAGES:
        raise ValueError(f"x: {x.shape[0]} images, need at most {MAX_IMAGES}; call it for parts")
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
